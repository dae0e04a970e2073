"""What should the user do about each cause that the doctor can name?"""

REMEDIES = {
    "raw_logprobs": 'Set logprobs_mode="processed_logprobs" in the engine\'s arguments (rollout/settings.py)',
    "temperature": "Set the temperature once, as Config.temperature; engine and loss both read it there",
    "truncation": "Set top_p, top_k, min_p once, in Config.rollout; the loss then applies the same truncation",
    "penalties": "Leave presence, frequency and repetition penalties off: the loss cannot apply them",
    "dtype": "Set Config.dtype once; engine and trainer both read it there",
    "head_dtype": "Set Config.fp32_head once; an fp32 lm_head on one side alone is no better than on none",
    "tied_head": "The engine's lm_head is not the trainer's: check tie_word_embeddings in the model's config, and "
    "that a tied head is refreshed after each update (rollout/head.py)",
    "generation_config": 'Set generation_config="vllm" (rollout/settings.py); otherwise the sampler uses the model\'s '
    "own top_k and top_p",
    "template": "Give engine and driver the same model folder or hub revision: the chat templates differ",
    "tokenizer": "Give engine and driver the same tokenizer files and the same Config.chat_template_kwargs",
    "stop_ids": "Give engine and driver the same model folder: tokenizer, generation_config.json and config.json name "
    "the tokens that end a reply",
    "no_stop_ids": "Name the token that ends a reply: eos_token of the tokenizer, or eos_token_id in "
    "generation_config.json",
    "stale_weights": "The engine has older weights than the trainer: publish after each optimizer step",
    "tensor_not_synced": "The update did not deliver a tensor: check that its name is sent "
    "(trainer/learner/weights.py) and that vLLM's model loads it",
    "tensor_differs": "The tensor changed between trainer and engine: check casts and scales in between "
    "(trainer/learner/weights.py, rollout/worker.py)",
    "stale_prefix": "Salt the prefix cache with the weight version (rollout/engine.py), or reset it at each update",
    "norm_dtype": "One side keeps a norm's weight in bf16: send and load norms in the trainer's dtype",
    "nonfinite": "Look at the prompts in samples.jsonl. Restart the engine: NaN in the KV cache survives an update",
    "versions": "Set the version while the engine is paused (finish_weight_update)",
    "eos": "Train on the token that ends a reply: it must stay in token_ids and in the mask (rl/batch.py)",
    "shift": "Column t belongs to input_ids[:, t + 1]: shift once, in rl/batch.py, and nowhere else",
    "not_drawn": "The engine samples from another distribution than it reports: look for a logits processor or a "
    "penalty",
    "aborted": 'Pause with pause_generation(mode="keep", clear_cache=False): vLLM\'s defaults abort every rollout',
    "condition": "The engine's log-probabilities change under this condition: switch it off (rollout/settings.py)",
    "unexplained": "No known cause fits. Run `unison doctor`: it compares both sides in fp32, which separates numerics "
    "from weights",
}
