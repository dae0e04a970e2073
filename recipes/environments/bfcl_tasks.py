"""The multi-turn tasks of the Berkeley Function Calling Leaderboard (BFCL v4): their tools, their simulators, and the
verdict of the benchmark.

The wheel `bfcl-eval` (Apache-2.0) has the tasks, eight simulators, and the checks of states and of results:

    .venv/bin/pip install --no-deps bfcl-eval==2026.3.23
"""

import ast
import copy
import decimal
import importlib
import inspect
import json
import threading
from pathlib import Path

import mpmath

from rl.environments import Episode, Step, ToolError, Turn
from rl.types import Data, Example

try:
    from bfcl_eval.constants import default_prompts as prompts  # pyright: ignore[reportMissingImports]
    from bfcl_eval.constants import executable_backend_config as files  # pyright: ignore[reportMissingImports]
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker as verdict  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(f"{error}: run .venv/bin/pip install --no-deps bfcl-eval==2026.3.23") from error

KINDS = ("base", "miss_func", "miss_param", "long_context")
"""Each has the same 200 scenarios: as they are; with a tool that is shown one turn late; with an argument that the user
gives one turn late; with long results."""
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""Words of the benchmark that JSON schema has not."""
BOUNDED = ("exponent", "precision", "decimal_places")
MOST = 1000
"""Above it such an argument of the calculator could keep a processor busy for hours."""
ONE_CALL = threading.Lock()
"""The precision of mpmath is global, and a simulator of long results writes into a global table."""


def read(name: str) -> list[dict]:
    """The lines of a file of the benchmark."""
    text = (Path(prompts.__file__).parents[1] / "data" / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def schema(doc: dict) -> dict:
    """A function's description as chat templates show it, with what it returns."""

    def typed(part):
        if isinstance(part, list):
            return [typed(each) for each in part]
        if not isinstance(part, dict):
            return part
        kind = part.get("type")
        renamed = {"type": TYPES.get(kind, kind)} if isinstance(kind, str) else {}
        return {key: typed(each) for key, each in part.items()} | renamed

    return {"type": "function", "function": typed(doc)}


def examples(kind: str) -> list[Example]:
    """The 200 tasks of a kind."""
    docs = {name: read(f"multi_turn_func_doc/{file}") for name, file in files.MULTI_TURN_FUNC_DOC_FILE_MAPPING.items()}
    answers = read(f"possible_answer/BFCL_v4_multi_turn_{kind}.json")
    found: list[Example] = []
    for given, answer in zip(read(f"BFCL_v4_multi_turn_{kind}.json"), answers, strict=True):
        tools = {doc["name"]: schema(doc) for name in given["involved_classes"] for doc in docs[name]}
        missed = given.get("missed_function", {})
        late = {int(turn): [tools.pop(name) for name in names] for turn, names in missed.items()}
        # The prompt cannot change any more: tools that come late are in a message, as for models without native calls.
        news = {
            turn: prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING.format(functions=json.dumps(shown))
            for turn, shown in late.items()
        }
        users = [
            [{"role": "user", "content": news[turn]}] if turn in news else said
            for turn, said in enumerate(given["question"])
        ]
        task = {
            "id": given["id"],
            "classes": given["involved_classes"],
            "initial": given["initial_config"],
            "users": users[1:],
            "truth": answer["ground_truth"],
            "long": kind == "long_context",
        }
        found.append(Example(prompt=users[0], task=task, tools=list(tools.values())))
    return found


def tasks(train: tuple[str, ...] = ("base",), every: int = 5) -> Data:
    """Scenarios 0, 5, 10 and so on of each kind are held out, and no kind is trained on them; `every=1` holds out all
    800 tasks, which is the whole benchmark."""
    kinds = {kind: examples(kind) for kind in KINDS}
    held_out = {kind: some[::every] for kind, some in kinds.items()}
    rest = [each for kind in train for i, each in enumerate(kinds[kind]) if i % every]
    return Data(train=rest or kinds["base"], evals=held_out)


