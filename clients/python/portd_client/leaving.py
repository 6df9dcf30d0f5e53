"""Releasing what is open when the process ends: at a normal exit, and at signals where the program asks for that."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from .leasing import Lease

open_leases: set[Lease] = set()
"""The blocking leases of this process that are not released yet."""
on_loop: list[Callable[[int], bool]] = []
"""The asyncio side's way to leave, once that is imported: it returns False where no loop runs."""
_is_registered = False


def release_at_exit() -> None:
    """Release what is open at a normal exit of the interpreter."""
    global _is_registered
    import atexit

    if not _is_registered:
        _is_registered = True
        atexit.register(release_all)


def release_all() -> None:
    """Release every blocking lease; all are drained at the same time."""
    for one in list(open_leases):
        one._start_leaving()
    for one in list(open_leases):
        one.release()


def release_on_signal(*signals: int) -> Callable[[], None]:
    """Release all leases, blocking and asyncio, when one of the signals comes; then die of it, as without portd.

    Without arguments that is SIGTERM: Python ends by it without cleaning up (at SIGINT it raises KeyboardInterrupt, and
    the leases are released at exit). A second signal does not wait. A signal that the program handles itself is left
    alone: it releases its leases when it stops. Call it in the main thread; returns a function that undoes it. Without
    it the daemon ends a process' leases itself, at once but undrained, and ttl leases when their time is over.
    """
    import signal

    handled = [one for one in signals or (signal.SIGTERM,) if signal.getsignal(one) == signal.SIG_DFL]
    for one in handled:
        signal.signal(one, _on_signal)

    def undo() -> None:
        for one in handled:
            if signal.getsignal(one) is _on_signal:
                signal.signal(one, signal.SIG_DFL)

    return undo


def _on_signal(number: int, frame: FrameType | None) -> None:
    import signal

    signal.signal(number, signal.SIG_DFL)
    if not any(leave(number) for leave in on_loop):
        release_all()
        os.kill(os.getpid(), number)
