"""What is printed is no reason to end: a terminal without UTF-8, a reader that leaves, a disk that is full."""

import io
import os
import subprocess
import sys

import pytest

from trainer.tracking.terminal import console, escape_unencodable, flush_output, plus_minus


@pytest.fixture(autouse=True)
def _speaks_again():
    yield
    console.quiet = False


@pytest.mark.slow
def test_output_that_is_piped_to_head_ends_with_status_0():
    program = (
        "from trainer.tracking.terminal import console, flush_output\n"
        "for line in range(5000): console.print('x' * 60)\n"
        "flush_output()\n"
        "print('came to the end', file=open(3, 'w'))\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "{sys.executable}" -c "$PROGRAM" 3>&2 | head -n 1'],
        env=os.environ | {"PROGRAM": program},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "came to the end\n")


def broken(kind):
    if kind == "full":
        return open("/dev/full", "w")
    if kind == "none":
        return None
    if kind == "reader left":
        read, write = os.pipe()
        os.close(read)
        return os.fdopen(write, "w")
    closed = io.StringIO()
    closed.close()
    return closed


@pytest.mark.parametrize("kind", ["full", "none", "reader left", "closed"])
def test_output_that_nobody_takes_is_lost_and_nothing_else(monkeypatch, kind):
    monkeypatch.setattr(sys, "stdout", broken(kind))
    for _ in range(300):
        console.print("x " * 50, highlight=False)
    flush_output()
    if kind in ("full", "reader left"):
        sys.stdout.close()  # Python's own flush at exit has nowhere to fail any more


def test_what_could_not_be_printed_is_not_printed_again(monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken("closed"))
    console.print("lost")
    heard = io.StringIO()
    monkeypatch.setattr(sys, "stdout", heard)
    console.print("heard")
    assert heard.getvalue() == "heard\n"


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", b"n\\xe4me +- \\U0001f600"),
        ("iso-8859-1", b"n\xe4me \xb1 \\U0001f600"),
        ("utf-8", "näme ± 😀".encode()),
    ],
)
def test_a_terminal_gets_what_it_can_show_and_escapes_for_the_rest(monkeypatch, encoding, written):
    took = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(took, encoding=encoding))
    escape_unencodable()
    console.print(f"näme {plus_minus()} 😀")
    print("näme")
    sys.stdout.flush()
    assert took.getvalue().startswith(written + b"\n")
