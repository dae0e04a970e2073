"""What a reward may return, what it sees of a reply, and what happens when it is `async`."""

import asyncio
import pickle
import threading
import time

import numpy as np
import pytest
import torch

from rl.rewards.clock import RewardClock
from rl.rewards.result import number
from rl.rewards.score import RewardError, reply_to, score, score_in_time
from rl.rewards.shaping import SoftOverlong
from rl.types import Completion, Prompt, Reply

REPLY = Reply(text="5", finished=True, task={"answer": "5"}, token_ids=[7, 8])


@pytest.mark.parametrize(
    "one",
    [
        *(1, True, 1.0),
        *(np.float32(1), np.int64(1), np.bool_(True), np.array(1.0), np.array([1])),
        *(torch.tensor(1.0), torch.tensor([[1]]), torch.tensor(True)),
    ],
    ids=repr,
)
def test_python_numpy_and_torch_scalars_are_rewards(one):
    total, parts = score(lambda reply: one, REPLY, 0)
    assert (repr(total), parts) == ("1.0", {})
    total, parts = score(lambda reply: {"right": one, "short": 0.5}, REPLY, 0)
    assert (repr(total), repr(parts)) == ("1.5", "{'right': 1.0, 'short': 0.5}")


@pytest.mark.parametrize("wrong", [None, "1", [1.0], {}, np.array([1.0, 2.0]), torch.zeros(2), np.nan, 1j], ids=repr)
def test_everything_else_is_refused(wrong):
    with pytest.raises(RewardError, match="return a finite float, or a dict of finite floats"):
        score(lambda reply: wrong, REPLY, 0)
    assert number("1") is None


@pytest.mark.parametrize("wrong", [{"a": None}, {"a": float("nan")}, {"a": 1.0, "b": "1"}], ids=repr)
def test_a_part_that_is_no_finite_number_is_refused(wrong):
    with pytest.raises(RewardError, match="return a finite float, or a dict of finite floats"):
        score(lambda reply: wrong, REPLY, 0)


def scored(reward, deadline_s=5.0):
    return asyncio.run(score_in_time(reward, REPLY, 3, deadline_s))


def test_an_async_reward_is_awaited():
    async def judge(reply: Reply) -> dict[str, float]:
        await asyncio.sleep(0)
        return {"right": float(reply.text == reply.task["answer"])}

    assert score(judge, REPLY, 0) == (1.0, {"right": 1.0})
    assert scored(judge) == (1.0, {"right": 1.0})


def test_async_rewards_share_one_loop_that_is_not_the_drivers():
    async def where(reply: Reply) -> float:
        seen.append((asyncio.get_running_loop(), threading.current_thread().name))
        return 0.0

    async def main():
        await asyncio.gather(*(score_in_time(where, REPLY, i, 5.0) for i in range(3)))
        return asyncio.get_running_loop()

    seen = []
    driver = asyncio.run(main())
    assert len({loop for loop, _ in seen}) == 1
    assert seen[0][0] is not driver
    assert {name for _, name in seen} == {"async rewards"}


def test_a_blocking_call_in_an_async_reward_does_not_stop_the_driver():
    begun, released = threading.Event(), threading.Event()

    async def blocks(reply: Reply) -> float:
        begun.set()
        return float(released.wait(60))

    async def main():
        waiting = asyncio.create_task(score_in_time(blocks, REPLY, 0, 120.0))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        # The driver's own loop still runs: it lets the reward go on.
        released.set()
        return await waiting

    assert asyncio.run(main())[0] == 1.0


def test_an_async_reward_that_raises_or_takes_too_long_names_the_prompt_and_is_cancelled():
    async def raises(reply: Reply) -> float:
        raise KeyError("answer")

    async def hangs(reply: Reply) -> float:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return 0.0

    cancelled = threading.Event()
    with pytest.raises(RewardError, match=r"the reward of prompt 3 \(task {'answer': '5'}.*raised KeyError: 'answer'"):
        scored(raises)
    with pytest.raises(RewardError, match=r"prompt 3 took longer than 0\.2 s .*deadlines\.reward_s"):
        scored(hangs, 0.2)
    assert cancelled.wait(5)