class Simulators:
    """The objects of one task, and their methods by name."""

    def __init__(self, task: dict) -> None:
        self.objects: dict[str, object] = {}
        self.methods: dict = {}
        for name in task["classes"]:
            made = getattr(importlib.import_module(files.CLASS_FILE_PATH_MAPPING[name]), name)()
            if name not in files.STATELESS_CLASSES:
                made._load_scenario(copy.deepcopy(task["initial"].get(name, {})), long_context=task["long"])
            self.objects[name] = made
            methods = inspect.getmembers(made, inspect.ismethod)
            self.methods |= {key: method for key, method in methods if not key.startswith("_")}

    def call(self, name: str, arguments: dict) -> str:
        """What a method returns, as the benchmark writes it. Raises ToolError."""
        if name not in self.methods:
            raise ToolError(f"Error during execution: name '{name}' is not defined")
        if any(isinstance(arguments.get(key), int | float) and abs(arguments[key]) > MOST for key in BOUNDED):
            raise ToolError(f"Error during execution: an argument is larger than {MOST}")
        try:
            with ONE_CALL, mpmath.workdps(mpmath.mp.dps), decimal.localcontext():
                result = self.methods[name](**arguments)
                return result if isinstance(result, str) else self.written(result)
        except Exception as error:  # the benchmark itself gives whatever a simulator raises to the policy
            raise ToolError(f"Error during execution: {error}") from error

    @staticmethod
    def written(result: object) -> str:
        """A result as text: dictionaries as JSON where that is possible."""
        try:
            return json.dumps(result) if isinstance(result, dict) else str(result)
        except TypeError:
            return str(result)


class Bfcl:
    """A conversation with a user who has one request after the other. The policy has its task's tools for each."""

    def __init__(self, task):
        self.task, self.turn = task, 0
        self.ours, self.truth = Simulators(task), Simulators(task)
        self.results: list[str] = []
        self.called = False
        self.wrong = ""
        """Why the verdict is 0, as soon as it is."""

    def call(self, name: str, arguments: dict) -> str:
        self.called = True
        try:
            result = self.ours.call(name, arguments)
        except ToolError as error:
            self.results.append(str(error))
            raise
        self.results.append(result)
        return result

    def reply(self, turn: Turn) -> Step | None:
        """The user's next request. A conversation that has failed ends, because nothing can change its verdict."""
        self.judge()
        self.turn, self.called = self.turn + 1, False
        if self.wrong or self.turn == len(self.task["truth"]):
            return None
        return Step(observation=self.task["users"][self.turn - 1])

    def judge(self) -> None:
        """Are the states now, and the results until now, those of the right calls of this turn?"""
        expected: list[str] = []
        for name, arguments in right_calls(self.truth, self.task["truth"][self.turn]):
            try:
                expected.append(self.truth.call(name, arguments))
            except ToolError as error:
                expected.append(str(error))
        if not expected:
            return  # a tool or an argument is missing; the benchmark does not look at what was done meanwhile
        if not self.called:
            self.wrong = f"no call in turn {self.turn}"
            return
        try:
            states = verdict.state_checker(self.ours.objects, self.truth.objects)
        except RecursionError:  # a folder that was moved into itself
            states = {"valid": False, "error_message": "the states have no end"}
        found = verdict.response_checker(self.results, expected, self.turn)
        self.wrong = next((each["error_message"] for each in (states, found) if not each["valid"]), "")

    def reward(self, episode: Episode) -> float:
        whole = episode.ended == "done" and self.turn == len(self.task["truth"])
        return float(whole and not self.wrong and longest(episode) <= prompts.MAXIMUM_STEP_LIMIT)


def right_calls(simulators: Simulators, lines: list[str]):
    """The calls (name, arguments) of a turn, from the Python code that the benchmark has."""
    for line in lines:
        call = ast.parse(line, mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        names = inspect.signature(simulators.methods[call.func.id]).parameters
        given = dict(zip(names, call.args, strict=False)) | {each.arg: each.value for each in call.keywords}
        yield call.func.id, {name: ast.literal_eval(value) for name, value in given.items()}


def longest(episode: Episode) -> int:
    """The most turns with calls between two requests of the user."""
    most = steps = 0
    for turn in episode.turns:
        steps = steps + 1 if turn.calls else 0
        most = max(most, steps)
    return most
