"""A lease for this process: adopted from `portd run` or granted, kept in the background, and released at exit.

    with portd_client.lease("orders") as lease:
        serve(lease.listen())

One daemon thread keeps each lease; it ends with the lease. A crash needs nothing: the daemon notices it.
"""

from __future__ import annotations

import os
from time import monotonic, sleep

from . import calls, leaving, steps
from .client import Client
from .errors import DaemonUnavailable, PortdError, ProtocolError, Retryable
from .state import LeaseHandle, LeaseState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal, Unpack

    from .listening import LeasedSocket
    from .types import LeaseChange, LeaseOptions, LeaseRequest, Status

    OnChange = Callable[["Lease"], object]
    OnLost = Callable[["Lease", PortdError], object]

RELEASE_TIMEOUT_S = 2.0
"""Seconds that a release may take at exit: a process that hangs because a daemon does is worse."""


def lease(
    service: str,
    *,
    client: Client | None = None,
    fallback: Literal["ephemeral"] | None = None,
    on_change: OnChange | None = None,
    on_lost: OnLost | None = None,
    drain_s: float = 0.0,
    **options: Unpack[LeaseOptions],
) -> Lease:
    """Lease a port for this process, or adopt the one that `portd run` leased for it.

    service: its name, a DNS label.
    client: the daemon to use; None is the one that the environment leads to.
    fallback: "ephemeral" uses a port of the kernel's choice where no daemon answers, and logs that once.
    on_change: called in another thread with the lease when it was lost and granted again on another port: bind that one
        then. Without it the port never changes.
    on_lost: called in another thread with the lease and the error when the lease was lost and can't be granted again
        for now, which is tried on and on. Without it that is logged.
    drain_s: seconds between leaving look-ups and the release, at exit too: the main thread waits, others serve on.
    options: see LeaseOptions. They apply to a lease of `portd run` too, as far as they can be changed (`tags`,
        `metadata`, `weight`, `check`, `announce`).

    Raises DaemonUnavailable, or the Problem with which the daemon refuses.
    """
    made = Lease(client or Client(), steps.request(service, options), on_change, on_lost, drain_s)
    made._acquire(fallback)
    return made


def listen(
    service: str,
    *,
    backlog: int = 128,
    client: Client | None = None,
    fallback: Literal["ephemeral"] | None = None,
    on_change: OnChange | None = None,
    on_lost: OnLost | None = None,
    drain_s: float = 0.0,
    **options: Unpack[LeaseOptions],
) -> LeasedSocket:
    """Return a listening socket on a leased port; its `lease` is released when it is closed, or at exit.

    asyncio, uvicorn, gunicorn, aiohttp and socketserver accept it as it is. For `udp` it is bound, for nothing listens
    there. `backlog` is the length of the queue of connections. The other arguments are those of `lease`.
    """
    made = lease(
        service, client=client, fallback=fallback, on_change=on_change, on_lost=on_lost, drain_s=drain_s, **options
    )
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


