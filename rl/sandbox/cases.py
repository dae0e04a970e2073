"""Which share of hidden cases does a program pass? The judge of code rewards."""

from collections.abc import Callable, Iterable

from rl.sandbox.types import Content, Sandbox


def share_passed(
    make: Callable[[], Sandbox], program: str, cases: Iterable[tuple[Content, str]], *, seconds: float = 5.0
) -> float:
    """The share of cases, 0 to 1, in which a Python program writes the wanted output and ends well.

    `make` makes a sandbox, for example `Bubblewrap`: each case has a new one. A case is the standard input, which the
    program reads, and the wanted output, which never enters a sandbox: it is compared here, without white space at the
    ends of lines. `seconds` bound each case: many times what a right program needs, because a busy machine is slow.
    Raises EnvError when a sandbox fails.
    """
    passed = [_passes(make(), program, given, wanted, seconds) for given, wanted in cases]
    if not passed:
        raise ValueError("share_passed needs at least one case: (standard input, wanted output)")
    return sum(passed) / len(passed)


def _passes(box: Sandbox, program: str, given: Content, wanted: str, seconds: float) -> bool:
    box.start()
    try:
        ran = box.run(["python", "main.py"], stdin=given, files={"main.py": program}, timeout=seconds)
    finally:
        box.stop()
    return ran.well and _lines(ran.stdout) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
