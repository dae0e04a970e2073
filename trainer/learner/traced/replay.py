"""What does an engine compute between its layers? The learner repeats the engine's pass, and takes over at each layer
what the engine had there, so that only the step in between can differ."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from rl.parity.body import fits
from rl.parity.body.attention import Attention, explain_attention
from rl.parity.body.rotary import explain_rotation
from rl.parity.evidence import Part, PartError
from rl.parity.guesses.guess import Hypothesis
from trainer.learner.traced.records import HEAD, Record, Trace, layer_of

NAME = "replayed"
"""Name of the recording attention in transformers."""
EXPLAINED = 2
"""So many errors of a kind are explained: those of later layers are of the same origin."""
UNKNOWN = ("s_aux", "position_bias")
"""Features of attention that are not recomputed here."""


def replay(model: Any, hf: Any, trace: Trace, limit: float) -> tuple[list[PartError], dict[str, int]]:
    """Errors between the layers in the order of the pass, and the place of each layer with weights.

    `model` runs the learner's policy around `hf`; errors above `limit` are explained. A collective over all ranks.
    Nothing is compared in a compiled forward pass, which does not show its tokens.
    """
    tokens = trace.tokens
    if tokens is None or not trace.of("layer"):
        return [], {}
    run = _Replay(hf, trace, limit, len(tokens))
    run.check_ids(tokens)
    device = next(hf.parameters()).device
    # The last column is a target only.
    ids = torch.cat([tokens, tokens[:1]])[None].clamp(max=hf.get_input_embeddings().num_embeddings - 1).to(device)
    AttentionInterface.register(NAME, run.attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    with ExitStack() as hooks:
        run.watch(hooks)
        model(ids, torch.ones(1, len(tokens), dtype=torch.bool, device=device), 1.0, plain=NAME)
    run.check_order()
    return sorted(run.found, key=lambda one: one.place), run.places


class _Replay:
    def __init__(self, hf: Any, trace: Trace, limit: float, size: int) -> None:
        self.trace, self.limit, self.size, self.prompt = trace, limit, size, len(trace.prompt)
        self.modules: dict[str, nn.Module] = dict(hf.named_modules())
        self.head = hf.get_output_embeddings()
        self.names = {module: name for name, module in self.modules.items()}
        self.attentions = {layer_of(name): record for name, record in trace.of("attention").items()}
        self.found: list[PartError] = []
        self.places: dict[str, int] = {}
        self.place = 0
        self.explained: dict[Part, int] = {}
        self.before: Tensor | None = None
        """The residual stream where it was seen last."""
        self.turns: dict[str, tuple[Tensor, Tensor]] = {}
        """cos and sin by decoder layer."""
        self.order: list[str] = []

    # -- what is compared exactly ----------------------------------------------------------------------------------

    def check_ids(self, tokens: Tensor) -> None:
        """The tokens and positions that the engine really used."""
        sent = self.trace.prompt + self.trace.reply[:-1]
        self._exactly("tokens", tokens.tolist(), sent, "prompt_tokens", "token")
        layers = [r for r in self.trace.of("layer").values() if r.ids is not None]
        if layers:
            got = layers[0].ids
            assert got is not None
            self._exactly("positions", got.tolist(), list(range(self.size)), "positions", "position")

    def check_order(self) -> None:
        """The decoder layers that the engine ran, in its order."""
        theirs = [name for name in self.attentions if name in self.modules]
        if theirs:
            self._exactly("layers", theirs, self.order, "layers", "layer")

    def _exactly(self, part: Part, got: list[Any], wanted: list[Any], cause: str, noun: str) -> None:
        if got == wanted:
            return
        at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
        there, here = ([*side[at : at + 1], "nothing"][0] for side in (got, wanted))
        text = f"{noun} {at} is {there}, not {here} ({len(got)} instead of {len(wanted)})"
        fit = Hypothesis(cause=cause, text=text, residual=0.0)
        self.found.append(PartError(name=noun, part=part, error=1.0, decode_error=1.0, fits=[fit], place=-1))

    # -- the pass --------------------------------------------------------------------------------------------------

    def watch(self, hooks: ExitStack) -> None:
        """Put the engine's values in place of ours, for every module that the engine recorded."""

        def add(handle: Any) -> None:
            hooks.callback(handle.remove)

        for record in self.trace.records.values():
            start = 0
            for part in record.parts:
                module: Any = self.head if record.role == "head" else self.modules.get(part)
                if module is None or record.role == "attention":
                    continue
                take_in, give_out = self._hooks(record, part, module, start)
                start += getattr(module, "out_features", 0)
                add(module.register_forward_pre_hook(take_in, with_kwargs=True))
                if record.role == "weights" and record.summands:
                    add(module.register_forward_hook(give_out))

    def _hooks(self, record: Record, part: str, module: nn.Module, start: int) -> tuple[Callable, Callable]:
        def take_in(_: nn.Module, args: Any, kwargs: Any) -> Any:
            self.place += 1
            self.places[HEAD if record.role == "head" else part] = self.place
            if record.role == "layer" and kwargs.get("position_embeddings") is not None:
                self.turns[part] = kwargs["position_embeddings"]
            if not record.summands:
                return None
            by_name = not args
            mine = kwargs.get("hidden_states") if by_name else args[0]
            theirs = None if mine is None else self._taken(record, part, module, mine)
            if theirs is None:
                return None
            return ((), kwargs | {"hidden_states": theirs}) if by_name else ((theirs, *args[1:]), kwargs)

        def give_out(_: nn.Module, args: Any, output: Any) -> Any:
            assert record.output is not None
            if not isinstance(output, Tensor):
                return None
            theirs = record.output.flatten(1)[:, start:]
            width = output.numel() // self.size
            if len(theirs) != self.size or theirs.shape[1] < width:
                return None
            return _like(output, theirs[:, :width])

        return take_in, give_out

    def _taken(self, record: Record, part: str, module: nn.Module, mine: Tensor) -> Tensor | None:
        """Compare what a module takes in. Returns the engine's values, or None where they cannot be compared."""
        rows = _rows(mine, self.size)
        theirs = record.given
        if record.role == "head":
            rows = rows[self.prompt - 1 :]
            if theirs.shape == rows.shape:
                self._compare(part, "input", theirs, rows, lambda: [*fits.outputs(theirs, rows)], prompt=1)
            return None
        if record.role == "layer" and len(record.summands) > 1:
            # Of a few families the second input is no summand: the first alone is the stream.
            theirs = min(theirs, record.summands[0], key=lambda x: fits.error(x.flatten(1), rows))
        theirs = theirs.flatten(1)
        if theirs.shape != rows.shape:
            return None
        owner = layer_of(part)
        is_stream = record.role == "layer" or "." not in part.removeprefix(owner + ".") or not owner
        if isinstance(module, nn.Linear) or not is_stream or hasattr(module, "base_layer"):
            self._compare(part, "input", theirs, rows, lambda: [*fits.outputs(theirs, rows)])
        elif self.before is None and record.role == "layer":
            self._compare(part, "embedding", theirs, rows, lambda: fits.stream(theirs, rows, None, record.summands))
            self.before = theirs
        else:
            before, summands = self.before, record.summands
            self._compare(part, "stream", theirs, rows, lambda: fits.stream(theirs, rows, before, summands))
            self.before = theirs
        return _like(mine, theirs)

    # -- attention -------------------------------------------------------------------------------------------------

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **asked: Any,
    ) -> tuple[Tensor, None]:
        """transformers' interface of attention. Compares both sides, and returns the engine's output."""
        layer = layer_of(self.names[module])
        self.order.append(layer)
        self.place += 1
        q, k, v = (x[0].float().cpu() for x in (query, key, value))
        mask = _allowed(attention_mask, self.size)
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        mine = Attention(q=q, k=k, v=v, mask=mask, scaling=scale, softcap=softcap, prompt=self.prompt)
        record = self.attentions.get(layer)
        known = record is not None and all(asked.get(name) is None for name in UNKNOWN)
        out = self._attended(layer, record, mine) if record and known else None
        out = mine.output() if out is None else out
        return out.reshape(1, self.size, len(q), -1).to(query), None

    def _attended(self, layer: str, record: Record, mine: Attention) -> Tensor | None:
        theirs = [_heads(x, len(y), self.size) for x, y in zip(record.summands, (mine.q, mine.k, mine.v), strict=False)]
        fitting = len(theirs) == 3 and all(
            x is not None and x.shape == y.shape for x, y in zip(theirs, (mine.q, mine.k, mine.v), strict=True)
        )
        if not fitting or record.output is None or len(record.output) != self.size:
            return None
        q, k, v = (x for x in theirs if x is not None)
        after, before = torch.cat([q, k]), torch.cat([mine.q, mine.k])
        turned, own, given, taken = (x.transpose(0, 1).flatten(1) for x in (after, before, v, mine.v))
        self._compare(record.name, "rotary", turned, own, lambda: self._turned(layer, after, before))
        self._compare(record.name, "input", given, taken, lambda: [*fits.outputs(given, taken)])
        asked = Attention(q=q, k=k, v=v, mask=mine.mask, scaling=mine.scaling, softcap=mine.softcap, prompt=self.prompt)
        out, wanted = record.output.float().flatten(1), asked.output()
        if out.shape != wanted.shape:
            return None

        def explain() -> list[Hypothesis]:
            others = [(name, *_cached(r, len(k), self.size)) for name, r in self.attentions.items() if name != layer]
            whole = [(name, ok, ov) for name, ok, ov in others if ok is not None and ov is not None]
            decode_only = fits.error(out[: self.prompt], wanted[: self.prompt]) <= self.limit
            return explain_attention(out, asked, others=whole, decode_only=decode_only)

        self._compare(record.name, "attention", out, wanted, explain)
        return out

    def _turned(self, layer: str, theirs: Tensor, mine: Tensor) -> list[Hypothesis]:
        if layer not in self.turns:
            return []
        cos, sin = (x[0].float().cpu() for x in self.turns[layer])
        return explain_rotation(theirs, mine, cos, sin, self.prompt)

    def _compare(
        self,
        name: str,
        part: Part,
        theirs: Tensor,
        mine: Tensor,
        explain: Callable[[], list[Hypothesis]],
        prompt: int | None = None,
    ) -> None:
        """Note an error at the tokens of the prompt and at those after it, with what explains it."""
        at = self.prompt if prompt is None else prompt
        before, after = (fits.error(theirs[s], mine[s]) for s in (slice(at), slice(at, None)))
        guesses: list[Hypothesis] = []
        if not max(before, after) <= self.limit and self.explained.get(part, 0) < EXPLAINED:
            self.explained[part] = self.explained.get(part, 0) + 1
            guesses = fits.best(explain(), max(before, after))
        self.found.append(
            PartError(name=name, part=part, error=before, decode_error=after, fits=guesses, place=self.place)
        )


