"""pass@k equals enumeration, votes are counted with ties, and errors are those of a sample."""

import math
from itertools import combinations
from statistics import fmean, stdev

import pytest

from rl.loop.estimates import estimates, names, of_problem, paired, pass_at_k, standard_error, voted, weighted


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_success(n):
    for passed in range(n + 1):
        outcomes = [i < passed for i in range(n)]
        for k in range(1, n + 1):
            share = fmean(any(subset) for subset in combinations(outcomes, k))
            assert pass_at_k(n, passed, k) == pytest.approx(share, abs=1e-12), (n, passed, k)


def test_pass_at_k_is_unbiased_where_the_share_of_k_samples_with_a_success_is_the_truth():
    # Over all outcomes of 5 samples that pass with probability 0.3, the estimate has the mean 1 - 0.7^k.
    for k in range(1, 6):
        mean = sum(math.comb(5, c) * 0.3**c * 0.7 ** (5 - c) * pass_at_k(5, c, k) for c in range(6))
        assert mean == pytest.approx(1 - 0.7**k)


def test_pass_at_k_of_many_samples_is_a_number():
    assert pass_at_k(5000, 1, 2500) == pytest.approx(0.5)
    assert pass_at_k(5000, 4000, 2000) == 1.0


def test_the_figures_of_n_samples():
    assert names(1, majority=False) == ["avg@1", "pass@1"]
    assert names(6, majority=True) == ["avg@6", "pass@1", "pass@2", "pass@4", "pass@6", "maj@6"]
    assert names(8, majority=False) == ["avg@8", "pass@1", "pass@2", "pass@4", "pass@8"]
    assert list(of_problem([0.5] * 6, list("aabbcc"), 6)) == names(6, majority=True)


def test_the_most_frequent_answer_wins_although_most_samples_are_wrong():
    assert voted(["7", "7", "1", "2", "3"], [1.0, 1.0, 0.0, 0.0, 0.0]) == 1.0
    assert voted(["7", "1", "1", "2", "3"], [1.0, 0.0, 0.0, 0.0, 0.0]) == 0.0


def test_equally_frequent_answers_share_the_vote():
    assert voted(["7", "7", "1", "1", "2"], [1.0, 1.0, 0.0, 0.0, 0.0]) == 0.5
    assert voted(["7", "1", "2"], [1.0, 0.0, 0.0]) == pytest.approx(1 / 3)


def test_a_sample_without_an_answer_has_no_vote():
    assert voted([None, None, None, "7"], [0.0, 0.0, 0.0, 1.0]) == 1.0
    assert voted([None, None], [0.0, -1.0]) == -0.5


def test_what_needs_more_samples_than_there_are_is_left_out():
    assert of_problem([1.0, 0.0], ["a", "b"], 4) == {"avg@4": 0.5, "pass@1": 0.5, "pass@2": 1.0}


def test_a_mean_of_several_sets_has_their_weights_and_the_error_of_independent_sets():
    metrics = {"eval/easy/avg@1": 1.0, "eval/easy/avg@1_se": 0.3, "eval/hard/avg@4": 0.25, "eval/hard/avg@4_se": 0.2}
    means = {"all": {"easy/avg@1": 1.0, "hard/avg@4": 2.0}, "more": {"not_due/avg@1": 1.0}}
    assert weighted(metrics, means) == pytest.approx(
        {"eval/all/mean": (1.0 + 2 * 0.25) / 3, "eval/all/mean_se": math.sqrt(0.3**2 + 0.4**2) / 3}
    )
    assert weighted(metrics, {}) == {}


def test_the_error_of_a_mean_is_that_over_problems():
    problems = [{"avg@2": 0.0, "pass@2": 0.0}, {"avg@2": 0.5, "pass@2": 1.0}, {"avg@2": 1.0}]
    found = estimates(problems)
    assert found["avg@2"] == 0.5
    assert found["avg@2_se"] == pytest.approx(stdev([0.0, 0.5, 1.0]) / 3**0.5)
    assert (found["pass@2"], found["pass@2_se"]) == (0.5, pytest.approx(0.5))
    assert math.isnan(standard_error([0.5]))


def test_a_paired_difference_leaves_out_what_only_problems_differ_in():
    first = {0: {"avg@2": 0.0}, 1: {"avg@2": 0.5}, 2: {"avg@2": 0.9}, 7: {"avg@2": 0.0}}
    last = {0: {"avg@2": 0.1}, 1: {"avg@2": 0.6}, 2: {"avg@2": 1.0}, 8: {"avg@2": 1.0}}
    found = paired(first, last)
    assert found["avg@2"] == pytest.approx(0.1)
    assert found["avg@2_se"] == pytest.approx(0.0, abs=1e-9), "each problem became better by the same amount"
    assert estimates(last.values())["avg@2_se"] > 0.1
    assert paired({0: {"avg@2": 0.0}}, {1: {"avg@2": 0.0}}) == {}
