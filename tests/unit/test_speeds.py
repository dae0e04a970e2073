"""The speed of each engine counts the seconds in which it had work, and nothing twice."""

from rl.loop.speeds import Speeds


def test_an_engines_speed_is_its_tokens_over_the_seconds_in_which_it_had_work():
    now = [0.0]
    speeds = Speeds(2, clock=lambda: now[0])
    speeds.begin(0)
    speeds.begin(1)
    now[0] = 2.0
    speeds.begin(0)
    speeds.end(0, 100)
    now[0] = 4.0
    speeds.end(0, 100)
    now[0] = 10.0  # engine 0 has had nothing to do since 4
    speeds.end(1, 50)
    assert speeds.metrics() == {"perf/engine_0/tokens_per_s": 50.0, "perf/engine_1/tokens_per_s": 5.0}
    assert speeds.metrics() == {}, "each token counts once"


def test_a_group_that_is_under_way_counts_its_seconds_and_a_lost_one_has_no_tokens():
    now = [0.0]
    speeds = Speeds(2, clock=lambda: now[0])
    speeds.begin(0)
    speeds.begin(0)
    now[0] = 5.0
    speeds.end(0, 10)
    assert speeds.metrics() == {"perf/engine_0/tokens_per_s": 2.0}
    now[0] = 6.0
    speeds.end(0, 0)
    assert speeds.metrics() == {}
    speeds.begin(0)
    now[0] = 8.0
    speeds.end(0, 30)
    assert speeds.metrics() == {"perf/engine_0/tokens_per_s": 10.0}, "1 s of the lost group, and 2 s"


def test_a_single_engine_has_no_other_to_be_compared_with():
    speeds = Speeds(1)
    speeds.begin(0)
    speeds.end(0, 10)
    assert speeds.metrics() == {}
