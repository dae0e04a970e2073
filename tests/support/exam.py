"""One row of the doctor's exam: plant a fault in a running engine and learner, examine, undo, and judge the answer."""

import asyncio
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from live import Live, engine_config
from models import FAMILIES, make_model
from pair import Pair, examiner, make_learner
from planted import FAULTS
from planted_fault import Fault
from rl.config import Config, Lora, RolloutConfig, TrainerConfig
from trainer.doctor.check import ParityCheck
from trainer.model.forbidden import load_forbidden

Verdict = Literal["named", "wrong", "unexplained", "silent", "crash"]
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
PROMPTS: list[str | list[dict[str, str]]] = [
    [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{a} plus {7**a % 1000} is"}] for a in range(8)
]
ROLLOUT = RolloutConfig(max_tokens=32, max_model_len=320, max_num_seqs=64, kv_cache_gib=0.25)
MODELS = ("qwen2-untied", "qwen2-lora", "llama-tied", "Mistral, window", "Gemma-2")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-p": {"top_p": 0.9},
    "forbidden": {"min_tokens": 8, "bad_words": ("e", "to")},
}
"""Settings of rollout that a fault may need; the engine takes them with each request."""
SAME = {"float32": 1e-5, "bfloat16": 1e-3}
"""Numbers (nats) that differ by less are those of a run without the fault."""
LONGEST_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """How the doctor did with one fault."""

    fault: str
    side: str
    model: str
    dtype: str
    right: list[str]
    hurts: bool
    verdict: Verdict
    cause: str = ""
    where: str = ""
    text: str = ""
    seconds: float = 0.0
    k3: float = 0.0
    """Of engine and trainer, under the fault."""
    changed: list[str]
    """What the fault changed."""
    note: str = ""
    """A defect of the bed itself: the fault changed nothing, or could not be undone."""


class Bench:
    """Engines and learners by model and dtype, started when they are first needed and kept."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.pairs: dict[tuple[str, str], Pair] = {}
        self.opened: dict[int, Pair] = {}
        """The pair whose learner an engine listens to."""
        self.clean: dict[tuple[str, str, str], ParityCheck] = {}
        torch.set_num_threads(1)

    def model(self, name: str) -> Path:
        """The folder of "family-tying", or of a name of `models.FAMILIES`."""
        folder = Path(self.folder.name, name.replace("-lora", "-untied"))
        family, _, tying = folder.name.partition("-")
        how = FAMILIES.get(name, {"family": family, "tied": tying == "tied"})
        if not folder.exists():
            make_model(folder, chat_template=TEMPLATE, **how)
        return folder

    def pair(self, name: str, dtype: str) -> Pair:
        """The pair at T = 0.8; a model with adapters shares the engine of the one without."""
        if (name, dtype) not in self.pairs:
            adapters = name.endswith("-lora")
            lora = Lora(rank=4) if adapters else Lora()
            config = exam_config(self.model(name), dtype=dtype, trainer=TrainerConfig(lora=lora))
            engine = self.pair(name.replace("-lora", "-untied"), dtype).live if adapters else start(config)
            pair = Pair(config, engine, make_learner(config))
            pair.version = max(-1, engine.engine.version)
            if adapters:
                fill_adapters(pair)
            self.pairs[name, dtype] = self.opened[id(pair.live)] = pair
        pair = self.pairs[name, dtype]
        if self.opened[id(pair.live)] is not pair:
            # An engine listens to one channel, and another pair has opened one since.
            pair.send, pair.version = Pair(pair.config, pair.live, pair.learner).send, pair.live.engine.version
            self.opened[id(pair.live)] = pair
        return pair

    def drop(self, name: str, dtype: str) -> None:
        """End an engine that a fault has damaged, and all pairs that use it."""
        live = self.pairs[name, dtype].live
        live.close()
        self.pairs = {key: pair for key, pair in self.pairs.items() if pair.live is not live}
        self.clean = {key: check for key, check in self.clean.items() if key[:2] in self.pairs}

    def close(self) -> None:
        """End all engines."""
        for pair in self.pairs.values():
            pair.live.close()
        self.pairs, self.clean = {}, {}
        self.folder.cleanup()


def exam_config(model: Path, **changes: Any) -> Config:
    """The run that is examined."""
    return engine_config(model, **({"temperature": 0.8, "rollout": ROLLOUT} | changes))


def start(config: Config) -> Live:
    """An engine that faults can be planted in."""
    return Live(config, version=-1, load_format="dummy", worker_extension_cls="planted_worker.ExamExtension")


def fill_adapters(pair: Pair) -> None:
    """Adapters start at 0, which hides every mistake with them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in pair.learner.weights.adapted.values():
            layer.lora_B["default"].weight.normal_(std=0.05, generator=generator)


@contextmanager
def configured(pair: Pair, config: Config) -> Iterator[None]:
    """The same engine and learner with another config: settings of requests alone, which need no start."""
    parts: Any = pair.learner.parts
    engine, policy = pair.live.engine, pair.learner.parts.policy
    before, forbidden = pair.config, policy.forbidden

    def put(new: Config, banned: Any) -> None:
        pair.config = engine.config = pair.learner.config = new
        object.__setattr__(parts, "config", new)
        policy.forbidden = banned

    put(config, load_forbidden(config, config.model))
    try:
        yield
    finally:
        put(before, forbidden)


