"""How vLLM V1 is set up so that its log-probabilities mean what the loss thinks: one place, each line with a reason."""

import platform
from collections.abc import Iterable
from typing import Any

from rl.config import Config
from rl.sampling.reports import engine_reports

TRANSFER_ENGINES = {"nccl": "unison_nccl", "ipc": "unison_ipc", "gloo": "unison_gloo"}


def engine_args(config: Config, *, device: str, backend: str, model: str) -> dict[str, Any]:
    """Keyword arguments of `AsyncEngineArgs` for one engine of a run on `device` ("cpu" or "cuda")."""
    r = config.rollout
    cpu = device == "cpu"
    args: dict[str, Any] = {
        "model": model,
        "trust_remote_code": config.trust_remote_code,
        # Random weights: the engine's outputs can then only come from weights that the learner sent.
        "load_format": "dummy",
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": r.max_model_len,
        "max_num_seqs": r.max_num_seqs,
        "tensor_parallel_size": r.tensor_parallel,
        # Inside a Ray placement group, as here, vLLM would ask Ray for workers, and no GPUs are left for them.
        "distributed_executor_backend": "mp" if r.tensor_parallel > 1 else None,
        # By default V1 returns log-probabilities from before temperature and penalties; the loss needs those of the
        # distribution from which tokens are sampled.
        "logprobs_mode": "processed_logprobs",
        # The tokens that truncation kept, and the experts of each token, for the trainer to replay.
        "return_sampling_mask": r.truncation is not None and engine_reports(device),
        "enable_return_routed_experts": r.router_replay,
        # Logits in fp32 on both sides: bf16 rounds them on a grid coarser than GSPO's clip range.
        "hf_overrides": {"head_dtype": "float32" if config.fp32_head else config.dtype},
        # A hit on KV from older weights would undo the update; `cache_salt` in engine.py keeps versions apart, and
        # a group's samples still share their prompt.
        "enable_prefix_caching": r.prefix_cache,
        # Overlaps scheduling with the forward pass; stays off until parity with it on has been shown.
        "async_scheduling": r.async_scheduling,
        # A model's own generation_config (top_k, top_p, temperature) must not slip into the sampler.
        "generation_config": "vllm",
        "enforce_eager": cpu if r.enforce_eager is None else r.enforce_eager,
        "worker_extension_cls": "rollout.worker.WorkerExtension",
        "weight_transfer_config": {"backend": TRANSFER_ENGINES[backend]},
        "disable_log_stats": True,
    }
    if cpu:
        # CPU's default of 128 tokens per block is longer than most prompts, which then never hit the prefix cache. What
        # fills no block is computed again for each sample. See `rollout.worker.ShortBlocks`; bf16 has a kernel for 32.
        block = 16 if config.dtype == "float32" and platform.machine() == "x86_64" else 32
        args |= {"block_size": block, "kv_cache_memory_bytes": int(r.kv_cache_gib * 2**30)}
        # vLLM rewinds the generator of a seeded request whose prompt was split between steps, which CPU generators
        # cannot do: it kills the engine. With room for every sequence at its longest, no prompt is ever split.
        args |= {"max_num_batched_tokens": r.max_num_seqs * r.max_model_len}
    else:
        # vLLM's engine class has no default for GPUs and takes 2,048 tokens per step, a quarter of what they can use.
        batched = r.max_num_batched_tokens or max(8192, r.max_model_len)
        args |= {"gpu_memory_utilization": r.gpu_memory_utilization, "max_num_batched_tokens": batched}
        # vLLM's own allocator, which can give memory back and map it again at the same address.
        args |= {"enable_sleep_mode": r.sleep}
    return args


def engine_env(*, device: str, backend: str, threads: int) -> dict[str, str]:
    """Environment of an engine's actor process; it must be set before torch and vLLM are imported."""
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if backend == "ipc":
        # CUDA IPC handles are Python tuples; they only travel over this actor's own local socket.
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if device == "cuda":
        # It cannot return processed log-probabilities, so vLLM would compile it and never use it.
        env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    else:
        env |= {
            # The worker then runs inside the engine-core process: two processes an engine instead of three.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(threads),
            # GNU OpenMP's threads spin for long and starve the other actor on a small machine. Not at all would be a
            # tenth slower: a decode step has hundreds of short parallel regions.
            "OMP_WAIT_POLICY": "passive",
            "GOMP_SPINCOUNT": "4000",
            # Otherwise the first request for log-probabilities compiles a C++ kernel for 10 to 47 s.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return env


def sampling_settings(
    config: Config, stop_ids: Iterable[int], temperature: float | None = None, max_tokens: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of `SamplingParams` for one request of a run, with its temperature and length by default."""
    r = config.rollout
    longest = max_tokens or r.max_tokens
    sampling: dict[str, Any] = {
        "temperature": config.temperature if temperature is None else temperature,
        "max_tokens": longest,
        "top_p": r.top_p,
        "top_k": r.top_k,
        "min_p": r.min_p,
        "min_tokens": min(r.min_tokens, longest),
        "stop_token_ids": sorted({*stop_ids, *r.stop_token_ids}),
        "bad_words": list(r.bad_words),
        "detokenize": False,
    }
    if r.stop:
        # vLLM looks for stop texts in the decoded reply; with special tokens, because a stop text may be one.
        sampling |= {"stop": list(r.stop), "detokenize": True, "skip_special_tokens": False}
    if r.truncation and sampling["temperature"] == 0:
        # An engine that reports the kept tokens refuses greedy requests; top_k=1 is equivalent.
        sampling |= {"temperature": 1.0, "top_p": 1.0, "top_k": 1, "min_p": 0.0}
    return sampling
