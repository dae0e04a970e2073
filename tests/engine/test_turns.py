"""Turn by turn: the trainer has the engine's log-probabilities, with updates between turns and inside them.

Every token is compared with the trainer's weights of the version that sampled it. Without `recompute_kv` the tokens
after an update inside a turn are left out: they stand on keys and values of the old weights, which no forward pass of
one version has. tests/engine/test_update.py compares such tokens with a trainer that keeps the old ones too.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from cases import nightly_unless
from episodes import InlineHost, stage
from live import Live, engine_config
from models import CHAT
from pair import Pair, make_learner
from rl.batch import collate
from rl.config import RolloutConfig, TrainerConfig
from rl.environments.play import play
from rl.environments.template import chat_of
from rl.environments.types import Limits, Step
from rl.loop.stream import turn_seed
from rl.objectives import GRPO
from rl.tokens import Rendering, encode
from rl.types import Completion, Prompt, Trajectory
from trainer.prompts import load_tokenizer
from versions import Versions

TURNS, EPISODES, TOKENS = 4, 16, 150
STOPS = (20, 40, 60)
"""Next to EOS: with four of some hundred tokens a turn has about 25, and few reach their limit."""
TOLERANCE = 1e-5
"""Mean |trainer - engine| in nats of each turn, fp32."""
ASKED = [{"role": "user", "content": "Say something that is longer than one block of the cache, and then go on."}]


@pytest.fixture(scope="module")
def versions(live: Callable, tiny: Callable) -> Callable[[str], Versions]:
    """An engine and a learner for each model, which go on from test to test."""

    @cache
    def make(tying: str) -> Versions:
        family = {"untied": "qwen2", "tied": "llama"}[tying]
        model = tiny(family=family, tied=tying == "tied", peak=3.0, max_position_embeddings=1024, chat_template=CHAT)
        rollout = RolloutConfig(
            max_tokens=TOKENS, max_model_len=1000, max_num_seqs=32, kv_cache_gib=0.25, stop_token_ids=STOPS
        )
        trainer = TrainerConfig(lr=3e-4, zero_stage=0, minibatches=1)
        config = engine_config(model, rollout=rollout, trainer=trainer, objective=GRPO(), old_logprobs="recompute")
        engine = live(config, version=-1, load_format="dummy")
        return Versions(Pair(config, engine, make_learner(config)))

    return make


@dataclass
class Rollouts:
    """The engine, for episodes; keeps how many tokens of each turn's context were cached."""

    live: Live
    seed: int
    cached: list[list[int]] = field(default_factory=lambda: [[] for _ in range(TURNS)])
    turn_of: dict[int | None, int] = field(default_factory=dict)
    """By the seed of a request."""
    prompt: int = 0
    """Tokens of the prompt, which all episodes share."""

    def seed_of(self, member: int, turn: int) -> int:
        seed = turn_seed(self.seed, 0, member, turn)
        self.turn_of[seed] = turn
        return seed

    async def sample(
        self,
        token_ids: list[int],
        n: int,
        *,
        seed: int | None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        engine: int | None = None,
        tools: Any = None,
    ) -> list[Completion]:
        asked = self.live.engine.sample(token_ids, n, seed, temperature, max_tokens)
        found = await asyncio.wrap_future(self.live.submit(asked))
        self.cached[self.turn_of[seed]] += [c.cached_prompt_tokens for c in found]
        return found


@dataclass
class Meeting:
    """Episodes that wait for each other after each turn. When all that still play have come, something is done once."""

    playing: int
    act: Callable[[int], None]
    """Gets the turn that all have taken."""
    turn: int = 0
    waiting: list[asyncio.Future[None]] = field(default_factory=list)

    async def come(self) -> None:
        self.waiting.append(asyncio.get_running_loop().create_future())
        mine = self.waiting[-1]
        await self._go_on()
        await mine

    async def leave(self) -> None:
        self.playing -= 1
        await self._go_on()

    async def _go_on(self) -> None:
        if not self.playing or len(self.waiting) < self.playing:
            return
        waiting, self.waiting = self.waiting, []
        await asyncio.to_thread(self.act, self.turn)
        self.turn += 1
        for each in waiting:
            each.set_result(None)


