"""A lease for this process: adopted from `portd run` or leased anew, kept, and given back at exit.

    with portd_client.lease("orders") as lease:
        serve(lease.listen())

One daemon thread keeps each lease; it ends with the lease. A crash needs nothing: the daemon sees it.
"""

from __future__ import annotations

import os
from time import monotonic, sleep

from . import calls, steps
from .client import Client
from .errors import DaemonUnavailable, PortdError, ProtocolError, Retryable
from .state import LeaseState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal, Unpack

    from .listening import LeasedSocket
    from .types import LeaseOptions, LeaseRequest, Status

    OnChange = Callable[["Lease"], object]

RELEASE_TIMEOUT_S = 2.0
"""Seconds that giving a lease back may take at exit: a process that hangs because a daemon does is worse."""

_open: set[Lease] = set()


def lease(
    service: str,
    *,
    client: Client | None = None,
    fallback: Literal["ephemeral"] | None = None,
    on_change: OnChange | None = None,
    drain_s: float = 0.0,
    **options: Unpack[LeaseOptions],
) -> Lease:
    """Lease a port for this process, or adopt the one that `portd run` leased for it.

    `fallback="ephemeral"` takes a port of the kernel's choice where no daemon answers, and logs that once. `on_change`
    is called, in another thread, when the lease had to be taken again on another port: bind that one then. Without it
    the port never changes. With `drain_s` it leaves look-ups that many seconds before it is given back, at exit too:
    the main thread waits, the others serve on. Raises DaemonUnavailable or the Problem.
    """
    made = Lease(client or Client(), steps.wish(service, options), on_change, drain_s)
    given = steps.given(os.environ, made.endpoint)
    try:
        found = None if given is None else drive(made.client, steps.adopt(given, made.wish))
        if found is None:
            made.take(made.client.grant(made.wish))
        elif given is not None:
            made.take(found, given.token, adopted=True)
    except DaemonUnavailable as error:
        if fallback != "ephemeral":
            raise
        made.fall_back(error)
        return made
    made.start_keeping()
    return made


def listen(
    service: str,
    *,
    backlog: int = 128,
    client: Client | None = None,
    fallback: Literal["ephemeral"] | None = None,
    on_change: OnChange | None = None,
    drain_s: float = 0.0,
    **options: Unpack[LeaseOptions],
) -> LeasedSocket:
    """Return a listening socket on a leased port; its `lease` is given back when it is closed, or at exit.

    asyncio, uvicorn, gunicorn, aiohttp and socketserver take it as it is. For `udp` it is bound, for nothing listens
    there. What else there is to say: see `lease`.
    """
    made = lease(service, client=client, fallback=fallback, on_change=on_change, drain_s=drain_s, **options)
    try:
        return made.listen(backlog)
    except BaseException:
        made.release()
        raise


def drive(client: Client, sequence: steps.Steps) -> Any:
    """Make the calls of a sequence, and return its result."""
    try:
        request = next(sequence)
        while True:
            try:
                answer = client.call(request)
            except PortdError as error:
                request = sequence.throw(error)
            else:
                request = sequence.send(answer)
    except StopIteration as stop:
        return stop.value


