"""Which share of hidden cases does a program pass? The judge of code rewards."""

from collections.abc import Callable, Iterable

from rl.sandbox.types import Content, Ran, Sandbox

HANGS = 3
"""After so many cases that ran out of time a program is not run on the others."""


def share_passed(
    make: Callable[[], Sandbox], program: str, cases: Iterable[tuple[Content, str]], *, seconds: float = 5.0
) -> float:
    """The share of cases, 0 to 1, in which a Python program writes the wanted output and ends well.

    `make` makes a sandbox, for example `Bubblewrap`: each case has a new one. A case is the standard input, which the
    program reads, and the wanted output, which never enters a sandbox: it is compared here, without white space at the
    ends of lines. `seconds` bound each case: many times what a right program needs, because a busy machine is slow. A
    program that took longer in three cases has not passed the others, so one that hangs cannot reach the deadline of a
    reward, which would end the run. Raises EnvError when a sandbox fails, and TypeError for a case that is no text.
    """
    if not callable(make):
        name = type(make).__name__
        raise TypeError(f"share_passed makes a sandbox for each case: give it {name}, or lambda: {name}(...)")
    cases, passed, hung = [*cases], 0, 0
    if not cases:
        raise ValueError("share_passed needs at least one case: (standard input, wanted output)")
    for given, wanted in cases:
        if type(given) not in (str, bytes) or type(wanted) is not str:
            raise TypeError(
                f"a case is two texts, (standard input, wanted output), and this one is {(given, wanted)!r}"
            )
        if hung < HANGS:
            ran = _ran(make(), program, given, seconds)
            hung += ran.timed_out
            passed += ran.well and _lines(ran.stdout) == _lines(wanted)
    return passed / len(cases)


def _ran(box: Sandbox, program: str, given: Content, seconds: float) -> Ran:
    box.start()
    try:
        return box.run(["python", "main.py"], stdin=given, files={"main.py": program}, timeout=seconds)
    finally:
        box.stop()


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
