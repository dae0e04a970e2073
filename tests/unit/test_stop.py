"""How does a run end at Ctrl-C? Once, however often it is pressed."""

import asyncio
import os
import signal

from trainer.stop import Stop, run_stoppable, stoppable


def interrupted(signals):
    """A task that gets signals while it works and while it cleans up; how far it came."""
    came = []

    async def main():
        with stoppable(5.0):
            try:
                os.kill(os.getpid(), signals[0])
                async with asyncio.timeout(10):
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                for number in signals[1:]:
                    os.kill(os.getpid(), number)
                for _ in range(10):
                    await asyncio.sleep(0)
                came.append("cleaned up")
                raise

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        run_stoppable(main())
    except BaseException as end:
        came.append(repr(end))
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after[signal.SIGTERM] == signal.SIG_DFL
    return came


def test_three_times_ctrl_c_is_one():
    assert interrupted([signal.SIGINT] * 3) == ["cleaned up", "KeyboardInterrupt()"]


def test_sigterm_after_ctrl_c_and_ctrl_c_after_sigterm_end_it_once():
    assert interrupted([signal.SIGINT, signal.SIGTERM, signal.SIGINT]) == ["cleaned up", "KeyboardInterrupt()"]
    assert interrupted([signal.SIGTERM, signal.SIGTERM]) == ["cleaned up", "SystemExit(143)"]


def test_a_terminal_that_is_closed_is_like_sigterm_but_not_under_nohup():
    assert interrupted([signal.SIGHUP]) == ["cleaned up", "SystemExit(143)"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        async def main():
            stop = Stop(5.0)
            stop.listen()
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0)
            assert not stop.asked

        asyncio.run(main())
    finally:
        signal.signal(signal.SIGHUP, before)
