"""What should the user do about each cause that the doctor can name?"""

EPISODES = {
    "template_refuses": "Use a chat template that knows this role, or let the environment speak as the user: a `parse` "
    "method reads calls from the text, and results come back as the user's words",
    "words_not_shown": "Use a chat template that writes the content of a message as it is; some want a list of parts",
    "tools_not_shown": "Use a chat template that writes `tools`, or show the tools in the prompt and read calls from "
    "the text with a `parse` method",
    "calls_not_shown": "What the policy samples stays in its context, so nothing is lost over turns; only calls that a "
    "prompt of the data set has are not written",
    "results_not_shown": "Use a chat template that writes messages of the role tool, or give the environment a `parse` "
    "method: its results are then the user's words",
    "one_call_a_turn": "Tell the policy to make one call a turn: several results at once are an error of the template",
    "delta_differs": "The template writes new messages in another way later in a conversation, which no policy should "
    "learn from: use a template that writes a message by itself",
    "prefilled": "The generation prompt holds words that a finished turn has not. They are in the context and are not "
    "trained; the parser for reasoning must know that the reply begins behind them",
    "close_token": "Give the run the token that closes the template's turns: rollout.stop_token_ids, or eos_token_id "
    "in generation_config.json",
    "no_close_token": "The policy ends a reply with a token that the template never writes. It stays in the context",
    "close_differs": "The policy's own stop token stays in the context where the template writes another one",
    "bos_twice": "Let either the template or the tokenizer write the begin-of-text token: remove it from one of them",
    "dated": "The date is that of the run's start in the whole run; give the engines that serve the model the same one",
    "tools_move": "The template writes the tools again in front of each user's message. Prefer tool messages, or a "
    "shorter list of tools",
    "calls_not_parsed": "Set rollout.tool_parser to the parser of this model's chat template",
    "broken_call_taken": "Set rollout.tool_parser to a parser that sees a call without its end as malformed",
    "turn_seeds": "Derive the seed of a turn from ordinal, episode and turn: equal seeds draw equal noise",
    "tool_types": "Give each argument of a tool a type that JSON has, and call methods that are no tools _name",
    "start_differs": "Draw what `start` draws from random.Random(seed) with a seed of the task: the episodes of a "
    "group must have one prompt",
    "global_random": "Use a generator of the instance, such as random.Random(seed): threads share the global one, and "
    "a run that is resumed cannot repeat it",
    "task_changed": "Copy the task before changing it: all episodes of a group share it",
    "environment_fails": "Repair the environment, or raise ToolError for what the policy did wrong",
}
"""Of what the chat template and the environment do over many turns."""
REMEDIES = {
    "raw_logprobs": 'Set logprobs_mode="processed_logprobs" in the engine\'s arguments (rollout/settings.py)',
    "temperature": "Set the temperature once, as Config.temperature; engine and loss both read it there",
    "truncation": "Set top_p, top_k, min_p once, in Config.rollout; the loss then applies the same truncation",
    "forbidden": "Set min_tokens, stop_token_ids and bad_words once, in Config.rollout, and give engine and"
    " trainer the same model files: the loss then forbids the same tokens",
    "penalties": "Leave presence, frequency and repetition penalties off: the loss cannot apply them",
    "dtype": "Set Config.dtype once; engine and trainer both read it there",
    "head_dtype": "Set Config.fp32_head once; an fp32 lm_head on one side alone is no better than on none",
    "tied_head": "The engine's lm_head is not the trainer's: check tie_word_embeddings in the model's "
    "config, and that a tied head is refreshed after each update (rollout/head.py)",
    "generation_config": 'Set generation_config="vllm" (rollout/settings.py); otherwise the sampler uses '
    "the model's own top_k and top_p",
    "template": "Give engine and driver the same model folder or hub revision: the chat templates differ",
    "tokenizer": "Give engine and driver the same tokenizer files and the same Config.chat_template_kwargs",
    "stop_ids": "Give engine and driver the same model folder: tokenizer, generation_config.json and "
    "config.json name the tokens that end a reply",
    "no_stop_ids": "Name the token that ends a reply: eos_token of the tokenizer, or eos_token_id in "
    "generation_config.json",
    "stale_weights": "The engine has older weights than the trainer: publish after each optimizer step",
    "tensor_not_synced": "The update did not deliver a tensor: check that its name is sent "
    "(trainer/learner/weights.py) and that vLLM's model loads it",
    "tensor_differs": "The tensor changed between trainer and engine: check casts and scales in between "
    "(trainer/learner/weights.py, rollout/worker.py)",
    "stale_prefix": "Salt the prefix cache with the weight version (rollout/engine.py), or reset it at each update",
    "nonfinite": "Look at the prompts in samples.jsonl. Restart the engine: NaN in the KV cache survives an update",
    "versions": "Set the version while the engine is paused (finish_weight_update)",
    "eos": "Train on the token that ends a reply: it must stay in token_ids and in the mask (rl/batch.py)",
    "shift": "Column t belongs to input_ids[:, t + 1]: shift once, in rl/batch.py, and nowhere else",
    "logit_bias": "Leave logit_bias and logits processors off: the loss does not know them",
    "allowed_tokens": "Let the engine sample from the whole vocabulary; forbid tokens with "
    "Config.rollout.bad_words, which the loss knows too",
    "unit": "Hand on what vLLM returns: the natural logarithm of each sampled token's own probability "
    "(rollout/engine.py, `completion`)",
    "rounded": "Keep the numbers in fp32 from the sampler to the loss: do not round them, and store them in"
    " no smaller dtype",
    "missing_number": "Each sampled token needs its number, from the first to the last: compare the lengths"
    " of token_ids and logprobs (rollout/engine.py, `completion`)",
    "other_token": "Take the sampled token's own entry of vLLM's log-probabilities, not the first of the "
    "list (rollout/engine.py, `completion`)",
    "swapped": "Keep each reply with its own prompt and numbers: look where replies of several requests are"
    " put in order",
    "ignored_eos": "Leave ignore_eos off, and end a reply at the model's stop tokens (rollout.stop_token_ids)",
    "seeds": "Give each sample of a group a seed of its own (`Engine.sample`), and do not copy replies",
    "selected": "Train on every reply that was sampled: choosing among replies (best-of-n, a filter by "
    "likelihood) changes the distribution. Or the engine samples at a lower temperature than it reports",
    "greedy": "Sample at Config.temperature: the engine takes the most likely token each time",
    "prompt_tokens": "Send the prompt's token ids as they are: the engine must add no BOS and cut nothing "
    "(add_special_tokens, truncation, max_model_len)",
    "finish_reason": "Hand on vLLM's finish_reason and all tokens of the reply (rollout/engine.py, `completion`)",
    "packing": "A packed row lets one sequence see another: look at the segments and the attention mask "
    "(trainer/model/packing.py, trainer/model/attention.py), or set trainer.share_prompts=False",
    "mode": "A random part runs, such as dropout: put the model into eval mode (`model.eval()`), or set its dropout "
    "to 0",
    "padding": "Padding must lie to the right, and count nowhere: look at the mask and at position ids",
    "trainer_body": "The trainer's model is changed between its layers, or its log-probabilities are after "
    "them: look at what wraps the model, and at trainer/model/",
    "config": "Give engine, trainer and driver the same config.json: remove hf_overrides and changes of model.config",
    "not_drawn": "The engine samples from another distribution than it reports: look for a logits processor"
    " or a penalty",
    "aborted": 'Pause with pause_generation(mode="keep", clear_cache=False): vLLM\'s defaults abort every rollout',
    "condition": "The engine's log-probabilities change under this condition: switch it off (rollout/settings.py)",
    # What the engine's body computes.
    "norm_dtype": "One side keeps a norm in bf16: send and load norms in the trainer's dtype, and check that the "
    "engine's norm computes in fp32",
    "eps": "The engine's norms have another eps: give engine and trainer the same config.json (rms_norm_eps, "
    "layer_norm_eps), and check hf_overrides",
    "norm": "The engine's norms have another formula: compare the kind of norm in both models (RMSNorm or LayerNorm, "
    "the weight or 1 + the weight, what is subtracted), and try the engine without custom kernels",
    "residual": "The engine adds up its layers in another way: check the dtype of its residual stream, a fused norm "
    "kernel, and residual_multiplier in the model's config",
    "rope": "The engine turns queries and keys by other angles: compare rope_theta, rope_scaling (rope_parameters) and "
    "max_position_embeddings in both configs, and check hf_overrides",
    "positions": "The engine gives tokens other positions: check what numbers them (position_ids, padding, the "
    "offset of a decode step, a speculative or multimodal path)",
    "attention_scale": "The engine scales attention scores by another factor: check head_dim, query_pre_attn_scalar or "
    "attention_multiplier in the model's config, and the attention backend",
    "attention_window": "The engine attends over another window: check sliding_window, layer_types and "
    "max_window_layers in the model's config, and that its attention backend supports windows",
    "attention_cap": "The engine caps attention scores in another way: check attn_logit_softcapping in the model's "
    "config, and choose an attention backend that supports soft caps",
    "attention_mask": "The engine's tokens see others than the trainer's: check that its attention is causal "
    "(is_causal, use_bidirectional_attention, the attention backend)",
    "attention": "The engine's attention computes something else from the same queries, keys and values: try another "
    "attention backend (VLLM_ATTENTION_BACKEND), and the engine without its plugins and custom kernels",
    "kv_cache": "The engine's keys and values change on their way through the KV cache: set kv_cache_dtype to the "
    "model's own dtype, and check block tables, layers that share a cache, and KV that was transferred or offloaded",
    "embedding": "The engine's embeddings have another size: check what multiplies them (embedding_multiplier, "
    "sqrt(hidden_size) of Gemma), and apply it once",
    "scale": "A layer of the engine is multiplied by a factor: look for a scale that is applied twice or not at all "
    "(logit_scale, logits_scaling, weight scales of quantisation, a load hook)",
    "head": "The engine's lm_head computes with other weights: check that lm_head.weight is sent and loaded, and that "
    "the engine does not tie a head that is untied (tie_word_embeddings)",
    "tensor_loaded": "The tensor arrived bit for bit, but the layer computes with other values: check what loads it in "
    "the engine (load_weights, fused and packed layouts, transposed or cached copies)",
    "lora_scale": "The engine counts the adapter in another way: merge it once, with lora_alpha / rank "
    "(trainer/model/lora.py), and send no adapter on top of merged weights",
    "quantization": "The engine quantises its weights or what goes into its layers: load it without quantisation, or "
    "quantise the trainer's forward pass too",
    "layers": "The engine runs other decoder layers, or in another order: compare num_hidden_layers in both configs, "
    "and check early exit, layer skipping and pipeline stages",
    "activation": "The engine's layers agree, but not what it computes between two of them: compare hidden_act in both "
    "configs, and check fused activation kernels",
    "unexplained": "No known cause fits. The report (doctor.json) has all measurements; restart the engine,"
    " and if it comes back, please report it with that file",
} | EPISODES
