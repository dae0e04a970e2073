"""What is the policy in the trainer? A Hugging Face body, our head, and a value head if the objective has a critic."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rl.config import Lora
from rl.sampling.forbidden import Forbidden
from rl.sampling.truncation import Truncation
from trainer.model.answer import Answer
from trainer.model.attention import packs, use_segments
from trainer.model.experts.replay import FAMILIES, RouterReplay
from trainer.model.files import remote_code
from trainer.model.head import LogprobHead
from trainer.model.lora import inject
from trainer.model.measure import measure
from trainer.model.own_forward import own_forward
from trainer.model.packing import pack
from trainer.model.ulysses import Ulysses


class Policy(nn.Module):
    """A causal language model that gives log-probabilities and entropy of given tokens."""

    def __init__(self, hf: PreTrainedModel, *, fp32_head: bool, with_values: bool, share_prompts: bool) -> None:
        super().__init__()
        self.hf = hf
        self.packs = packs(hf.config)
        """Whether a micro-batch runs as one row without padding; otherwise as padded rows, which share no prompt."""
        self.share_prompts = share_prompts and self.packs
        self.tokens = torch.zeros(2, dtype=torch.long)
        """Counts since the last reset: tokens that some output needed, and tokens that went through the layers."""
        self.ulysses: Ulysses | None = None
        """Sequence parallelism, where ranks share each row."""
        self.forbidden: Forbidden | None = None
        """Tokens that the engine may not sample at some places; None: none."""
        self.replay = RouterReplay(hf) if hf.config.get_text_config().model_type in FAMILIES else None
        """Sends tokens to given experts; None: this family has none, or its routers are not known."""
        if self.packs:
            use_segments(hf)
        mapped = measure(hf)
        hf.set_output_embeddings(LogprobHead(hf.get_output_embeddings(), fp32=fp32_head, mapped=mapped))
        self.value_head = ValueHead(hf.config.get_text_config().hidden_size, 1, dtype=hf.dtype) if with_values else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        mask: Bool[Tensor, "B T"],
        temperature: float,
        truncation: Truncation | None = None,
        support: Int[Tensor, "B T K"] | None = None,
        *,
        experts: Int[Tensor, "B T L E"] | None = None,
        head_alone: bool = False,
        plain: bool | str = False,
    ) -> Answer:
        """The policy's output at every column of `mask`; 0 elsewhere, where nothing is computed.

        With truncated sampling, the softmax runs over the kept tokens: those in `support` (reported by the engine,
        padded with -1), else those that `truncation` keeps of the policy's own logits. `self.forbidden` takes tokens
        out before that. Tokens go to the given `experts` of each layer, else to those that the policy's own routers
        choose; with gradients, the backward pass must come before the next forward pass. With `head_alone` the gradient
        of the values stops at the value head and does not reach the body. `plain` asks the model's own forward pass
        instead, to check all of this: see `trainer.model.own_forward`. A string names the attention that it uses.
        """
        if plain:
            return own_forward(self.hf, input_ids, mask, temperature, "eager" if plain is True else plain)
        picked, mine = self._hidden(input_ids, mask, experts)
        targets, support = input_ids[:, 1:][mask], None if support is None else support[mask]
        forbidden = None if self.forbidden is None else self.forbidden.ids(input_ids, mask)
        if mine is not None:
            targets, support = targets[mine], None if support is None else support[mine]
            forbidden = None if forbidden is None else forbidden[mine]
        head = self.hf.get_output_embeddings()
        answers = list(head(picked, targets, temperature, truncation, support, forbidden))
        if self.value_head is not None:
            seen = picked.detach() if head_alone else picked
            answers.append(self.value_head(seen)[:, 0])
        if self.ulysses and mine is not None:
            answers = list(self.ulysses.whole(torch.stack(answers), mine))
        logprobs, entropy, *values = [_scatter(answer, mask) for answer in answers]
        return Answer(logprobs=logprobs, entropy=entropy, values=values[0] if values else None)

    def _hidden(
        self, input_ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B T"], experts: Int[Tensor, "B T L E"] | None
    ) -> tuple[Float[Tensor, "N H"], Bool[Tensor, " M"] | None]:
        """Last hidden states of the masked columns, in the batch's order. Where ranks share a row: only this rank's
        columns, and a mask of them."""
        body, device = self.hf.get_decoder(), input_ids.device
        if not self.packs:
            # Rows are right-padded, so causal attention never sees padding and needs no mask.
            columns = torch.arange(1, mask.shape[1] + 1, device=device)
            self.tokens += torch.tensor([int((mask * columns).amax(dim=1).sum()), mask.numel()])
            with self._replayed(None if experts is None else experts.flatten(0, 1)):
                return body(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state[mask], None
        packed = pack(input_ids.cpu(), mask.cpu(), share_prompts=self.share_prompts)
        # The dummy token of a rank without work does not count.
        self.tokens += packed.input_ids.numel() if len(packed.source) else 0
        mine = None
        if self.ulysses:
            packed, mine = self.ulysses.part(packed)
            mine = mine.to(device)
        if experts is not None:
            experts = experts.flatten(0, 1).index_select(0, packed.origin.to(device))
        with self._replayed(experts):
            hidden = body(
                input_ids=packed.input_ids.to(device),
                position_ids=packed.position_ids.to(device),
                segments=packed.segments,
                split=self.ulysses,
                use_cache=False,
            ).last_hidden_state
        # index_select, not indexing: many sequences read their prompt's last column, and the backward of an index adds
        # up their gradients in the random order of threads.
        return hidden[0].index_select(0, packed.source.to(device)), mine

    @contextmanager
    def _replayed(self, experts: Int[Tensor, "N L E"] | None) -> Iterator[None]:
        """A pass of tokens through given experts. They stay for a backward pass, which may run layers again."""
        assert experts is None or self.replay is not None, "the engine reports experts, and the trainer knows no router"
        if self.replay is None:
            yield
            return
        self.replay.begin(experts)
        yield
        self.replay.count()
        if not torch.is_grad_enabled():
            self.replay.begin(None)


class ValueHead(nn.Linear):
    """A linear layer computed in fp32: bf16 would round a value of 1 to steps of 0.008."""

    def forward(self, input: Float[Tensor, "N H"]) -> Float[Tensor, "N 1"]:
        """Values of hidden states."""
        return F.linear(input.float(), self.weight.float(), self.bias.float())


def _scatter(picked: Float[Tensor, " N"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return torch.zeros(mask.shape, dtype=picked.dtype, device=picked.device).masked_scatter(mask, picked)


def load(
    path: str,
    *,
    dtype: str,
    fp32_head: bool,
    share_prompts: bool,
    with_values: bool = False,
    checkpointing: bool = False,
    lora: Lora | None = None,
    trust_remote_code: bool = False,
) -> Policy:
    """Load a causal LM from a folder or the hub. Raises transformers' own error for any other model."""
    with remote_code(path, trust_remote_code) as more:
        hf = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **more)
    if getattr(hf.config.get_text_config(), "attn_logit_softcapping", None):
        hf.set_attn_implementation("eager")  # torch's kernels leave out the soft cap
    if checkpointing:
        _checkpoint(hf)
    if lora and lora.rank:
        inject(hf, lora)
    return Policy(hf, fp32_head=fp32_head, with_values=with_values, share_prompts=share_prompts)


def _checkpoint(hf: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass.

    transformers does so only in layers in training mode, in which dropout would change the policy's output. So each
    layer is in training mode and the modules inside it are not.
    """
    hf.gradient_checkpointing_enable({"use_reentrant": False})
    found = [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ValueError(
            f"trainer.gradient_checkpointing: transformers cannot do it for {type(hf).__name__}; leave it off"
        )
    for layer in found:
        layer.training = True
