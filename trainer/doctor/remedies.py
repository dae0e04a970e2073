"""What to do about each cause that the doctor can name."""

REMEDIES = {
    "raw_logprobs": 'Set logprobs_mode="processed_logprobs" in the engine\'s arguments (rollout/settings.py)',
    "temperature": "Set the temperature once, as Config.temperature; engine and loss both read it there",
    "truncation": "Set top_p, top_k, min_p once, in Config.rollout; the loss then replays the same cut",
    "penalties": "Leave presence, frequency and repetition penalties off: the loss cannot replay them",
    "dtype": "Set Config.dtype once; engine and trainer both read it there",
    "head_dtype": "Set Config.fp32_head once; an fp32 lm_head on one side alone is no better than on none",
    "tied_head": "The engine has another lm_head than the trainer: check tie_word_embeddings in the model's config, "
    "and that a tied head is refreshed after each update (rollout/head.py)",
    "generation_config": 'Set generation_config="vllm" (rollout/settings.py): the model\'s own top_k and top_p would '
    "slip into the sampler",
    "template": "Give engine and driver the same model folder or hub revision: the chat templates differ",
    "tokenizer": "Give engine and driver the same tokenizer files and the same Config.chat_template_kwargs",
    "unused_stop_tokens": "If replies run on, make that token the tokenizer's eos_token in the model's folder",
    "stale_weights": "The engine serves older weights than the trainer holds: publish after each optimizer step",
    "tensor_not_synced": "The update left a tensor behind: check that the name is sent (trainer/learner/weights.py) "
    "and that vLLM's model loads it",
    "tensor_differs": "The tensor changed between trainer and engine: check casts and scales on its way "
    "(trainer/learner/weights.py, rollout/worker.py)",
    "stale_prefix": "Salt the prefix cache with the weight version (rollout/engine.py), or reset it at each update",
    "norm_dtype": "A norm's weight is kept in bf16 on one side: send and load norms in the trainer's dtype",
    "nonfinite": "Look at the prompts in samples.jsonl; NaN in the KV cache outlives an update, so restart the engine",
    "versions": "Set the version while the engine is paused (finish_weight_update)",
    "eos": "Train on the token that ends a reply: it must stay in token_ids and in the mask (rl/batch.py)",
    "shift": "Column t speaks about input_ids[:, t + 1]: shift once, in rl/batch.py, and nowhere else",
    "not_drawn": "The engine draws from another distribution than it reports: look for a logits processor or a penalty",
    "aborted": 'Pause with pause_generation(mode="keep", clear_cache=False): vLLM\'s defaults abort every rollout',
    "circumstance": "The engine says something else in this circumstance: switch it off (rollout/settings.py)",
    "unexplained": "No known cause fits: `unison doctor` runs the ladder in fp32, which tells numerics from weights",
}
