"""A judge behind a URL that answers OpenAI's chat completions: which request does it get, and what did it answer?"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import mktime_tz, parsedate_tz
from functools import cache, partial
from time import time
from typing import Any
from urllib.parse import urlsplit

from rl.data import Given
from rl.judges.agreement import Cases
from rl.judges.desk import Calls, TryAgain, asked
from rl.judges.hearing import JudgeError
from rl.typed import Checked, shortened
from rl.types import Verdict

AGAIN = (408, 409, 429)
"""HTTP statuses below 500 that another try may not get."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenAIJudge(Checked):
    """A judge behind any URL that answers OpenAI's chat completions, awaited in a reward: `await judge(prompt, reply)`.

    The score is what `parse` returns. A verdict that it cannot read is an error after `calls.tries` tries.
    """

    url: str
    """Address of the API, such as http://localhost:8000/v1, without a key."""
    model: str
    """The model's name there."""
    prompt: str | Callable[[Given, str], list[dict[str, Any]]]
    """What the judge is asked: a text with {prompt} and {reply}, or a function of both that returns chat messages."""
    parse: Callable[[str], float | None] | type
    """Takes the judge's answer and returns the score, such as `number_after("Score:", 0, 10)` or `float`; None, or an
    exception, where it has none."""
    name: str = ""
    """Its name in metrics, files and errors. Default: the last part of `model`."""
    key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key. Not set: no key is sent."""
    temperature: float = 0.0
    """Above 0 no verdict is kept in the cache."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the request, such as {"max_completion_tokens": 500}."""
    calls: Calls = Calls()
    """Concurrency, tries and deadlines."""
    labelled: Callable[[], Cases] | None = None
    """Cases with known labels; the run reports before its first step how far the judge agrees with them."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        # The value is not shown: it may hold a key.
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("OpenAIJudge: url must begin with http:// or https://, such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"OpenAIJudge: url holds more than an address: put the key into the environment variable {self.key_env}"
            )
        if isinstance(self.prompt, str) and "{reply}" not in self.prompt:
            raise ValueError("OpenAIJudge: prompt has no {reply}, so every reply would get the same verdict")

    @property
    def label(self) -> str:
        """Its name in metrics and files."""
        return self.name or self.model.rpartition("/")[2]

    @property
    def shown(self) -> str:
        """Its name and address."""
        return f"{self.label!r} ({self.model} at {self.url})"

    @property
    def repeatable(self) -> bool:
        """Whether its verdicts may be kept."""
        return self._request["temperature"] == 0

    @property
    def _request(self) -> dict[str, Any]:
        return {"model": self.model, "temperature": self.temperature, **self.body}

    async def __call__(self, prompt: Given, reply: str) -> float:
        """The score of a reply to a prompt. Raises JudgeError."""
        return await asked(self, prompt, reply)

    async def ask(self, prompt: Given, reply: str) -> Verdict:
        """One request."""
        raw = self._content(await self._answer(self._messages(prompt, reply)))
        return Verdict(judge=self.label, reply=reply, score=self._score(raw), raw=raw)

    def _messages(self, prompt: Given, reply: str) -> list[dict[str, Any]]:
        if not isinstance(self.prompt, str):
            return self.prompt(prompt, reply)
        given = {"{prompt}": as_text(prompt), "{reply}": reply}
        # In one pass: a reply may hold "{prompt}".
        return [{"role": "user", "content": re.sub(r"\{prompt\}|\{reply\}", lambda m: given[m[0]], self.prompt)}]

    async def _answer(self, messages: list[dict[str, Any]]) -> Any:
        import httpx

        key = self._key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if not key.isascii() or not key.isprintable():
            raise JudgeError(f"the judge {self.shown}: {self.key_env} holds characters that no key can have")
        try:
            response = await _client().post(
                f"{self.url.rstrip('/')}/chat/completions", json=self._request | {"messages": messages}, headers=headers
            )
        except httpx.HTTPError as error:
            # Without its text and its cause, which may hold the headers.
            raise TryAgain(f"{type(error).__name__}, so there was no answer: is a server running there?") from None
        status = response.status_code
        if status == 200:
            try:
                return response.json()
            except ValueError:
                raise TryAgain(f"the answer is not JSON: {self._masked(response.text)}") from None
        said = f"HTTP {status}: {self._masked(response.text)}"
        if status in AGAIN or status >= 500:
            raise TryAgain(said, retry_after(response.headers))
        if status in (401, 403):
            said += f". The key is read from the environment variable {self.key_env}" + ("" if key else ", not set now")
        raise JudgeError(f"the judge {self.shown} refused the request with {said}")

    def _content(self, answer: Any) -> str:
        try:
            (choice, *_) = answer["choices"]
            content, reason = choice["message"]["content"], choice.get("finish_reason")
        except (LookupError, TypeError, ValueError):
            content = reason = None
        if not isinstance(content, str):
            raise TryAgain(f"the answer is no chat completion with text: {self._masked(str(answer))}")
        if reason == "length":
            raise TryAgain(f"the verdict was cut off by a limit of tokens: {self._masked(content)}")
        return content

    def _score(self, raw: str) -> float:
        try:
            found = self.parse(raw)
            score, why = math.nan if found is None else float(found), "found no score in"
        except Exception as error:  # the user's function may raise anything
            score, why = math.nan, f"raised {type(error).__name__} ({self._masked(str(error))}) for"
        if not math.isfinite(score):
            raise TryAgain(f"`parse` {why} the verdict {self._masked(raw)}")
        return score

    @property
    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip()

    def _masked(self, text: str) -> str:
        """What a server sent, as it may be in a message: some servers repeat the key."""
        return repr(shortened(text.replace(self._key, "***") if self._key else text, 160))


def number_after(words: str, low: float | int, high: float | int) -> Callable[[str], float | None]:
    """A `parse` that takes the number behind the last `words`, such as "Score:"; none where it is outside of
    [low, high]."""
    return partial(_number_after, words=words, low=low, high=high)


def _number_after(verdict: str, *, words: str, low: float, high: float) -> float | None:
    found = re.findall(re.escape(words) + r"[\s*]*(-?\d+(?:\.\d+)?)", verdict, re.IGNORECASE)
    return float(found[-1]) if found and low <= float(found[-1]) <= high else None


def as_text(prompt: Given) -> str:
    """A prompt as text: its messages one below the other, with their roles where there are several."""
    if isinstance(prompt, str):
        return prompt
    messages = [m for m in prompt if isinstance(m, dict)]
    if len(messages) != len(prompt):
        raise JudgeError("a judge reads text or messages, and this prompt is a list of token ids: decode it first")
    texts = [str(m.get("content", "")) for m in messages]
    if len(messages) == 1:
        return texts[0]
    return "\n\n".join(f"{m['role']}: {text}" for m, text in zip(messages, texts, strict=True))


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header: a number of seconds, or a date; 0 without one."""
    given = headers.get("retry-after", "").strip()
    if given.isdigit():
        return float(given)
    date = parsedate_tz(given)
    return max(0.0, mktime_tz(date) - time()) if date else 0.0


@cache
def _client() -> Any:
    """The connections of all judges. Deadline and concurrency are those of `Calls`."""
    import httpx

    return httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))
