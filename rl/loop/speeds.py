"""How fast is each engine? Its tokens over the seconds in which it had something to sample."""

import time
from collections.abc import Callable


class Speeds:
    """The engines of one run, by number. Requests of agents are not counted: they come from outside."""

    def __init__(self, engines: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.tokens, self.busy, self.under_way = [0] * engines, [0.0] * engines, [0] * engines
        self.began = [0.0] * engines

    def begin(self, engine: int) -> None:
        """An engine gets a group."""
        if not self.under_way[engine]:
            self.began[engine] = self.clock()
        self.under_way[engine] += 1

    def end(self, engine: int, tokens: int) -> None:
        """It returns the group, with so many sampled tokens; 0 if it was lost."""
        self.under_way[engine] -= 1
        self.tokens[engine] += tokens
        if not self.under_way[engine]:
            self.busy[engine] += self.clock() - self.began[engine]

    def metrics(self) -> dict[str, float]:
        """Tokens per second of each engine since the last time; none of an engine that returned nothing, and none for a
        single engine."""
        now, found = self.clock(), dict[str, float]()
        for i, tokens in enumerate(self.tokens):
            seconds = self.busy[i] + (now - self.began[i] if self.under_way[i] else 0.0)
            if tokens and seconds and len(self.tokens) > 1:
                found[f"perf/engine_{i}/tokens_per_s"] = tokens / seconds
                self.tokens[i], self.busy[i], self.began[i] = 0, 0.0, now
        return found
