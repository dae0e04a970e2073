"""Which flags does a recipe have, and what did the user mean by one that it has not?"""

import ast
import collections.abc
import difflib
import inspect
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from typing import Any

import tyro

from rl.config import Config
from rl.typed import hints_of

SYNONYMS = {
    "trainer.lr": "learning-rate actor-lr policy-lr peak-lr",
    "trainer.value-lr": "critic-lr value-learning-rate",
    "trainer.warmup-steps": "warmup num-warmup-steps lr-warmup-steps",
    "trainer.max-grad-norm": "grad-clip clip-grad gradient-clipping max-norm",
    "trainer.minibatches": "num-minibatches mini-batch-size minibatch-size ppo-mini-batch-size",
    "trainer.micro-batch-tokens": "micro-batch-size per-device-train-batch-size gradient-accumulation-steps batch-size",
    "trainer.epochs": "num-train-epochs ppo-epochs num-epochs",
    "trainer.ranks": "gpus num-gpus n-gpus world-size nproc-per-node",
    "trainer.lora.rank": "lora-r lora-rank",
    "rollout.engines": "gpus num-gpus num-engines vllm-num-engines",
    "rollout.tensor-parallel": "tp tp-size tensor-parallel-size tensor-model-parallel-size",
    "rollout.max-tokens": "max-new-tokens max-completion-length max-response-length response-length max-length",
    "rollout.min-tokens": "min-new-tokens min-completion-length min-length min-response-length",
    "rollout.stop": "stop-strings stop-sequences stop-words stop-str",
    "rollout.stop-token-ids": "stop-ids stop-tokens eos-token-id eos-token-ids",
    "rollout.bad-words": "bad-words-ids bad-token-ids banned-words",
    "rollout.max-model-len": "max-seq-len max-seq-length max-sequence-length context-length max-prompt-length",
    "prompts-per-step": "batch-size train-batch-size rollout-batch-size num-prompts",
    "mask-truncated": "mask-truncated-completions overlong-filter overlong-filtering mask-overlong",
    "group-size": "batch-size n num-generations n-samples num-samples samples-per-prompt num-return-sequences",
    "steps": "max-steps num-steps total-steps training-steps iterations epochs num-train-epochs num-epochs",
    "max-staleness": "off-policy-steps max-off-policy async-level staleness",
    "objective.kl-coef": "beta kl kl-beta kl-loss-coef kl-coefficient init-kl-coef",
    "objective.clip-low": "epsilon eps clip-range cliprange clip-ratio eps-clip clip-eps clip",
    "objective.clip-high": "epsilon eps clip-range cliprange clip-ratio eps-clip epsilon-high clip-ratio-high clip",
    "objective.entropy-coef": "entropy entropy-coeff entropy-bonus ent-coef",
    "dtype": "bf16 fp16 fp32 precision torch-dtype",
    "save-every": "save-steps save-freq save-interval checkpoint-interval checkpoint-every",
    "eval-every": "eval-steps eval-freq eval-interval test-freq",
    "output-dir": "output out out-dir save-dir log-dir",
    "name": "run-name experiment-name wandb-name",
    "model": "model-path model-name model-name-or-path pretrain",
    "tracking.project": "wandb-project project-name",
    "tracking.to": "report-to logger loggers log-with tracker trackers",
    "tracking.wandb": "use-wandb",
    "tracking.entity": "wandb-entity workspace",
    "tracking.upload-samples": "log-completions log-samples",
    "resume": "resume-from resume-from-checkpoint checkpoint load",
}
"""What other libraries call a flag of ours."""
REFUSED = {
    "repetition-penalty frequency-penalty presence-penalty no-repeat-ngram-size length-penalty": "a penalty changes "
    "every probability by what was sampled before, and the trainer does not repeat that: its log-probabilities would "
    "be those of another policy. Give the reward a part that counts repetitions, or forbid words (--rollout.bad-words)",
    "logit-bias allowed-token-ids guided-json guided-regex guided-choice structured-outputs logits-processors": "it "
    "changes the distribution that is sampled from, and the trainer does not repeat that: its log-probabilities would "
    "be those of another policy. To forbid tokens use --rollout.bad-words or --rollout.min-tokens",
    "ignore-eos": "set --rollout.min-tokens to the value of rollout.max_tokens: the trainer then forbids the stop "
    "tokens too",
}
"""What vLLM can do and a run cannot, by its names there, with the reason (docs/sampling.md)."""
OPTIONS = {
    "dry-run": "Print settings, placement and memory. Start nothing.",
    "resume": "Continue the run in FOLDER from its last checkpoint, with the flags that started it. Flags given now "
    "replace them.",
    "config": "Take settings from FILE: the config.json of a run, or YAML of the same form. Code (data, reward, "
    "filters) comes from the recipe. Flags replace what the file holds.",
    "help": "Show this text.",
}
"""Flags that are no setting of the run."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One setting on the command line."""

    name: str
    """As it is typed, without the dashes in front: `trainer.micro-batch-tokens`."""
    hint: Any
    """Its declared type."""
    default: Any
    help: str
    """Its docstring in one line; "" when it has none."""

    @property
    def spellings(self) -> tuple[str, ...]:
        """All names that turn it on or off."""
        if self.hint is not bool:
            return (self.name,)
        prefix, dot, last = self.name.rpartition(".")
        return self.name, f"{prefix}{dot}no-{last}"


