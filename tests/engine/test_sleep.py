"""A real engine sleeps and wakes. On CPU vLLM keeps the memory, but its scheduler stops and resumes as on a GPU."""

from collections.abc import Callable

from test_update import PROMPT, gap
from transformers import AutoModelForCausalLM

from live import engine_config
from trainer.learner.weights import LearnerWeights


def test_an_engine_that_sleeps_keeps_its_requests_and_goes_on_with_the_new_weights(live: Callable, tiny: Callable):
    old, new = (tiny(family="qwen2", tied=False, seed=seed) for seed in (0, 1))
    engine = live(engine_config(old))
    own = engine.engine
    sender = engine.open_sender(LearnerWeights(AutoModelForCausalLM.from_pretrained(new), sharded=False))
    running = engine.keep_sampling(PROMPT, 4)
    engine.wait(own.sleep())
    later = engine.submit(own.sample(PROMPT, 2, 7))
    engine.update(sender, 1)
    # It has weights again and no KV cache: nothing may run, and vLLM has not resumed by itself.
    assert engine.wait(own.llm.is_sleeping())
    assert not later.done()
    engine.wait(own.wake())
    assert not engine.wait(own.llm.is_sleeping())
    assert {0, 1} in [set(reply.versions) for reply in running.result(300)]
    fresh = later.result(300)
    assert {version for reply in fresh for version in reply.versions} == {1}
    assert gap(str(new), fresh) <= 1e-5
    counters = engine.wait(own.counters())
    assert (counters["version"], counters["aborted"]) == (1, 0)
    assert own.pause_seconds > 0