class Lease(LeaseHandle):
    """A lease of this process. Made by `lease`; `release`, or leaving the `with` block, ends it."""

    def __init__(
        self,
        client: Client,
        request: LeaseRequest,
        on_change: OnChange | None,
        on_lost: OnLost | None,
        drain_s: float,
    ) -> None:
        super().__init__(LeaseState(request, drain_s))
        self._client = client
        self._on_change = on_change
        self._on_lost = on_lost
        self._is_released = False
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
        """Return the lease's socket, listening: passed by `portd run`, handed over by the daemon, or bound here.

        When binding finds the port in use, it is declined for another one. For a lease of `both` protocols this is the
        TCP socket; `sockets` returns the two.
        """
        return self.sockets(backlog)[0]

    def sockets(self, backlog: int = 128) -> list[LeasedSocket]:
        """Return the lease's sockets, TCP before UDP."""
        from .listening import LeasedSocket, open_once, ready, retry_after

        opened, self._reserved = ([self._reserved] if self._reserved is not None else []), None
        declines = 0
        while not opened:
            try:
                opened = open_once(self._client.endpoint, self._state, backlog)
            except Exception as error:
                declines += 1
                retry_after(error, declines)
                self.decline()
        return [LeasedSocket(self, one.detach()) for one in ready(opened, backlog)]

    def renew(self, seconds: float | None = None) -> None:
        """Restart the clock of a ttl lease, which the background does by itself; `seconds` is a new period."""
        self._change(calls.renew(self.id, seconds, self.token))

    def decline(self) -> None:
        """Give the port back as used by somebody else; afterwards `port` is another."""
        self._change(calls.decline(self.id, self.token))

    def transfer(self, pid: int) -> None:
        """Hand the lease over to another process of this host; this one neither keeps nor releases it any more."""
        if self.is_fallback:
            return
        self._change(calls.transfer(self.id, pid, self.token))
        self._is_released = True
        self._stop.set()
        leaving.open_leases.discard(self)

    def change(self, fields: LeaseChange) -> None:
        """Replace tags, metadata, weight, check or announcement."""
        self._change(calls.change(self.id, fields, self.token))
        self._state.request = {**self._state.request, **fields}  # type: ignore[typeddict-item]

    def report(self, status: Status, note: str = "") -> None:
        """Report health, for a lease whose check is `report`."""
        self._change(calls.report(self.id, status, note, self.token))

    def drain(self, on: bool = True) -> None:
        """Leave look-ups and keep the port; `drain(False)` comes back."""
        self._change(calls.drain(self.id, on, self.token))

    def release(self) -> None:
        """Release the lease, after draining for `drain_s`; may be called twice. An absent daemon is no error here.

        Blocks for `drain_s` seconds, and at most 2 more. Does nothing in a forked child.
        """
        if self._is_released or os.getpid() != self._pid:
            return
        self._drain_out()
        self._is_released = True
        if self._reserved is not None:
            self._reserved.close()
        if self.is_fallback:
            return
        leaving.open_leases.discard(self)
        self._stop.set()
        import threading

        if threading.current_thread() is not self._thread:
            self._thread.join(RELEASE_TIMEOUT_S)
        if not self._state.is_mine:
            return
        try:  # noqa: SIM105 - contextlib costs 3 ms
            self._client.call(calls.release(self.id, self.token), timeout_s=RELEASE_TIMEOUT_S)
        except PortdError:
            pass  # the daemon ends the lease when this process is gone, or when its clock runs out

    def _change(self, request: Any) -> None:
        """Make a call that answers with the lease as it is now. A fallback has no daemon to call."""
        if not self.is_fallback:
            self._state.document = self._client.call(request)

    def _start_leaving(self) -> float:
        """Drain, if `drain_s` asks for that, the first time; returns the monotonic second from which on it may end."""
        if self._leaves_at is None:
            self._leaves_at = 0.0
            if self._state.drain_s and self._state.is_mine and os.getpid() == self._pid:
                try:
                    self._client.call(calls.drain(self.id, True, self.token), timeout_s=RELEASE_TIMEOUT_S)
                    self._leaves_at = monotonic() + self._state.drain_s
                except PortdError:
                    pass  # nobody can look it up either, so there is nothing to wait for
        return self._leaves_at

    def _drain_out(self) -> None:
        """Leave look-ups and wait `drain_s`, once; the sockets stay open meanwhile."""
        sleep(max(self._start_leaving() - monotonic(), 0.0))

    # --- keeping ---

    def _acquire(self, fallback: str | None) -> None:
        """Adopt the lease of the environment, or have one granted, and keep it from now on."""
        state = self._state
        given = steps.from_environment(os.environ, self.endpoint)
        try:
            found = None if given is None else drive(self._client, steps.adopt(given, state.request))
            if found is None:
                state.begin(self._client.grant(state.request))
            elif given is not None:
                state.begin(found, given.token, adopted=True)
        except DaemonUnavailable as error:
            if fallback != "ephemeral":
                raise
            from .listening import ephemeral

            _log("portd: %s; using a port of the kernel's choice for %s", error, self.service)
            self._reserved = ephemeral(state, error)
            return
        import threading

        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_on, name=f"portd {self.service}", daemon=True)
        self._thread.start()
        leaving.open_leases.add(self)
        leaving.release_at_exit()

    def _keep_on(self) -> None:
        from random import random

        pause_s = steps.pause_s(self.document, random())
        is_lost = False
        while not self._stop.wait(pause_s):
            try:
                self._keep_once()
                pause_s, is_lost = steps.pause_s(self.document, random()), False
            except (DaemonUnavailable, ProtocolError, Retryable):
                pause_s = min(steps.RETRY_S, pause_s)
            except PortdError as error:
                if not is_lost and not self._stop.is_set():
                    self._report_loss(error)
                pause_s, is_lost = steps.CHECK_S, True

    def _keep_once(self) -> None:
        state = self._state
        found = drive(
            self._client,
            steps.keep(state.document, state.token, state.request, may_move=self._on_change is not None),
        )
        has_moved = state.update(found)  # also while it is released: a lease granted meanwhile is released then
        if has_moved and self._on_change is not None and not self._stop.is_set():
            try:
                self._on_change(self)
            except Exception as error:  # the program's own fault must not end the keeping of its lease
                _log("portd: on_change failed for %s: %r", self, error, exc_info=error)

    def _report_loss(self, error: PortdError) -> None:
        if self._on_lost is None:
            _log("portd: the lease of %s is lost, and can't be granted again: %s", self, error)
            return
        try:
            self._on_lost(self, error)
        except Exception as fault:  # the program's own fault must not end the keeping of its lease
            _log("portd: on_lost failed for %s: %r", self, fault, exc_info=fault)


def _log(message: str, *arguments: object, exc_info: BaseException | None = None) -> None:
    import logging

    logging.getLogger("portd_client").warning(message, *arguments, exc_info=exc_info)