def _rows(x: Tensor, size: int) -> Tensor:
    """[1, S, ...] or [1, H, S, D] as fp32 [S, ...]."""
    x = x.transpose(1, 2) if _is_turned(x, size) else x
    return x.detach().reshape(size, -1).float().cpu()


def _like(x: Tensor, rows: Tensor) -> Tensor:
    """Rows in the shape of `x`: the inverse of `_rows`."""
    if _is_turned(x, len(rows)):
        return rows.reshape(x.transpose(1, 2).shape).transpose(1, 2).to(x)
    return rows.reshape(x.shape).to(x)


def _is_turned(x: Tensor, size: int) -> bool:
    return x.dim() == 4 and x.shape[1] != size and x.shape[2] == size


def _allowed(mask: Tensor | None, size: int) -> Tensor:
    """True where a token attends, from the mask that a model made."""
    if mask is None:
        return torch.ones(size, size, dtype=torch.bool).tril()
    mask = mask[0, 0, :, :size].cpu()
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _heads(x: Tensor, heads: int, size: int) -> Tensor | None:
    """[S, H D] as [H, S, D]; None where the rows are not those of the sequence."""
    return x.reshape(size, heads, -1).transpose(0, 1) if len(x) == size and x[0].numel() % heads == 0 else None


def _cached(record: Record, heads: int, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values of one layer."""
    if len(record.summands) < 3:
        return None, None
    return _heads(record.summands[1], heads, size), _heads(record.summands[2], heads, size)
