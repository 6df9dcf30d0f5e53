"""DNS over TCP (RFC 7766): messages behind their length, many on a connection, answered in order.

Bounded in all directions: connections, idle time, the size of a query, what waits for a slow reader, and what one
connection gets done in one turn of the loop. What messages mean is the responder's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final, cast

from portd.adapters.dns.message import Limits
from portd.adapters.dns.udp import asked_address

QUERY_MAX_BYTES: Final = 4096
"""A question and its options have a few hundred; a client that sends more is disconnected."""
LIMITS: Final = Limits(65535, 65535)
"""The length is 16 bits (RFC 1035 section 4.2.2); what is offered by EDNS is about UDP."""
CONNECTIONS: Final = 256
"""At most so many at once; one more, and the longest idle is closed."""
IDLE_S: Final = 10.0
"""A connection without a whole query for so long is closed: "in the order of a few seconds" (RFC 7766 6.2.3)."""
BATCH: Final = 16
"""Answers of one connection before others get their turn: a full one of 64 KiB needs a fraction of a millisecond."""
WAITING_BYTES: Final = 1 << 18
"""Answers that wait for a slow reader; beyond them its queries wait."""

Respond = Callable[[bytes, Limits, str | None], bytes | None]
"""Answers a query: its bytes, the limits, and the address at which it came in (None: a loopback one)."""


class TcpListener:
    """Answers on one bound socket, which it owns. A connection is closed after `idle_s` seconds without a query."""

    def __init__(self, bound: socket.socket, respond: Respond, idle_s: float = IDLE_S) -> None:
        self.respond = respond
        self._idle_s = idle_s
        self._socket = bound
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._connections: dict[_Connection, float] = {}  # when each was last active, longest ago first

    def __len__(self) -> int:
        return len(self._connections)

    async def start(self) -> None:
        """Begin to listen; raises OSError when another does."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), sock=self._socket, backlog=CONNECTIONS)
        self._sweep = loop.call_later(self._idle_s, self._close_idle)

    async def close(self) -> None:
        """Stop, cutting off who is connected. May be called twice."""
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._connections):
            connection.abort()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None
        self._socket.close()

    def touch(self, connection: _Connection) -> None:
        """Note that a connection is active now, a new one too."""
        if self._connections.pop(connection, None) is None and len(self._connections) >= CONNECTIONS:
            next(iter(self._connections)).abort()
        self._connections[connection] = asyncio.get_running_loop().time()

    def forget(self, connection: _Connection) -> None:
        """Note that a connection is gone."""
        self._connections.pop(connection, None)

    def _close_idle(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection, active in list(self._connections.items()):
            if active + self._idle_s > now:
                break
            connection.abort()
        oldest = next(iter(self._connections.values()), now)
        self._sweep = loop.call_at(oldest + self._idle_s, self._close_idle)


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, listener: TcpListener) -> None:
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._full = False  # the client reads slower than it asks
        self._ended = False  # the client asks nothing more
        self._again: asyncio.Handle | None = None
        self._asked_at: str | None = None

    def abort(self) -> None:
        """Cut off, whatever waits."""
        self._listener.forget(self)
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by descent
        self._transport.set_write_buffer_limits(high=WAITING_BYTES)
        self._asked_at = asked_address(transport.get_extra_info("sockname")[0])
        self._listener.touch(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.forget(self)
        self._transport = None
        if self._again is not None:
            self._again.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._again is None:
            self._serve()

    def eof_received(self) -> bool:
        self._ended = True
        if self._again is None:
            self._serve()
        return True  # `_serve` closes, when all that was asked is answered

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self._again is None:
            self._serve()

    def _serve(self) -> None:
        """Answer what has come, up to the bounds, and the rest when others had their turn."""
        self._again = None
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        waiting = self._answer_some(transport)
        if transport.is_closing():
            return
        if not waiting:
            transport.resume_reading()
            if self._ended:
                transport.close()
        else:
            transport.pause_reading()
            if not self._full:
                self._again = asyncio.get_running_loop().call_soon(self._serve)

    def _answer_some(self, transport: asyncio.Transport) -> bool:
        """Answer a batch; True when a whole query waits still."""
        received, at = self._received, 0
        try:
            for count in range(BATCH + 1):
                if len(received) < at + 2:
                    return False
                end = at + 2 + int.from_bytes(received[at : at + 2])
                if end > at + 2 + QUERY_MAX_BYTES:
                    self.abort()
                    return False
                if len(received) < end:
                    return False
                if count == BATCH or self._full:
                    return True
                answer = self._listener.respond(bytes(received[at + 2 : end]), LIMITS, self._asked_at)
                if answer is None:  # no query at all: whatever this client speaks, it is not DNS
                    self.abort()
                    return False
                transport.write(len(answer).to_bytes(2) + answer)
                self._listener.touch(self)
                at = end
            return True
        finally:
            del received[:at]