class Talks:
    """Answers each turn but the last, when its task lets it."""

    def __init__(self, task: Any) -> None:
        self.task, self.turns = task, 0

    async def reply(self, turn: Any) -> Step | None:
        self.turns += 1
        if self.turns == TURNS:
            return None
        await self.task["come"]()
        return Step(observation=f"That was {self.turns}. Go on, and say more than that, please.")

    def reward(self, episode: Any) -> float:
        return 0.0

    async def close(self) -> None:
        await self.task["leave"]()


async def played(versions: Versions, rollouts: Rollouts, come: Callable, leave: Callable) -> list[Trajectory]:
    """The rows of episodes that are played at once."""
    config = versions.pair.config
    tokenizer = load_tokenizer(config.model)
    scene = stage(
        rollouts,
        InlineHost(Talks),
        limits=Limits(turns=TURNS, tool_s=300.0),
        max_tokens=TOKENS,
        max_model_len=config.rollout.max_model_len,
    )
    scene = replace(
        scene, chat=chat_of(tokenizer, Rendering(), [tokenizer.eos_token_id, *STOPS]), decode=tokenizer.decode
    )
    ids = encode(tokenizer, ASKED, Rendering())
    rollouts.prompt = len(ids)
    prompt = Prompt(ordinal=0, token_ids=ids, task={"come": come, "leave": leave}, given=ASKED)
    playing = (play(scene, prompt, member, partial(rollouts.seed_of, member)) for member in range(EPISODES))
    rows = await asyncio.gather(*playing)
    return [row for of in rows for row in of]


async def at_once() -> None:
    pass


def with_updates_between(versions: Versions, seed: int) -> tuple[list[Trajectory], Rollouts]:
    """An update after the first and after the third turn of all episodes; none after the second."""
    rollouts = Rollouts(versions.pair.live, seed)
    meeting = Meeting(EPISODES, lambda turn: None if turn == 1 else versions.learn())
    rows = asyncio.run(played(versions, rollouts, meeting.come, meeting.leave))
    return rows, rollouts


def with_updates_inside(versions: Versions, seed: int) -> tuple[list[Trajectory], Rollouts]:
    """One update after the other, as long as episodes are played."""
    rollouts = Rollouts(versions.pair.live, seed)

    async def main() -> list[Trajectory]:
        playing = asyncio.create_task(played(versions, rollouts, at_once, at_once))
        while not playing.done():
            await asyncio.to_thread(versions.learn)
        return await playing

    return asyncio.run(main()), rollouts


@dataclass(frozen=True)
class Gaps:
    """|trainer - engine| of the tokens of episodes."""

    of: torch.Tensor
    """[B, T] in nats."""
    turns: torch.Tensor
    begun: torch.Tensor
    """[B, T]: the version with which the token's turn began."""
    versions: torch.Tensor

    @classmethod
    def measured(cls, versions: Versions, rows: list[Trajectory]) -> "Gaps":
        batch = collate(rows)
        assert batch.turns is not None
        begun = batch.versions.clone()
        for row in range(len(begun)):
            for turn in range(TURNS):
                here = batch.turns[row] == turn
                if here.any():
                    begun[row, here] = batch.versions[row, here][0]
        return cls((versions.logprobs(batch) - batch.rollout_logprobs).abs(), batch.turns, begun, batch.versions)

    @property
    def own(self) -> torch.Tensor:
        """Tokens that stand on keys and values of their own version."""
        return (self.turns >= 0) & (self.versions == self.begun)

    @property
    def after(self) -> torch.Tensor:
        """Tokens after an update inside their turn."""
        return (self.turns >= 0) & (self.versions != self.begun)

    def of_turns(self, tokens: torch.Tensor) -> list[float]:
        """The mean of each turn over these tokens; NaN without any."""
        return [float(self.of[tokens & (self.turns == turn)].mean()) for turn in range(TURNS)]