def setting(pair: Pair, name: str) -> Any:
    """One of `SETTINGS` on a pair."""
    wanted = SETTINGS[name]
    return configured(pair, replace(pair.config, rollout=replace(pair.config.rollout, **wanted)))


def examine(pair: Pair, prompts: list[Any] = PROMPTS, seed: int = 0) -> ParityCheck:
    """Publish the next version and examine, as at the start of a run."""
    pair.version += 1
    one = examiner(pair, prompts, seed=seed)

    async def in_time() -> ParityCheck:
        return await asyncio.wait_for(one.examine(pair.version), LONGEST_S)

    return asyncio.run(in_time())


def rows(faults: Iterable[Fault], dtypes: Iterable[str]) -> Iterator[tuple[Fault, str, str]]:
    """Every fault with every model and dtype in which it can be planted; those that share an engine are together."""
    listed = list(faults)
    for dtype in dtypes:
        for model in MODELS:
            for fault in listed:
                if model in fault.models and dtype in fault.dtypes:
                    yield fault, model, dtype


def run_row(bench: Bench, fault: Fault, model: str, dtype: str) -> Row:
    """Plant, examine, undo, and examine again."""
    pair, began = bench.pair(model, dtype), time.perf_counter()
    about: dict[str, Any] = {"fault": fault.name, "side": fault.side, "model": model, "dtype": dtype}
    about |= {"right": sorted(fault.causes), "hurts": fault.hurts_bf16 or dtype == "float32"}
    key = model, dtype, fault.setting
    with setting(pair, fault.setting):
        if key not in bench.clean:
            examine(pair)  # the first update replaces random weights
            bench.clean[key] = examine(pair)
            assert not bench.clean[key].findings, [str(f) for f in bench.clean[key].findings]
        clean, answer = bench.clean[key], {}
        try:
            with fault.prepare(pair) if fault.prepare else nullcontext():
                with fault.plant(pair):
                    check = examine(pair)
            answer = judged(fault, check) | {"changed": differences(check, clean, dtype)}
            note = "" if answer["changed"] else "the fault changed nothing"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
            answer, note = {"verdict": "crash", "text": text, "changed": ["crash"]}, ""
        seconds = time.perf_counter() - began
        note = note or left_over(bench, pair, key, clean)
    return Row(**about, **answer, seconds=round(seconds, 1), note=note)


def left_over(bench: Bench, pair: Pair, key: tuple[str, str, str], clean: ParityCheck) -> str:
    """What is still wrong after a fault; "" if nothing is. A pair that stays ill is replaced."""
    try:
        check = examine(pair)
        left = [str(f) for f in check.findings] or differences(check, clean, key[1])
    except Exception as error:
        left = [f"{type(error).__name__}: {str(error)[:200]}"]
    if left:
        bench.drop(key[0], key[1])
    return f"not undone: {left[0]}" if left else ""


def judged(fault: Fault, check: ParityCheck) -> dict[str, Any]:
    """The verdict on what the doctor found."""
    seen: dict[str, Any] = {"k3": check.evidence.samples[0].gap.k3}
    if not check.faults:
        return seen | {"verdict": "silent"}
    first = check.faults[0]
    right = first.cause in fault.causes and first.where.startswith(fault.where)
    # "trainer_body" is the trainer's own unexplained: the side, and no cause.
    general = first.cause == "unexplained" or (first.cause == "trainer_body" and "trainer" in fault.where)
    verdict = "named" if right else "unexplained" if general else "wrong"
    return seen | {"verdict": verdict, "cause": first.cause, "where": first.where, "text": str(first)}


def differences(check: ParityCheck, clean: ParityCheck, dtype: str) -> list[str]:
    """What differs between two examinations of one pair with one seed."""
    a, b = check.evidence, clean.evidence
    found = [n for n in ("engine_facts", "learner_facts", "driver_facts") if getattr(a, n) != getattr(b, n)]
    found += [
        f"digests {name}"
        for name in ("sent", "live", "received")
        if getattr(a.weights[0], name) != getattr(b.weights[0], name)
    ]
    if [len(w.layers) for w in a.weights] != [len(w.layers) for w in b.weights]:
        found.append("traced layers")
    elif any(x.error > 2 * y.error + 1e-5 for x, y in zip(a.weights[0].layers, b.weights[0].layers, strict=True)):
        found.append("layers")
    if a.weights[0].cached_after_update != b.weights[0].cached_after_update:
        found.append("cached tokens")
    for name in ("ended", "ended_without_stop_token", "nonfinite", "wrong_version", "forbidden"):
        if getattr(a.samples[0], name) != getattr(b.samples[0], name):
            found.append(name)
    one, other = check.batches[0], clean.batches[0]
    if one.input_ids.shape != other.input_ids.shape or not torch.equal(one.input_ids, other.input_ids):
        return [*found, "tokens"]
    pairs = {"numbers": (one.rollout_logprobs, other.rollout_logprobs), "trainer": (check.trainer[0], clean.trainer[0])}
    for name, (x, y) in pairs.items():
        if not float((x - y).abs().nan_to_num(1.0).max()) <= SAME[dtype]:
            found.append(name)
    return found


def faults_named(only: list[str]) -> list[Fault]:
    """The faults whose name contains one of these texts; all without a text."""
    return [fault for name, fault in FAULTS.items() if not only or any(text in name for text in only)]
