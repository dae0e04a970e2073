"""One vLLM V1 engine: samples tokens, each with its weight version, and takes new weights while it samples."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

from transformers import PretrainedConfig
from vllm import SamplingParams, TokensPrompt
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from rl.config import Config
from rl.data import Given
from rl.protocols import EngineLost, UpdateFailed
from rl.tokens import Rendering, stop_ids
from rl.types import Completion, FinishReason, Parsed
from rollout import examine
from rollout.completion import completion
from rollout.core import async_llm
from rollout.endpoint.serving import Serving
from rollout.parse import Parsers
from rollout.process import end_vllm
from rollout.settings import engine_args, sampling_settings
from rollout.turns import Turns
from rollout.worker import WorkerExtension

T = TypeVar("T")
P = ParamSpec("P")
UNSENT = -100
"""Version of an engine that has not received weights from the learner yet. It holds random weights and serves only the
doctor, which may send its own versions below 0."""


class Engine(Turns, Serving):
    """Hosted by one actor. Every method is a coroutine of the same event loop."""

    def __init__(
        self,
        config: Config,
        *,
        device: str,
        backend: str,
        model: str,
        version: int = UNSENT,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """`overrides` replace engine arguments, for experiments that show the effect of a wrong setting."""
        self.config = config
        args = engine_args(config, device=device, backend=backend, model=model) | (overrides or {})
        self.llm = async_llm(args, device=device)
        self.generations = (device != "cpu") + (config.rollout.tensor_parallel > 1)
        """Between this process and those that hold the model; 0: it holds it itself."""
        files, self.tokenizer = PretrainedConfig.get_config_dict(model)[0], self.llm.get_tokenizer()
        self.stop_ids = stop_ids(self.tokenizer, self.llm.model_config.try_get_generation_config(), files)
        """Token ids that end a reply."""
        self.parsers = Parsers(config.rollout, self.tokenizer, self.stop_ids)
        self.version = version
        self.requests = 0
        self.aborted = 0
        self.slots = asyncio.Semaphore(config.rollout.max_num_seqs)
        self.open = asyncio.Event()
        self.updating = False
        self.aside = config.rollout.receive_while_sampling and backend == "nccl"

    async def start(self) -> None:
        """Set the version of the start weights and accept requests."""
        if self.generations:
            await self.call_workers(WorkerExtension.end_with_parent, self.generations)
        await self._await_vllm(self.llm.update_weight_version(str(self.version)))
        if not self.asleep:
            self.open.set()

    async def sample(
        self,
        token_ids: list[int],
        n: int,
        seed: int | None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        fresh: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> list[Completion]:
        """n completions of one prompt, with the log-probabilities (nats) under which they were sampled.

        `temperature` and `max_tokens` default to the run's. Sample i has the seed `seed + i`. `fresh` ignores cached
        prefixes. With `tools`, the schemas that the prompt shows, the run's parsers read the replies. `more` are
        settings of vLLM, and what is sampled with them must not be trained on.
        """
        sampling = (
            sampling_settings(self.config, self.stop_ids, temperature, max_tokens)
            | {"skip_reading_prefix_cache": fresh}
            | more
        )
        seeds = [None if seed is None else seed + i for i in range(n)]
        found = await asyncio.gather(*(self._complete(token_ids, seed=s, **sampling) for s in seeds))
        parser = None if tools is None else self.parsers.of(tools)
        return [replace(each, parsed=parser(token_ids, each)) for each in found] if parser else list(found)

    async def _complete(self, token_ids: list[int], **sampling: Any) -> Completion:
        """One completion of one prompt."""
        params = SamplingParams(**sampling, logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)
        output = await self.generate(token_ids, params)
        assert output.finished, "vLLM ended a request without its final output"
        done = output.outputs[0]
        self.aborted += done.finish_reason == "abort"
        if self.llm.model_config.return_sampling_mask and done.token_ids and done.sampling_mask is None:
            raise RuntimeError(
                "vLLM truncated the vocabulary but did not report which tokens it kept, so the trainer cannot replay "
                "it. Set top_p=1, top_k=0, min_p=0"
            )
        if self.config.rollout.router_replay and done.token_ids and done.routed_experts is None:
            raise RuntimeError("vLLM did not report the experts of a reply's tokens. Set rollout.router_replay=False")
        return completion(done, len(token_ids), output.num_cached_tokens or 0)

    async def generate(self, token_ids: list[int], params: SamplingParams) -> RequestOutput:
        """The final output of one request. It uses cached prefixes of the current weights only."""
        if params.top_k <= 0 and self.llm.model_config.return_sampling_mask:
            params.top_k = self.llm.model_config.get_vocab_size()  # vLLM wants a bound; this one keeps every token
        # What waits in vLLM's queue over an update has the old version's salt, and then finds its prompt in the old
        # weights' cache. So it waits here.
        async with self.slots:
            version, output = await self._generated(token_ids, params)
            spans = output.outputs[0].weight_versions
            if spans and int(spans[0].version) != version:
                # It still waited there over an update, for a step to end, or for room in the cache.
                params.skip_reading_prefix_cache = True
                _, output = await self._generated(token_ids, params)
        return output

    async def _generated(self, token_ids: list[int], params: SamplingParams) -> tuple[int, RequestOutput]:
        """The final output of one request, and the version whose cached prefixes it could use."""
        # A request that arrives during a pause would run on the new weights under the old version's salt.
        await self.open.wait()
        self.requests += 1
        version = self.version
        prompt: TokensPrompt = {"prompt_token_ids": token_ids, "cache_salt": f"v{version}"}
        try:
            return version, [o async for o in self.llm.generate(prompt, params, request_id=str(self.requests))][-1]
        except EngineDeadError:
            raise EngineLost("vLLM's own process has ended") from None

    async def _await_vllm(self, call: Awaitable[T]) -> T:
        """A call's result. Raises EngineLost when vLLM's process dies; vLLM raises nothing for callers that wait."""
        waiting = asyncio.ensure_future(call)
        while not waiting.done():
            await asyncio.wait([waiting], timeout=1.0)
            if not waiting.done() and self.llm.errored:
                waiting.cancel()
                raise EngineLost("vLLM's own process has ended")
        try:
            return await waiting
        except EngineDeadError:
            raise EngineLost("vLLM's own process has ended") from None

    async def call_workers(
        self, method: Callable[Concatenate[WorkerExtension, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> list[T]:
        """Call a method of the extension on every worker process of vLLM; one result per worker."""
        return await self._await_vllm(self.llm.collective_rpc(method.__name__, args=args, kwargs=kwargs))

    async def _require_ready(self, method: Callable[[WorkerExtension, int], str], version: int) -> None:
        """Call a worker method that returns an error message or "". Raises UpdateFailed with the first message."""
        for error in await self.call_workers(method, version):
            if error:
                raise UpdateFailed(f"weight version {version}: {error}")

    async def expected_weights(self, sent: Iterable[str] = ()) -> set[str]:
        """Names that every update must contain, in terms of those that the trainer sends."""
        return set().union(*await self.call_workers(WorkerExtension.expected_weights, sorted(sent)))

    async def listen_to_weights(self, on: bool) -> None:
        """Set whether workers digest the tensors of the next updates as they arrive."""
        await self.call_workers(WorkerExtension.digest_updates, on)

    async def received_digests(self) -> list[dict[str, str]]:
        """Digests of the last update by tensor name, one dictionary per worker."""
        return await self.call_workers(WorkerExtension.received_digests)

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the weight channel, over NCCL while sampling goes on. Raises UpdateFailed when a worker cannot."""
        await self._await_vllm(self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))
        await self._in_workers(WorkerExtension.joined_channel, "the weight channel did not open")

    async def stage_weights(self, version: int) -> None:
        """On CPU: begin to receive a version into a second copy of the model, while sampling continues."""
        await self._require_ready(WorkerExtension.stage_weights, version)

    async def _in_workers(self, state: Callable[[WorkerExtension], str | None], what: str) -> None:
        """Wait for what the workers do in a thread. Raises UpdateFailed with the first error message."""
        while None in (errors := await self.call_workers(state)):
            await asyncio.sleep(0.02)
        for error in filter(None, errors):
            raise UpdateFailed(f"{what}: {error}")

    async def start_weight_update(self) -> None:
        """Pause and begin an update. The pause is required: a step between begin and commit kills vLLM.

        With `receive_while_sampling` both wait until everything has arrived.
        """
        if not self.aside:
            await self._begin()

    async def _begin(self) -> None:
        await self.pause()
        self.updating = True
        await self._await_vllm(self.llm.start_weight_update())

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive the tensors of an update, or of a part of it."""
        if self.aside:
            await self.call_workers(WorkerExtension.receive_aside, update_info)
            await self._in_workers(WorkerExtension.received_aside, "the update did not arrive")
            return
        await self._await_vllm(self.llm.update_weights(WeightTransferUpdateRequest(update_info=update_info)))

    async def finish_weight_update(self, version: int) -> None:
        """Commit the update and resume. Tokens sampled afterwards carry `version`."""
        # An equal version is valid: a restarted engine gets the version that the other engines hold.
        if version < self.version:
            raise UpdateFailed(f"weight versions only grow: this engine holds {self.version}, the update is {version}")
        if self.aside:
            await self._begin()
            await self.call_workers(WorkerExtension.load_spare)
        elif not self.updating:
            # Staged weights have arrived completely by now, so the pause covers only the swap, which cannot fail.
            await self._require_ready(WorkerExtension.commit_error, version)
            await self._await_vllm(self.llm.start_weight_update())
            await self.pause()
        await self._await_vllm(self.llm.finish_weight_update(weight_version=str(version)))
        self.version, self.updating = version, False
        self.pause_seconds = await self.resume()

    async def last_pause(self) -> float:
        """Seconds that sampling stopped for the last update."""
        return self.pause_seconds

    async def alive(self) -> None:
        """Raise EngineLost when vLLM's processes have ended, or an update stopped half way, which cannot be undone."""
        await self._await_vllm(self.llm.check_health())
        if self.updating:
            raise EngineLost("its last weight update stopped half way")

    async def counters(self) -> dict[str, int]:
        """Requests served and requests aborted since the start, and the current weight version."""
        return {"requests": self.requests, "aborted": self.aborted, "version": self.version}

    async def close(self) -> None:
        """End vLLM's processes."""
        await self.end_serving()
        end_vllm(self.llm)
        del self.llm

    async def score(self, token_ids: list[int], reply: list[int], **sampling: Any) -> list[float]:
        """Log-probabilities (nats) that this engine would have returned, had it sampled these reply tokens.

        One request per token, so that each goes through the sampler that rollouts use; `prompt_logprobs` does not, and
        vLLM leaves temperature out of it. `sampling` may set temperature, top_p, top_k.
        """
        contexts = [token_ids + reply[:position] for position in range(len(reply))]
        asked = (examine.token_logprob(self.generate, c, t, sampling) for c, t in zip(contexts, reply, strict=True))
        return list(await asyncio.gather(*asked))

    async def prefill(self, token_ids: list[int], reply: list[int]) -> list[float]:
        """Log-probabilities (nats) of a reply's tokens at T = 1 from one forward pass over all of them."""
        return await examine.prefill_logprobs(self.generate, token_ids, reply)

    async def describe(self, prompt: Given, rendering: Rendering) -> dict[str, Any]:
        """Settings that this engine really runs with, and one prompt of the run in token ids of its own tokenizer."""
        return examine.describe(
            self.llm, SamplingParams(**sampling_settings(self.config, self.stop_ids)), prompt, rendering
        )

    async def parse(
        self, reply: list[int], finish_reason: FinishReason, tools: Sequence[Mapping[str, Any]]
    ) -> Parsed | None:
        """What this engine's parser finds in a reply where these tools were shown; None without a parser."""
        parser = self.parsers.of(tools)
        return parser.parse([], reply, finish_reason) if parser else None

    async def trace(self, token_ids: list[int]) -> list[dict[str, Any]]:
        """What every layer takes in and gives out for one prompt and a short reply, by worker."""
        return await examine.trace(self.generate, self.call_workers, token_ids)

    async def trace_sampler(self, token_ids: list[int], seed: int, tokens: int) -> examine.SampledAndTraced:
        """One reply as a rollout samples it, and what each worker's sampler did for it (`rollout.sampler_trace`)."""
        return await examine.trace_sampler(lambda: self.sample(token_ids, 1, seed, None, tokens), self.call_workers)