def show(case: str, gaps: Gaps, tokens: torch.Tensor) -> list[float]:
    """Print what was measured (pytest -s), and return it."""
    found = gaps.of_turns(tokens)
    counts = [int((tokens & (gaps.turns == turn)).sum()) for turn in range(TURNS)]
    print(f"\n{case}:", *(f"turn {t}: {found[t]:.1e} of {counts[t]} tokens" for t in range(TURNS)), sep="  ")
    return found


BOTH = nightly_unless(lambda tying: tying == "untied", ["untied", "tied"])


@pytest.mark.parametrize("tying", BOTH)
def test_with_updates_between_turns_each_turn_agrees_from_the_first_token_to_the_last(
    versions: Callable[[str], Versions], tying: str
) -> None:
    one = versions(tying)
    start = one.now
    rows, rollouts = with_updates_between(one, seed=1)
    gaps = Gaps.measured(one, rows)
    assert not gaps.after.any(), "an update came inside a turn"
    for turn, version in enumerate([start, start + 1, start + 1, start + 2]):
        assert set(gaps.versions[gaps.turns == turn].tolist()) == {version}
    # After an update the history is computed anew; without one it comes from the cache. The prompt may be cached by the
    # first episode that comes after the update.
    assert max(rollouts.cached[1] + rollouts.cached[3]) <= rollouts.prompt
    assert max(rollouts.cached[2]) > rollouts.prompt
    assert max(show(f"{tying}, updates between turns", gaps, gaps.own)) <= TOLERANCE
    assert one.now == start + 2


@pytest.mark.parametrize("tying", BOTH)
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_with_updates_inside_turns_each_turn_agrees_on_all_that_stands_on_its_own_version(
    versions: Callable[[str], Versions], tying: str, recompute: bool
) -> None:
    one = versions(tying)
    config = one.pair.live.engine.config
    # The engine looks at this setting when an update comes.
    one.pair.live.engine.config = replace(config, rollout=replace(config.rollout, recompute_kv=recompute))
    rows, _ = with_updates_inside(one, seed=2)
    one.pair.live.engine.config = config
    gaps = Gaps.measured(one, rows)
    assert all((gaps.after & (gaps.turns == turn)).any() for turn in range(TURNS)), "no update inside of some turn"
    case = f"{tying}, updates inside turns{', recompute_kv' if recompute else ''}"
    assert max(show(case, gaps, gaps.own)) <= TOLERANCE
    after = show(f"{case}, after an update inside a turn", gaps, gaps.after)
    if recompute:
        assert max(after) <= TOLERANCE
    else:
        # What is left out is what differs.
        assert min(after) > 10 * TOLERANCE
    assert one.pair.live.wait(one.pair.live.engine.counters())["aborted"] == 0


def test_a_history_that_is_served_from_the_old_weights_cache_is_seen_in_every_turn_but_the_first(
    versions: Callable[[str], Versions], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = versions("untied")
    llm = one.pair.live.engine.llm
    generate = llm.generate

    def without_version(prompt: Any, *rest: Any, **more: Any) -> Any:
        return generate({**prompt, "cache_salt": "of all versions"}, *rest, **more)

    monkeypatch.setattr(llm, "generate", without_version)
    rows, rollouts = with_updates_between(one, seed=3)
    assert max(rollouts.cached[1]) > rollouts.prompt
    gaps = Gaps.measured(one, rows)
    first, *others = show("one cache for all versions", gaps, gaps.own)
    assert first <= TOLERANCE
    assert min(others) > 10 * TOLERANCE
