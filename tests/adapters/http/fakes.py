"""Fakes that drive a connection without a socket: a loop with its own time, a transport, the kernel's peers."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from portd.leasing.seams import Peer


class FakeTimer:
    """A timer of FakeLoop."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Never call back."""
        self.callback = None


class FakeLoop:
    """An event loop whose time passes when a test says so, and whose tasks run to their end at once."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._order = itertools.count()

    def time(self) -> float:
        """Return the time."""
        return self._now

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> FakeTimer:
        """Call back after some seconds."""
        timer = FakeTimer(callback)
        heapq.heappush(self._timers, (self._now + delay_s, next(self._order), timer))
        return timer

    def call_soon(self, callback: Callable[[], None]) -> FakeTimer:
        """Call back in the next turn."""
        return self.call_later(0.0, callback)

    def create_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that waits for nothing."""
        try:
            coroutine.send(None)
        except StopIteration:
            return
        raise AssertionError("the coroutine waits")

    def advance(self, seconds: float = 0.0) -> None:
        """Let time pass, and call what is due."""
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end:
            self._now, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        self._now = end


class FakeTransport(asyncio.Transport):
    """Keeps what is written; `unread` is how much of it the client has not read. Reports its end like a real one."""

    def __init__(self, connection: Any = None, *, half_close: bool = True) -> None:
        super().__init__()
        self.connection = connection or FakeSocket(socket.AF_UNIX)
        self.written = b""
        self.unread = 0
        self.is_open = True
        self.is_half_closed = False
        self.reads = True
        self.half_close = half_close
        self.protocol: asyncio.Protocol | None = None

    def connect(self, protocol: asyncio.Protocol) -> None:
        """Begin, as a loop does."""
        self.protocol = protocol
        protocol.connection_made(self)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return the socket or an address."""
        known = {"socket": self.connection, "sockname": self.connection.name, "peername": self.connection.peer}
        return known.get(name, default)

    def write(self, data: Any) -> None:
        """Keep data."""
        assert self.is_open, "written after the close"
        assert not self.is_half_closed, "written after the half close"
        self.written += bytes(data)

    def write_eof(self) -> None:
        """Close the writing half."""
        self.is_half_closed = True

    def can_write_eof(self) -> bool:
        """Return whether one half can be closed alone."""
        return self.half_close

    def get_write_buffer_size(self) -> int:
        """Return what the client has not read."""
        return self.unread

    def is_closing(self) -> bool:
        """Return whether it is closed."""
        return not self.is_open

    def pause_reading(self) -> None:
        """Read no more."""
        self.reads = False

    def resume_reading(self) -> None:
        """Read on."""
        self.reads = True

    def close(self) -> None:
        """Close once the client has read everything."""
        if self.is_open and not self.unread:
            self._end()

    def abort(self) -> None:
        """Close at once."""
        if self.is_open:
            self._end()

    def hang_up(self) -> None:
        """Be closed by the client."""
        assert self.protocol is not None
        if self.is_open and not self.protocol.eof_received():
            self._end()

    def _end(self) -> None:
        self.is_open = False
        assert self.protocol is not None
        self.protocol.connection_lost(None)


class FakeSocket:
    """A socket of a family, between two addresses."""

    def __init__(
        self,
        family: int,
        name: tuple[str, int] = ("127.0.0.1", 7783),
        peer: tuple[str, int] | None = ("127.0.0.1", 50000),
    ) -> None:
        self.family = family
        self.name = name
        self.peer = peer


class FakePeers:
    """The kernel's knowledge of peers: `peer` is who is at the other end, `pid` what a search for a process finds."""

    def __init__(self, peer: Peer | None = None, pid: int | None = None) -> None:
        self.peer = peer
        self.pid = pid
        self.search_count = 0

    def of_unix(self, connection: Any) -> Peer:
        """Return the peer."""
        assert self.peer is not None
        return self.peer

    def of_tcp(self, local: tuple[str, int], remote: tuple[str, int]) -> Peer | None:
        """Return the peer."""
        return self.peer

    async def with_pid(self, peer: Peer) -> Peer:
        """Find the process."""
        self.search_count += 1
        return peer._replace(pid=self.pid, other_users=False)
