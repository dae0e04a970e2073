"""Which faults does the exam of the doctor plant, and which names are right for each?"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import planted_body as body
import planted_engine as engine
import planted_loaded as loaded
import planted_numbers as numbers
import planted_sent as sent_by
import planted_trainer as trainer
from pair import Pair
from planted_engine import asks, reads, reports, tokenizer
from planted_fault import FAULTS as FAULTS
from planted_fault import Plant, add
from planted_worker import in_engine

FP32 = ("float32",)
DOWN = "model.layers.1.mlp.down_proj"
BOTH = ("qwen2-untied", "llama-tied")
TIED, LORA = ("llama-tied",), ("qwen2-lora",)

# -- sampler

ALPHABET = [*range(3, 60)]


def worker(fault: Callable, *args: object) -> Plant:
    return lambda p: in_engine(p.live, fault, *args)


add("sampler", "raw log-probabilities", "raw_logprobs", worker(engine.raw_mode), models=BOTH)
add("sampler", "temperature 0.9 in the settings", "temperature", reports(temperature=0.9), "engine trainer")
add("sampler", "temperature 0.9 in the requests", "temperature", asks(temperature=0.9))
add("sampler", "temperature applied twice", "temperature", worker(engine.temperature_applied, 2), models=BOTH)
add("sampler", "temperature not applied", "temperature", worker(engine.temperature_applied, 0))
add("sampler", "top-p in the settings", "truncation", reports(top_p=0.9), "engine trainer")
add("sampler", "top-p in the requests", "truncation", asks(top_p=0.9))
add("sampler", "top-k in the requests", "truncation", asks(top_k=10))
add("sampler", "min-p in the requests", "truncation", asks(min_p=0.1))
add("sampler", "top-k in the sampler", "truncation", worker(engine.sampler_truncates, 20, None))
add("sampler", "top-p lost in the requests", "truncation", asks(top_p=1.0), setting="top-p")
add("sampler", "presence penalty in the settings", "penalties", reports(presence_penalty=0.5))
add("sampler", "presence penalty", "penalties", asks(presence_penalty=0.5))
add("sampler", "frequency penalty", "penalties", asks(frequency_penalty=0.4))
add("sampler", "repetition penalty", "penalties", asks(repetition_penalty=1.2))
add("sampler", "bias on a token in the requests", "logit_bias", asks(logit_bias={20: 3.0}))
add("sampler", "bias on a token in the sampler", "logit_bias", worker(engine.sampler_shifts_logits, [20], 3.0))
add("sampler", "a token banned", "forbidden logit_bias", asks(bad_words=["e"]))
add("sampler", "the end banned at first", "forbidden", asks(min_tokens=8))
add("sampler", "allowed tokens only", "allowed_tokens", asks(allowed_token_ids=ALPHABET))
masks = worker(engine.sampler_shifts_logits, [*range(60, 90)], -1e9)
add("sampler", "a part of the vocabulary masked", "allowed_tokens forbidden", masks)
add("sampler", "min_tokens lost", "forbidden", asks(min_tokens=0, bad_words=[]), setting="forbidden")
add("sampler", "greedy requests", "greedy", asks(temperature=0.0))
add("sampler", "draws the likeliest", "greedy not_drawn", worker(engine.draws_the_likeliest))
add("sampler", "best of 4", "selected not_drawn", lambda p: engine.best_of(p.live, 4))
add("sampler", "longest of 4", "selected not_drawn", lambda p: engine.longest_of(p.live, 4))
add("sampler", "one seed for all", "seeds", lambda p: engine.one_seed(p.live))
add("sampler", "two seeds for a group", "seeds", lambda p: engine.one_seed(p.live, 2))
add("sampler", "EOS ignored", "ignored_eos stop_ids", asks(ignore_eos=True, stop_token_ids=[]))
add("sampler", "draws at another temperature", "not_drawn temperature", worker(engine.draws_otherwise, 1.3))
add("sampler", "draws with top-p", "not_drawn truncation", worker(engine.draws_cut, 0.8))
add("sampler", "logits rounded to bf16", "head_dtype rounded", worker(engine.softmax_in_bf16), hurts_bf16=False)

# -- numbers


def handed_on(change: numbers.Change) -> Plant:
    return lambda p: numbers.in_completions(p.live, change)


def decoded(p: Pair) -> AbstractContextManager:
    return numbers.in_completions(p.live, numbers.encoded_again(p.live.engine.llm.get_tokenizer()))


add("numbers", "log2", "unit", handed_on(numbers.LOG2), models=BOTH)
add("numbers", "log10", "unit", handed_on(numbers.LOG10))
add("numbers", "sign", "unit", handed_on(numbers.SIGN))
add("numbers", "probabilities", "unit", handed_on(numbers.PROBABILITIES))
add("numbers", "cumulated sums", "unit", handed_on(numbers.SUMS))
add("numbers", "cumulated means", "unit", handed_on(numbers.RUNNING_MEAN))
add("numbers", "the mean instead of each", "unit", handed_on(numbers.MEAN))
add("numbers", "rounded to 2 digits", "rounded", handed_on(numbers.TWO_DIGITS), hurts_bf16=False)
add("numbers", "rounded to bf16", "rounded", handed_on(numbers.BF16), hurts_bf16=False)
add("numbers", "clipped at -1", "unit rounded", handed_on(numbers.CLIPPED))
add("numbers", "the greedy token's number", "other_token", worker(engine.number_of_another, 0))
add("numbers", "the runner-up's number", "other_token", worker(engine.number_of_another, 1))
add("numbers", "first number missing", "missing_number", handed_on(numbers.FIRST_MISSING))
add("numbers", "last number missing", "missing_number", handed_on(numbers.LAST_MISSING))
add("numbers", "one token late", "shift", handed_on(numbers.LATE), models=BOTH)
add("numbers", "one token early", "shift", handed_on(numbers.EARLY))
add("numbers", "two tokens late", "shift", handed_on(numbers.LATE_BY_TWO))
add("numbers", "in reversed order", "swapped shift", handed_on(numbers.REVERSED))
add("numbers", "of another row", "swapped", lambda p: numbers.in_groups(p.live, numbers.numbers_rotated))
add("numbers", "of another prompt", "swapped", lambda p: numbers.between_prompts(p.live, numbers.take_numbers))
add("numbers", "replies of another prompt", "swapped", lambda p: numbers.between_prompts(p.live, numbers.take_replies))
add("numbers", "NaN", "nonfinite missing_number", handed_on(numbers.NAN_AT_FIRST))
add("numbers", "minus infinity", "nonfinite missing_number", handed_on(numbers.INFINITE))
add("numbers", "versions too high", "versions", handed_on(numbers.AHEAD))
add("numbers", "versions too low", "versions", handed_on(numbers.BEHIND))
add("numbers", "the end dropped", "eos", handed_on(numbers.without_its_end))
add("numbers", "finish_reason always stop", "finish_reason eos", handed_on(numbers.always_stop))
add("numbers", "finish_reason always length", "finish_reason", handed_on(numbers.always_length))
add("numbers", "replies cut after the fact", "finish_reason eos", handed_on(numbers.cut_by_three))
add("numbers", "tokens decoded and encoded again", "tokenizer eos shift swapped", decoded)

# -- prompts and tokenizer

SYSTEM, LETTER_L = len("[Add.]"), 24


def other_template(t: object) -> None:
    t.chat_template = "Be brief. " + t.chat_template  # type: ignore[attr-defined]


add("prompts", "BOS doubled", "prompt_tokens", reads(lambda ids: [1, *ids]), models=BOTH)
add("prompts", "cut on the left", "prompt_tokens", reads(lambda ids: ids[3:]))
add("prompts", "cut on the right", "prompt_tokens", reads(lambda ids: ids[:-1]))
add("prompts", "only its last 8 tokens", "prompt_tokens", reads(lambda ids: ids[-8:]))
replaced = reads(lambda ids: [2 if i == LETTER_L else i for i in ids])
add("prompts", "one token replaced by unknown", "prompt_tokens tokenizer", replaced)
add("prompts", "system prompt lost", "prompt_tokens template", reads(lambda ids: ids[SYSTEM:] or ids))
add("prompts", "chat template", "template", tokenizer(other_template), "engine driver")
add("prompts", "a token more", "tokenizer", tokenizer(lambda t: t.add_tokens(["<more>"])), "engine driver")
add("prompts", "stop ids", "stop_ids", lambda p: engine.with_stop_ids(p.live, [1, 20]), "engine driver")

# -- wire


def moved(bit: int) -> Plant:
    return lambda p: sent_by.perturbed(p, bit)


def sent(change: Callable, honest: bool = True) -> Plant:
    return lambda p: sent_by.sends(p, change, honest=honest)


def one(name: str, change: Callable) -> Callable:
    return lambda n, t: change(t) if n == name else t


W = "engine trainer"
Q, DOWN_W = "model.layers.1.self_attn.q_proj.weight", f"{DOWN}.weight"
add(
    "wire",
    "a tensor not synced",
    "tensor_not_synced tensor_loaded",
    worker(loaded.keeps_old, DOWN),
    W,
    prepare=moved(4),
)
scaled = worker(loaded.loads, "scaled", [DOWN_W])
add("wire", "a tensor scaled at load", "tensor_loaded scale", scaled, W, models=BOTH)
add("wire", "transposed at load", "tensor_loaded", worker(loaded.loads, "transposed", [Q]), W)
swapped = worker(loaded.loads, "swapped", ["layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight"])
add("wire", "two tensors swapped at load", "tensor_loaded", swapped, W)
add("wire", "rows of a tensor rolled at load", "tensor_loaded", worker(loaded.loads, "rows rolled", [DOWN_W]), W)
add(
    "wire",
    "one tensor quantised at load",
    "tensor_loaded quantization",
    worker(loaded.loads, "int8", [DOWN_W]),
    W,
    hurts_bf16=False,
)
add("wire", "all quantised at load", "quantization", worker(loaded.loads, "int8", ["proj.weight"]), W, hurts_bf16=False)
add("wire", "a tensor sent scaled", "tensor_differs scale", sent(one(DOWN_W, lambda t: t * 1.02)), W)
add("wire", "a tensor sent transposed", "tensor_differs", sent(one(Q, lambda t: t.t().contiguous())), W)
add("wire", "damaged on the way", "tensor_differs", sent(one(DOWN_W, lambda t: t.roll(1, 0)), honest=False), W)
bf16 = sent(lambda n, t: t.bfloat16().to(t.dtype))
add("wire", "all sent as bf16", "tensor_differs dtype quantization", bf16, W, dtypes=FP32)
add("wire", "stale by one step", "stale_weights", lambda p: sent_by.stale(p, 6), W, models=BOTH)
add("wire", "published before the step", "stale_weights", lambda p: sent_by.published_too_early(p, 6), W)
old_head = "head tensor_not_synced tensor_loaded"
add("wire", "stale head", old_head, worker(loaded.keeps_old_head), W, prepare=moved(2))
add("wire", "stale tied head", "tied_head head", worker(loaded.keeps_old_head), W, models=TIED, prepare=moved(2))
norm_bf16 = worker(loaded.loads, "bf16", ["norm.weight"])
add("wire", "norms loaded as bf16", "norm_dtype", norm_bf16, W, models=BOTH, dtypes=FP32, prepare=moved(10))
add(
    "wire",
    "no salt in the prefix cache",
    "stale_prefix",
    lambda p: engine.with_salt(p.live, "same"),
    W,
    prepare=moved(4),
)
for words, factor in {"twice": 2.0, "not at all": 0.0, "with another alpha": 1.5}.items():
    merged: Plant = lambda p, factor=factor: sent_by.adapters_merged(p, factor)  # noqa: E731
    add("wire", f"adapters merged {words}", "lora_scale", merged, W, models=LORA)

# -- the engine's body

A = "attention_{0}".format
add("body", "attention scale", A("scale"), worker(body.attention_differs, "scale", 1.4), models=BOTH)
add("body", "attention window", A("window"), worker(body.attention_differs, "sliding_window", 12))
add("body", "attention soft cap", A("cap"), worker(body.attention_differs, "logits_soft_cap", 1.0))
add("body", "attention not causal", A("mask"), worker(body.not_causal))
add("body", "query heads mixed up", "attention", worker(body.heads_mixed_up))
add("body", "KV cache in bf16", "kv_cache", worker(body.cache_rounds), dtypes=FP32)
add("body", "KV cache of another layer", "kv_cache", worker(body.cache_shared))
add("body", "KV cache keeps old values", "kv_cache", worker(body.cache_keeps_old))
add("body", "rope base", "rope config", worker(body.rope_differs, 0.1, 1.0), W, models=BOTH)
add("body", "rope scaled", "rope config", worker(body.rope_differs, 1.0, 1.5), W)
add("body", "positions one later in replies", "positions", worker(body.positions_differ, "later"))
add("body", "positions clamped", "positions rope", worker(body.positions_differ, "clamped"))
add("body", "eps of the norms", "eps config", worker(body.eps_differs, 1e-3), W, models=BOTH)
add("body", "residual in bf16", "residual", worker(body.residual_in_bf16), dtypes=FP32)
add("body", "norms in bf16", "norm_dtype", worker(body.norms_in_bf16), dtypes=FP32)
add("body", "embedding scaled", "embedding scale", worker(body.output_scaled, "embed_tokens", 1.1))
add("body", "attention output scaled", "scale attention", worker(body.output_scaled, "attn", 1.2))
add("body", "MLP output scaled", "scale", worker(body.output_scaled, "mlp", 1.2))
add("body", "a layer skipped", "config residual layers", worker(body.layer_skipped, 1), W)
add("body", "dropout in the engine", "mode", worker(body.dropout_on, 0.1))
add("body", "another activation", "config activation", worker(body.other_activation), W)
add(
    "body",
    "head in bf16",
    "head_dtype",
    worker(body.head_differs, "head_dtype", "bfloat16"),
    W,
    models=BOTH,
    hurts_bf16=False,
)
add("body", "logits scaled", "scale", worker(body.head_differs, "scale", 1.02))
add("body", "logits capped", "head config scale", worker(body.head_differs, "soft_cap", 5.0), W)
add("body", "head with a bias", "head logit_bias", worker(body.head_biased))
add("body", "hidden states scaled", "scale", worker(body.hidden_scaled, 1.03))

GEMMA, MISTRAL = ("Gemma-2",), ("Mistral, window",)
OWN = {"dtypes": FP32}
add("body", "another window", A("window") + " config", worker(body.window_differs, 8), W, models=MISTRAL, **OWN)
other_cap = worker(body.attention_differs, "logits_soft_cap", 0.5)
add("body", "another soft cap of attention", A("cap") + " config", other_cap, W, models=GEMMA, **OWN)
add(
    "body",
    "soft cap of logits lost",
    "head config scale",
    worker(body.head_differs, "soft_cap", None),
    W,
    models=GEMMA,
    **OWN,
)
unscaled = worker(body.embedding_scaled, 0.5)
add("body", "embedding multiplied by half", "embedding scale config", unscaled, W, models=GEMMA, **OWN)

# -- the trainer

T = "trainer"


def pack(change: Callable) -> Plant:
    return lambda p: trainer.packed_otherwise(change)


def attends(change: Callable) -> Plant:
    return lambda p: trainer.attends(change)


def asked(**changes: Callable) -> Plant:
    return lambda p: trainer.head_asked(p, **changes)


def changed(name: str, change: Callable) -> Plant:
    return lambda p: trainer.body_changed(p, name, change)


add("trainer", "its temperature", "temperature", lambda p: trainer.learner_config(p, temperature=0.9), W)
add("trainer", "temperature left out", "temperature", asked(temperature=lambda t: 1.0), T, models=BOTH)
add("trainer", "truncation left out", "truncation", asked(truncation=lambda t: None), T, setting="top-p")
add("trainer", "head computes in bf16", "head_dtype", lambda p: trainer.head_computes_in_bf16(p), T, hurts_bf16=False)
rounded = lambda p: trainer.logits_changed(p, trainer.softmax_in_bf16)  # noqa: E731
add("trainer", "log-softmax in bf16", "head_dtype rounded", rounded, T, hurts_bf16=False)
column = lambda p: trainer.logits_changed(p, trainer.with_empty_column)  # noqa: E731
add("trainer", "a column of padding in the softmax", "padding trainer_body", column, T, hurts_bf16=False)
scaled_hidden = lambda p: trainer.hidden_changed(p, lambda h: h * 1.1)  # noqa: E731
add("trainer", "hidden states scaled in the trainer", "scale", scaled_hidden, T, models=BOTH)
add("trainer", "dropout in the trainer", "mode", lambda p: trainer.dropout_on(p, 0.1), T, models=BOTH)
add("trainer", "packs leak", "packing", attends(trainer.leaking), T, models=BOTH)
add("trainer", "shared prompt read late", "packing", attends(trainer.prompt_late), T)
add("trainer", "tree mask", "packing", lambda p: trainer.tree_mask_wrong(), T)
add("trainer", "padding attended", "padding packing trainer_body", attends(trainer.padding_counted), T)
left = lambda p: trainer.padded_on_the_left(p)  # noqa: E731
add("trainer", "padding on the left", "padding", left, T, models=GEMMA, **OWN)
add("trainer", "columns read one late", "packing shift", pack(trainer.prompts_last_column_late), T)
add("trainer", "positions one later after the prompt", "positions", pack(trainer.LATER), T)
add("trainer", "positions restart after the prompt", "positions", pack(trainer.RESTARTING), T, models=BOTH)
add("trainer", "targets shifted", "shift", lambda p: trainer.targets_shifted(p), T)
add("trainer", "its attention scale", "attention_scale attention trainer_body", attends(trainer.another_scale), T)
add("trainer", "rope base in the trainer", "rope config", changed("inv_freq", lambda f: f * 1.3), W)
add("trainer", "eps in the trainer", "eps config", changed("variance_epsilon", lambda e: 1e-4), W)
add("trainer", "autocast in the trainer", "dtype trainer_body", lambda p: trainer.body_in_bf16(p), W, dtypes=FP32)
left_in = asked(forbidden=lambda ids: None)
add("trainer", "forbidden tokens left in", "forbidden", left_in, T, setting="forbidden")
alpha = lambda p: sent_by.adapters_scaled(p, 2.0)  # noqa: E731
add("trainer", "another alpha in the trainer", "lora_scale", alpha, W, models=LORA)

# -- written by examiners who did not know the doctor

import planted_blind  # noqa: E402, F401  # pyright: ignore[reportUnusedImport]
import planted_blind2  # noqa: E402, F401  # pyright: ignore[reportUnusedImport]
