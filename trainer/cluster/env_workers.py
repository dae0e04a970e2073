"""Environments in processes of their own, so that what they compute holds up neither the driver nor each other."""

from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from rl.environments.host import Work, abandoned, close, offered
from rl.environments.threads import Threads
from rl.environments.types import EnvError, EnvLate, ToolError
from rl.typed import shortened
from trainer.cluster.process_env import python_path

MOST_CALLS = 4096
"""Calls to one process at the same time."""
Answer = tuple[str, Any]
"""What came of a call: its kind, and its value or the text of its error, because not every error can be sent."""


class EnvProcess:
    """One process. It holds environments by number."""

    def __init__(self, env: Callable[..., Any]) -> None:
        self.env, self.threads = env, Threads()
        self.environments: dict[int, Any] = {}
        self.making: set[int] = set()

    async def make(self, number: int, task: Mapping[str, Any], seconds: float) -> Answer:
        """Make an environment; returns which optional methods it has."""
        self.making.add(number)
        kind, made = await self._answer(lambda: self.env(task), seconds, abandoned)
        wanted = number in self.making
        self.making.discard(number)
        if kind != "result":
            return kind, made
        if not wanted:  # it was closed before it was made
            abandoned(made)
            return kind, frozenset()
        self.environments[number] = made
        return kind, offered(made)

    async def run(self, number: int, work: Work, seconds: float) -> Answer:
        """Call a method of an environment."""
        environment = self.environments[number]
        return await self._answer(lambda: work(environment), seconds)

    async def close(self, number: int, seconds: float) -> Answer:
        """Close an environment, and forget it."""
        self.making.discard(number)
        environment = self.environments.pop(number, None)
        if environment is None or "close" not in offered(environment):
            return "result", None
        return await self._answer(lambda: close(environment), seconds)

    async def _answer(
        self, work: Callable[[], Any], seconds: float, unwanted: Callable[[Any], None] | None = None
    ) -> Answer:
        try:
            return "result", await self.threads.run(work, seconds, unwanted)
        except ToolError as error:
            return "tool", str(error)
        except EnvLate as error:
            return "late", str(error)
        except EnvError as error:
            return "fault", str(error)
        except Exception as error:
            return "fault", f"raised {type(error).__name__}: {shortened(str(error), 180)}"


class EnvWorkers:
    """A host of environments in `count` processes. One that dies is replaced; its environments have failed."""

    def __init__(self, env: Callable[..., Any], count: int) -> None:
        self.env = env
        self.processes = [self._process() for _ in range(count)]
        self.load = [0] * count
        self.made = 0

    def _process(self) -> Any:
        # What the driver can import, the process can: an environment may live in a file next to its recipe.
        variables = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        options = {"num_cpus": 0, "max_concurrency": MOST_CALLS, "runtime_env": {"env_vars": variables}}
        return ray.remote(EnvProcess).options(**options).remote(self.env)

    async def make(self, task: Mapping[str, Any], seconds: float) -> "Remote":
        """A new environment, in the process with the fewest."""
        index = min(range(len(self.load)), key=self.load.__getitem__)
        self.made += 1
        self.load[index] += 1
        process, number = self.processes[index], self.made
        try:
            offers = await self.answer(index, process, process.make.remote(number, dict(task), seconds))
        except BaseException:
            self.load[index] -= 1
            process.close.remote(number, seconds)
            raise
        return Remote(self, index, process, number, offers)

    async def answer(self, index: int, process: Any, ref: Any) -> Any:
        """The result of a call. Raises ToolError, EnvLate, and EnvError, also when the process has died."""
        try:
            kind, value = await ref
        except RayActorError as error:
            if self.processes[index] is process:
                self.processes[index] = self._process()
            raise EnvError(f"lost its process, environment worker {index}: {str(error).splitlines()[0]}") from None
        if kind == "result":
            return value
        raise {"tool": ToolError, "late": EnvLate, "fault": EnvError}[kind](value)


class Remote:
    """An environment in another process."""

    def __init__(self, workers: EnvWorkers, index: int, process: Any, number: int, offers: frozenset[str]) -> None:
        self.workers, self.index, self.process, self.number, self.offers = workers, index, process, number, offers

    async def run(self, work: Work, seconds: float) -> Any:
        """What the work returns."""
        ref = self.process.run.remote(self.number, work, seconds)
        return await self.workers.answer(self.index, self.process, ref)

    async def close(self, seconds: float) -> None:
        """End it there."""
        self.workers.load[self.index] -= 1
        await self.workers.answer(self.index, self.process, self.process.close.remote(self.number, seconds))