def flags_of(owner: Any, prefix: str = "") -> list[Flag]:
    """The flags of a config, or of one part of it, in the order of its fields."""
    return list(_walk(owner, prefix))


def _walk(owner: Any, prefix: str) -> Iterator[Flag]:
    docs = docs_of(type(owner))
    for field, hint in hints_of(type(owner)).items():
        value, name = getattr(owner, field), prefix + field.replace("_", "-")
        if is_code(hint):
            continue
        if is_dataclass(value):
            yield from _walk(value, f"{name}.")
        else:
            yield Flag(name=name, hint=hint, default=value, help=docs.get(field, ""))


def is_code(hint: Any) -> bool:
    """Whether a field holds functions, or what holds functions, which a command line or a file cannot name."""
    inside = hints_of(hint).values() if isinstance(hint, type) and is_dataclass(hint) else typing.get_args(hint)
    return typing.get_origin(hint) is collections.abc.Callable or any(map(is_code, inside))


@cache
def docs_of(cls: type) -> dict[str, str]:
    """Docstring by field, each in one line; a field that is declared again without one keeps the inherited."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue  # a class that was typed into an interpreter
        body = ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def override(config: Config, arguments: Sequence[str]) -> Config:
    """The config with the flags applied. Raises ValueError for a flag that does not exist."""
    check_names(config, arguments)
    # Without the judges: it would make new objects, and rewards await those of the recipe.
    given = tyro.cli(Config, default=replace(config, judges=()), args=list(arguments), add_help=False)
    return replace(given, judges=config.judges)


def check_names(config: Config, arguments: Sequence[str]) -> None:
    """Raise ValueError, with the flags that may have been meant, for one that does not exist."""
    flags = flags_of(config)
    known = {spelling for flag in flags for spelling in flag.spellings}
    switches = {spelling: flag.spellings for flag in flags if flag.hint is bool for spelling in flag.spellings}
    switch = ""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("_", "-")
        is_flag = argument.startswith("--")
        if (switch in switches and not is_flag) or (is_flag and "=" in argument and name in switches):
            on, off = switches[switch if switch in switches else name]
            raise ValueError(f"{argument}: a switch has no value: --{on} turns it on, --{off} off")
        switch = name if is_flag else ""
        if not is_flag or name in known:
            continue
        raise ValueError(f"there is no flag --{name}. {_remedy(config, name, [flag.name for flag in flags])}")


def _remedy(config: Config, name: str, known: list[str]) -> str:
    field = name.replace("-", "_")
    if field in hints_of(Config):
        more = [flag for flag in known if flag.startswith(f"{name}.")]
        numbers = f"; its numbers are flags, such as --{more[0]}" if more else ""
        return f"{field} is code or a group of settings: set it in the recipe, as {field}=...{numbers}"
    if reason := refused(name):
        return reason
    if near := [each for each in suggestions(name, known) if each != name]:
        return f"Did you mean {' or '.join(f'--{each}' for each in near)}? --help lists all flags"
    return "--help lists all flags"


def refused(name: str) -> str | None:
    """Why a run has no setting of this name, which vLLM has."""
    last = name.rpartition(".")[2].replace("_", "-")
    return next((reason for names, reason in REFUSED.items() if last in names.split()), None)


def suggestions(name: str, known: Sequence[str]) -> list[str]:
    """Up to three flags that may have been meant: by another library's name, the last part, or the spelling."""
    every, last = [*known, *OPTIONS], name.rpartition(".")[2]
    meant = [flag for flag, others in SYNONYMS.items() if last in others.split() and flag in every]
    if not meant:
        meant = [flag for flag in every if flag.rpartition(".")[2] == last]
    if not meant:
        lasts = {flag.rpartition(".")[2]: flag for flag in reversed(every)}
        for cutoff in (0.88, 0.7):
            near = difflib.get_close_matches(name, every, cutoff=cutoff)
            meant = meant or [*near, *(lasts[each] for each in difflib.get_close_matches(last, lasts, cutoff=cutoff))]
    return list(dict.fromkeys(meant))[:3]