class Lease(LeaseState):
    """A lease of this process. Made by `lease`; `release`, or leaving the `with` block, gives it back."""

    def __init__(
        self, client: Client, wish: LeaseRequest, on_change: OnChange | None = None, drain_s: float = 0.0
    ) -> None:
        super().__init__(wish, drain_s)
        self.client = client
        self.is_released = False
        self._on_change = on_change
        self._reserved: Any = None
        self._pid = os.getpid()
        self._leaves_at: float | None = None
        self._stop: Any = None
        self._thread: Any = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def listen(self, backlog: int = 128) -> LeasedSocket:
        """Return the lease's socket, listening: passed by `portd run`, handed over, or bound here.

        A bound one gives a port that turns out to be taken back, and tries another. For a lease of `both` protocols it
        is the TCP socket; `sockets` returns the two.
        """
        return self.sockets(backlog)[0]

    def sockets(self, backlog: int = 128) -> list[LeasedSocket]:
        """Return the lease's sockets, TCP before UDP."""
        from .listening import open_sockets

        reserved, self._reserved = self._reserved, None
        return open_sockets(self, backlog, reserved)

    def decline(self) -> None:
        """Give the port back as taken by somebody else; afterwards `port` is another."""
        self.document = self.client.call(calls.decline(self.id, self.token))

    def report(self, status: Status, note: str = "") -> None:
        """Report health, for a lease whose check is `report`."""
        if self.id:
            self.client.call(calls.report(self.id, status, note, self.token))

    def drain(self, on: bool = True) -> None:
        """Leave look-ups and keep the port; `drain(False)` comes back."""
        if self.id:
            self.document = self.client.call(calls.drain(self.id, on, self.token))

    def release(self) -> None:
        """Give the lease back, drained if it is to be; may be called twice. No daemon is no error here.

        Does nothing in a forked child.
        """
        if self.is_released or os.getpid() != self._pid:
            return
        self.drain_out()
        self.is_released = True
        if self._reserved is not None:
            self._reserved.close()
        if not self.id:
            return
        _open.discard(self)
        self._stop.set()
        import threading

        if threading.current_thread() is not self._thread:
            self._thread.join(RELEASE_TIMEOUT_S)
        if not self.is_mine:
            return
        try:  # noqa: SIM105 - contextlib costs 3 ms
            self.client.call(calls.release(self.id, self.token), timeout_s=RELEASE_TIMEOUT_S)
        except PortdError:
            pass  # the daemon ends the lease when this process is gone, or when its clock runs out

    def start_leaving(self) -> float:
        """Drain, if `drain_s` asks for that, the first time; returns the monotonic second from which on it may go."""
        if self._leaves_at is None:
            self._leaves_at = 0.0
            if self.drain_s and self.is_mine and os.getpid() == self._pid:
                try:
                    self.client.call(calls.drain(self.id, True, self.token), timeout_s=RELEASE_TIMEOUT_S)
                    self._leaves_at = monotonic() + self.drain_s
                except PortdError:
                    pass  # nobody can be told, so there is nothing to wait for
        return self._leaves_at

    def drain_out(self) -> None:
        """Leave look-ups and wait `drain_s`, once; the sockets stay open meanwhile."""
        sleep(max(self.start_leaving() - monotonic(), 0.0))

    # --- keeping ---

    def start_keeping(self) -> None:
        """Keep the lease in the background from now on, and give it back at exit."""
        import threading

        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_on, name=f"portd {self.service}", daemon=True)
        self._thread.start()
        _open.add(self)
        _release_at_exit()

    def fall_back(self, error: DaemonUnavailable) -> None:
        """Take a port of the kernel's choice instead of a lease."""
        from .listening import ephemeral

        _log("portd: %s; taking a port of the kernel's choice for %s", error, self.service)
        self._reserved = ephemeral(self, error)

    def _keep_on(self) -> None:
        from random import random

        pause_s = steps.pause_s(self.document, random())
        while not self._stop.wait(pause_s):
            try:
                self._keep_once()
                pause_s = steps.pause_s(self.document, random())
            except (DaemonUnavailable, ProtocolError, Retryable):
                pause_s = min(steps.RETRY_S, pause_s)
            except PortdError as error:
                _log("portd: the lease of %s is lost, and can't be had again: %s", self, error)
                pause_s = steps.CHECK_S

    def _keep_once(self) -> None:
        found = drive(
            self.client, steps.keep(self.document, self.token, self.wish, may_move=self._on_change is not None)
        )
        if not self._stop.is_set() and self.keep(found) and self._on_change is not None:
            try:
                self._on_change(self)
            except Exception as error:  # the program's own fault must not end the keeping of its lease
                _log("portd: on_change failed for %s: %r", self, error, exc_info=error)


def _log(message: str, *arguments: object, exc_info: BaseException | None = None) -> None:
    import logging

    logging.getLogger("portd_client").warning(message, *arguments, exc_info=exc_info)


_is_hooked = False


def _release_at_exit() -> None:
    """Give back what is open at a normal exit, and at SIGTERM where nobody else minds it."""
    global _is_hooked
    import atexit
    import signal
    import threading

    if not _is_hooked:
        _is_hooked = True
        atexit.register(release_all)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, on_sigterm)


def release_all() -> None:
    """Give back everything that is held; all are drained at the same time."""
    for one in list(_open):
        one.start_leaving()
    for one in list(_open):
        one.release()


def on_sigterm(number: int, frame: object) -> None:
    """Give everything back and die of the signal, as without us: whoever waits sees why. A second one does not wait."""
    import signal

    signal.signal(number, signal.SIG_DFL)
    release_all()
    os.kill(os.getpid(), number)
