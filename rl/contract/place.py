"""Which line of the user's file is it? Of a method, of an error, of the first NaN, of a change in place."""

import inspect
import linecache
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import rl
from rl.objectives.objective import Objective

OURS = str(Path(rl.__file__).parent)
DRAWS = re.compile(r"rand|dropout|bernoulli|multinomial|normal|uniform_|exponential_|poisson|gumbel")
IN_PLACE = re.compile(r"^(__i\w+__|__setitem__|[a-z]\w*[^_]_)$")


def codes(objective: Objective) -> Iterator[tuple[str, CodeType]]:
    """The methods of an objective by name, nearest class first."""
    for cls in type(objective).__mro__[:-1]:
        for name, member in vars(cls).items():
            if inspect.isfunction(member):
                yield name, inspect.unwrap(member).__code__


def own_files(objective: Objective) -> set[str]:
    """The files that the user wrote: where the methods are, without this package's own."""
    files = {code.co_filename for _, code in codes(objective)} - {"<string>"}
    return {file for file in files if not file.startswith(OURS) and Path(file).is_file()} & {
        file for file in files if "/dist-packages/" not in file and "/site-packages/" not in file
    }


def written(file: str, line: int) -> str:
    """A place as text."""
    return f"{Path(file).name}, line {line}"


def line_of(objective: Objective, method: str) -> str:
    """The line where the user's file defines a method; empty where it only inherits it."""
    for name, code in codes(objective):
        if name == method:
            file, line = code.co_filename, code.co_firstlineno
            while linecache.getline(file, line).lstrip().startswith("@"):
                line += 1
            return written(file, line) if file in own_files(objective) else ""
    return ""


def line_of_error(objective: Objective, error: BaseException) -> str:
    """The last line of the user's file that an error came through."""
    files = own_files(objective)
    lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    return written(lines[-1].filename, lines[-1].lineno or 0) if lines else ""


def line_of_frame(frame: FrameType | None, files: set[str]) -> str:
    """The innermost line of the user's file that is being run."""
    while frame is not None:
        if frame.f_code.co_filename in files:
            return written(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return ""


class Watch(TorchFunctionMode):
    """Keeps the first line of the user's file after which `wrong(name, arguments, result)` holds."""

    def __init__(self, objective: Objective, wrong: Callable[[str, Any, Any], bool]) -> None:
        super().__init__()
        self.files, self.wrong, self.line = own_files(objective), wrong, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: dict[str, Any] = kwargs or {}
        result = func(*args, **given)
        name = "out_" if "out" in given else getattr(func, "__name__", "")
        if not self.line and self.wrong(name, [given["out"]] if "out" in given else args, result):
            self.line = line_of_frame(inspect.currentframe(), self.files)
        return result


def line_where(objective: Objective, wrong: Callable[[str, Any, Any], bool], call: Callable[[], object]) -> str:
    """The first line of the user's file after which `wrong` holds, while `call` runs; empty when there is none."""
    watch = Watch(objective, wrong)
    with watch:
        call()
    return watch.line


def is_nan(name: str, args: Any, result: Any) -> bool:
    """Whether an operation gave a NaN."""
    return isinstance(result, Tensor) and result.is_floating_point() and bool(result.isnan().any())


def is_infinite(name: str, args: Any, result: Any) -> bool:
    """Whether an operation gave an infinite number."""
    return isinstance(result, Tensor) and result.is_floating_point() and bool(result.isinf().any())


def is_draw(name: str, args: Any, result: Any) -> bool:
    """Whether an operation draws random numbers."""
    return DRAWS.search(name) is not None


def changes(kept: dict[str, Tensor]) -> Callable[[str, Any, Any], bool]:
    """Whether an operation changed one of these tensors in place."""
    where = {x.untyped_storage().data_ptr() for x in kept.values()}

    def wrong(name: str, args: Any, result: Any) -> bool:
        first = args[0] if args else None
        return (
            IN_PLACE.match(name) is not None
            and isinstance(first, Tensor)
            and first.untyped_storage().data_ptr() in where
        )

    return wrong


def line_of_nan(objective: Objective, call: Callable[[], object], *, infinite_first: bool = False) -> str:
    """The line whose operation gives the first NaN, else the first infinity, else the one whose gradient is NaN."""
    for wrong in (is_infinite, is_nan) if infinite_first else (is_nan, is_infinite):
        if line := line_where(objective, wrong, call):
            return line
    files = own_files(objective)
    with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        with suppress(RuntimeError):  # anomaly mode raises it, after a warning with the forward pass's traceback
            call()
    frames = re.findall(r'File "([^"]+)", line (\d+)', "\n".join(str(w.message) for w in caught))
    lines = [written(file, int(line)) for file, line in frames if file in files]
    return lines[-1] if lines else ""
