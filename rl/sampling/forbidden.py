"""Which tokens may not be sampled at a place of a reply? Stop tokens before `min_tokens`, and what ends a bad word."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    import rl.config

MOST_WORDS, MOST_WORD_TOKENS = 128, 1024
"""vLLM's own limits: spellings of bad words, and their tokens together."""


@dataclass(frozen=True, kw_only=True)
class Forbidden:
    """What the engine gives the probability 0 and the trainer too, so that both have one distribution."""

    min_tokens: int = 0
    """Sampled tokens before a reply may end."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a reply; forbidden until then."""
    words: tuple[tuple[int, ...], ...] = ()
    """Sequences that may not be completed: the last token of each is forbidden after the others."""

    def facts(self) -> dict[str, Any]:
        """As plain values, which the doctor compares with the engine's own."""
        return {
            "min_tokens": self.min_tokens,
            "stop_ids": sorted(self.stop_ids) if self.min_tokens else [],
            "words": [list(word) for word in self.words],
        }

    def ids(self, input_ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B T"]) -> Int[Tensor, "N K"]:
        """The forbidden ids of every masked column, in the batch's order, padded with -1.

        Source: vLLM 0.32, `v1/sample/logits_processor/builtin.py` (min tokens) and `v1/sample/ops/bad_words.py`; both
        look at the sampled tokens of one request alone, and come before temperature and truncation.
        """
        place = places(mask)
        columns = list(self._columns(input_ids, mask, place))
        if not columns:
            return torch.full((int(mask.sum()), 1), -1, device=mask.device)
        return torch.stack([column[mask] for column in columns], dim=1)

    def _columns(
        self, input_ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B T"], place: Int[Tensor, "B T"]
    ) -> Iterator[Int[Tensor, "B T"]]:
        early = place < self.min_tokens
        for token in self.stop_ids if self.min_tokens else ():
            yield torch.where(early, token, -1)
        for *start, last in self.words:
            completes = place >= len(start)
            for back, token in enumerate(reversed(start)):
                # Column t predicts token t + 1, so the token before it is in the same column of the input.
                completes = completes & (input_ids[:, : mask.shape[1]].roll(back, dims=1) == token)
            yield torch.where(completes, last, -1)


def places(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """How many tokens were sampled before each column in the same reply: a run of masked columns without a gap."""
    count = mask.long().cumsum(dim=1)
    before = torch.where(mask, 0, count).cummax(dim=1).values
    return count - before - 1


def named(ids: Int[Tensor, "N K"], logits: Float[Tensor, "N V"]) -> Bool[Tensor, "N V"]:
    """True at these vocabulary entries of each row; -1 names none."""
    # Padding goes to an extra column after the vocabulary.
    wide = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    ids = ids.long()
    return wide.scatter_(1, ids.where(ids >= 0, logits.shape[1]), True)[:, :-1]


def word_ids(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell bad words, as vLLM 0.32 finds them (`SamplingParams.update_from_tokenizer`).

    Each word has two spellings, with and without a space before it; the former only counts if it has as many tokens and
    another first one. Raises ValueError for a word without tokens, and for more than vLLM takes.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        plain = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        if not plain:
            raise ValueError(f"rollout.bad_words: {word!r} has no token of its own in this tokenizer: remove it")
        spaced = tuple(tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False))
        found.append(plain)
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    tokens = sum(map(len, found))
    if len(found) > MOST_WORDS or tokens > MOST_WORD_TOKENS:
        raise ValueError(
            f"rollout.bad_words has {len(found)} spellings with {tokens} tokens, and vLLM takes at most {MOST_WORDS} "
            f"with {MOST_WORD_TOKENS}: remove some"
        )
    return tuple(found)


def check_stops(r: "rl.config.RolloutConfig") -> None:
    """Raise ValueError, with the remedy, for settings about the end of replies that cannot work."""
    if not 0 <= r.min_tokens <= r.max_tokens:
        raise ValueError(
            f"rollout.min_tokens={r.min_tokens} must be from 0 (which is off) to rollout.max_tokens={r.max_tokens}"
        )
    for name, words in (("stop", r.stop), ("bad_words", tuple(word.strip() for word in r.bad_words))):
        if "" in words:
            raise ValueError(f"rollout.{name} has an empty text, which is in every reply: remove it")
    if wrong := [token for token in r.stop_token_ids if token < 0]:
        raise ValueError(f"rollout.stop_token_ids has {wrong[0]}, and token ids begin at 0")