def test_an_async_reward_can_be_shaped():
    async def right(reply: Reply) -> float:
        return np.float32(1.0)

    shaped = SoftOverlong(reward=right, max_tokens=4, buffer=4)
    assert scored(shaped) == (0.5, {"task": 1.0, "overlong": -0.5})


def test_a_reward_sees_the_prompt_and_the_special_tokens():
    calls = []

    def decode(ids, *, skip_special_tokens=True):
        calls.append(skip_special_tokens)
        return "5" if skip_special_tokens else "5<|end|>"

    messages = [{"role": "user", "content": "2 + 3"}]
    prompt = Prompt(ordinal=0, token_ids=[1, 2], task={"answer": "5"}, given=messages)
    completion = Completion(token_ids=[7, 8], logprobs=[0.0, 0.0], versions=[0, 0], finish_reason="length")
    reply = reply_to(prompt, completion, decode)
    assert (reply.text, reply.finished, reply.token_ids) == ("5", False, [7, 8])
    assert (reply.prompt, reply.prompt_token_ids) == (messages, [1, 2])
    assert calls == [True], "special tokens are decoded when they are asked for"
    assert reply.text_with_special_tokens == reply.text_with_special_tokens == "5<|end|>"
    assert calls == [True, False]


def test_a_reply_travels_to_another_process_without_the_tokenizer():
    reply = Reply(text="5", finished=True, task={}, token_ids=[7], decode=lambda ids, skip_special_tokens: "5<|end|>")
    arrived = pickle.loads(pickle.dumps(reply))
    assert arrived == reply
    assert (arrived.text_with_special_tokens, arrived.decode) == ("5<|end|>", None)
    assert REPLY.text_with_special_tokens == "5"


def compute(cpu_s):
    until = time.thread_time() + cpu_s
    while time.thread_time() < until:
        pass
    return 1.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_rewards_that_compute_at_the_same_time_do_not_run_each_others_clocks(kind):
    shown = []

    class Timed(RewardClock):
        def __init__(self):
            super().__init__()
            shown.append(self)

    async def judge(reply):
        await asyncio.sleep(0)
        compute(0.02)
        await asyncio.sleep(0)
        return compute(0.02)

    async def main():
        reward = judge if kind == "async" else lambda reply: compute(0.04)
        tasks = [asyncio.create_task(score_in_time(reward, REPLY, i, 60.0)) for i in range(16)]
        began = time.monotonic()
        await asyncio.gather(*tasks)
        return time.monotonic() - began, [clock.seconds() for clock in shown]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl.rewards.score.RewardClock", Timed)
        took, seconds = asyncio.run(main())
    assert len(seconds) == 16
    # Each computes for a sixteenth of the time that they take together.
    assert max(seconds) < took / 2
    assert min(seconds) >= 0.03


def test_the_clock_of_a_reward_that_waits_is_the_wall_clock():
    waiting, clock = threading.Event(), RewardClock()
    began = time.monotonic()
    with clock.working():
        waiting.wait(0.05)
    assert clock.seconds() >= 0.04
    assert clock.seconds() <= time.monotonic() - began + 0.01


def test_a_reward_that_computes_for_ever_is_late_however_many_others_compute():
    stop = threading.Event()

    def never(reply):
        while not stop.is_set():
            pass
        return 0.0

    async def main():
        async with asyncio.TaskGroup() as tasks:
            for i in range(4):
                tasks.create_task(score_in_time(never, REPLY, i, 0.1))

    with pytest.raises(ExceptionGroup) as late:
        asyncio.run(main())
    stop.set()
    assert "took longer than 0.1 s" in str(late.value.exceptions[0])


def test_a_message_holds_a_bounded_part_of_a_task_of_megabytes():
    def raises(reply):
        raise KeyError("x" * 10**6)

    reply = Reply(text="5" * 10**6, finished=True, task={"tests": "y" * 10**6}, token_ids=[7])
    for reward in (raises, lambda reply: "z" * 10**6):
        with pytest.raises(RewardError) as error:
            score(reward, reply, 0)
        assert len(str(error.value)) < 2000
