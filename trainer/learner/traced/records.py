"""The layers of an engine as `rollout/trace.py` recorded them, read back."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one module of an engine took in and gave out; rows are tokens."""

    name: str
    role: str
    """weights, head, attention or layer."""
    parts: list[str]
    inputs: list[Tensor]
    output: Tensor | None

    @cached_property
    def ids(self) -> Tensor | None:
        """Token ids of an embedding, or positions of a decoder layer; None where it takes none."""
        return next((x.flatten() for x in self.inputs if not x.is_floating_point() and x.dim() == 1), None)

    @cached_property
    def summands(self) -> list[Tensor]:
        """The inputs that are numbers, in fp32. Norms and decoder layers add the residual stream to the other one."""
        return [x.float() for x in self.inputs if x.is_floating_point()]

    @cached_property
    def given(self) -> Tensor:
        """The sum of these inputs, or else the ids."""
        return sum(self.summands[1:], start=self.summands[0]) if self.summands else self.inputs[0]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One worker's forward passes over a prompt and its reply."""

    prompt: list[int]
    reply: list[int]
    records: dict[str, Record]
    """By module name, in the order of their first calls."""

    def of(self, role: str) -> dict[str, Record]:
        """The records with one role."""
        return {name: record for name, record in self.records.items() if record.role == role}

    @cached_property
    def tokens(self) -> Tensor | None:
        """The token ids that the embedding got; None in a compiled forward pass."""
        embeddings = [r for r in self.of("weights").values() if r.ids is not None and not r.summands]
        return embeddings[0].ids if embeddings else None


def read(plain: dict[str, Any], body: str = "model") -> Trace:
    """The trace of one worker. `body` is the trainer's name of what engines call model."""

    def rename(name: str) -> str:
        return body + name.removeprefix("model") if name.startswith("model.") else name

    records = {
        rename(name): Record(
            name=rename(name),
            role=r["role"],
            parts=[rename(part) for part in r["parts"]],
            inputs=[_tensor(x) for x in r["in"]],
            output=None if r["out"] is None else _tensor(r["out"]),
        )
        for name, r in plain["layers"].items()
    }
    return Trace(prompt=plain["prompt"], reply=plain["reply"], records=records)


def layer_of(name: str) -> str:
    """The decoder layer that a module belongs to; "" outside of them."""
    found = re.match(r"(.*?\.\d+)(\.|$)", name)
    return found[1] if found else ""


def _tensor(plain: tuple[str, list[int], bytes]) -> Tensor:
    dtype, shape, data = plain
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)
