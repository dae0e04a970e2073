"""What is the first thing along an engine's depth that computes other values, and which cause fits it?"""

from collections import Counter

from rl.parity.body.fits import LAYER_ERROR, differs, explains
from rl.parity.evidence import Evidence, LayerError, PartError, WeightEvidence
from rl.parity.guesses.guess import Hypothesis

WHAT = {
    "embedding": "the embeddings that go into {name!r} differ",
    "stream": "the residual stream that goes into {name!r} differs",
    "rotary": "queries and keys that go into {name!r} differ after the rotary embedding",
    "attention": "the output of {name!r} differs from attention over its own queries, keys and values",
    "input": "all layers before {name!r} agree, and what goes into it differs",
}
GENERAL = {
    "embedding": "embedding",
    "stream": "residual",
    "rotary": "rope",
    "tokens": "prompt_tokens",
    "positions": "positions",
    "layers": "layers",
}


def body(w: WeightEvidence, e: Evidence) -> tuple[str, str] | None:
    """The cause and its evidence, or None where everything agrees. Every part was compared on the engine's own input,
    so what comes after the first wrong part is not wrong because of it."""
    fp32_head = e.learner_facts["head_dtype"] == "float32"
    layers = [layer for layer in w.layers if differs(layer, e.dtype, fp32_head=fp32_head)]
    parts = [part for part in w.between if not size(part) <= LAYER_ERROR[e.dtype]]
    wrong: list[LayerError | PartError] = [*parts, *layers]
    if not wrong:
        return None
    first = min(wrong, key=lambda one: one.place)
    at_head = isinstance(first, LayerError) and first.kind == "head" and fp32_head
    limit = LAYER_ERROR["float32" if at_head else e.dtype]
    error = size(first)
    fitting = [guess for guess in first.fits if explains(guess, error, limit)]
    if isinstance(first, PartError) and first.part in ("tokens", "positions", "layers"):
        return first.fits[0].cause, f"in the engine's own forward pass, {first.fits[0].text}"
    text = f"{_what(first)} by {error:.1e} of its size (limit {limit:g}); {_fits(first.fits, fitting, error)}"
    alike = _alike(first, wrong, w)
    if fitting:
        at_start = isinstance(first, PartError) and first.part == "embedding"
        return ("embedding" if at_start else fitting[0].cause), text + alike
    cause = _general(first, layers, w, e)
    if cause == "unexplained":
        alike += (
            ", although every tensor arrived bit for bit: look for old weights in a packed copy or a captured graph, "
            "and for other arithmetic, such as quantised kernels"
        )
    return cause, text + alike


def size(one: LayerError | PartError) -> float:
    """The larger error of prompt and decode; NaN counts as largest."""
    if isinstance(one, LayerError):
        return one.error
    return max(one.error, one.decode_error, key=lambda x: (x != x, x))


def _what(first: LayerError | PartError) -> str:
    if isinstance(first, LayerError):
        if first.kind == "head":
            return "every layer agrees but the lm_head: on equal input, its output differs"
        return f"on equal input, the output of {first.name!r} differs"
    text = WHAT[first.part].format(name=first.name)
    if first.error < 0.01 * first.decode_error:
        return f"in the prompt all agrees, in decode {text}"
    return text


def _fits(guesses: list[Hypothesis], fitting: list[Hypothesis], error: float) -> str:
    if fitting:
        first, *rest = fitting
        also = [guess for guess in rest if guess.cause != first.cause and guess.residual <= 2 * first.residual + 1e-6]
        text = f"{first.text}, which leaves {first.residual:.1e}"
        return text + "".join(f"; as well as: {guess.text}" for guess in also[:1])
    if guesses and error == error:
        return (
            f"no simple change explains it; closest: {guesses[0].text}, which leaves {guesses[0].residual / error:.0%}"
        )
    return "nothing simple explains it"


def _alike(first: LayerError | PartError, wrong: list[LayerError | PartError], w: WeightEvidence) -> str:
    """In how many places the same kind of thing differs."""
    if isinstance(first, LayerError):
        count, all_of_them, noun = sum(isinstance(x, LayerError) for x in wrong), len(w.layers), "layers"
    else:
        same = [x for x in w.between if x.part == first.part]
        count, all_of_them, noun = sum(x in wrong for x in same), len(same), "places"
    return f"; {count} of {all_of_them} {noun} differ" if count > 1 else ""


def _general(first: LayerError | PartError, layers: list[LayerError], w: WeightEvidence, e: Evidence) -> str:
    """The cause of an error that no guess explains."""
    if isinstance(first, LayerError):
        if first.kind == "head":
            return "tied_head" if e.learner_facts["tied"] else "head"
        matrices = sum(layer.kind != "norm" for layer in layers)
        if not matrices and len(layers) > 1:
            return "norm"
        if matrices > 0.5 * sum(layer.kind != "norm" for layer in w.layers):
            # Old weights, or other arithmetic: a product cannot tell them apart, and an embedding is no arithmetic.
            return "stale_weights" if any(layer.kind == "embedding" for layer in layers) else "unexplained"
        return "tensor_loaded" if w.received else "tensor_not_synced"
    if first.part == "attention":
        return "kv_cache" if first.error < 0.01 * first.decode_error else "attention"
    if first.part == "input":
        names = {"attn", "attention", "self_attn"} & set(first.name.split("."))
        return "head" if first.name == "lm_head" else "attention" if names else "activation"
    return GENERAL[first.part]


def shared_fit(w: WeightEvidence, e: Evidence) -> tuple[str, str] | None:
    """The cause that fits most layers that differ, with the text of the first; None if there is none."""
    fp32_head = e.learner_facts["head_dtype"] == "float32"
    wrong = [layer for layer in w.layers if differs(layer, e.dtype, fp32_head=fp32_head)]
    # Only the first layers that differ were tried.
    fits = [
        {g.cause: g.text for g in reversed(layer.fits) if explains(g, layer.error, LAYER_ERROR[e.dtype])}
        for layer in wrong
        if layer.fits
    ]
    counts = Counter(cause for one in fits for cause in one)
    cause, count = counts.most_common(1)[0] if counts else ("", 0)
    if count <= len(fits) / 2:
        return None
    return cause, next(one[cause] for one in fits if cause in one)
