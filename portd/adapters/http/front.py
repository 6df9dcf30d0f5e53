"""The protocol of one connection: plain grants are answered here, everything else by aiohttp's public `web.Server`.

A connection is fast until its first other request, then aiohttp's for good. The states are the table below. The front
also keeps the bounds that aiohttp leaves open: connections, the time that a request's head and a slow reader may use,
and a closing in which a client that is still sending can read its answer. It must not know what a request means.

| state | data | other events |
| --- | --- | --- |
| FAST_IDLE | a plain grant: FAST_BUSY, or IDENTIFYING where its process is unknown; else AIOHTTP | |
| IDENTIFYING | kept | identified: FAST_IDLE, then what was kept |
| FAST_BUSY | kept | answered: FAST_IDLE, then what was kept |
| AIOHTTP | passed on | closed by aiohttp: CLOSING |
| REFUSING | answered with `busy`: CLOSING | |
| CLOSING | discarded | the client has closed, or CLOSING_S have passed: closed |
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, Literal, Protocol, cast

from aiohttp import web

from portd.adapters.http.authenticator import Authenticator, ConnectionPeer
from portd.adapters.http.fast_path import Head, PlainGrant, Send
from portd.core.errors import Busy
from portd.leasing.pending import Pending

REQUEST_TIMEOUT_S: Final = 10.0
"""Seconds for the head of a request to arrive, and again for its body: a phone on a bad network needs one."""
ANSWER_TIMEOUT_S: Final = 30.0
"""Seconds for a client to read an answer; one that does not is cut off."""
KEEPALIVE_S: Final = 75.0
"""Seconds that an idle connection stays: longer than common proxies keep theirs, so that they close first."""
CLOSING_S: Final = 5.0
"""Seconds to discard what a client still sends after its last answer. A close with unread data would reset the
connection, and the client would never read the answer (RFC 9112, section 9.6)."""
CONNECTIONS_MAX: Final = 8_192
"""Connections at once. Leaves descriptors for holds and pidfds at a limit of 20,000."""
USER_CONNECTIONS_MAX: Final = 2_048
"""Connections of one user at once: the next one is answered with `busy`."""
REFUSING_MAX: Final = 256
"""Connections beyond a bound that are answered at once; the next one is closed without an answer."""
BUFFER_MAX_BYTES: Final = 256 * 1024
"""Bytes kept while a grant is under way; reading pauses beyond."""
FRONT: Final = "portd_front"
"""The name under which `Request.get_extra_info` gives the front of a request's connection."""

State = Literal["fast_idle", "identifying", "fast_busy", "aiohttp", "refusing", "closing", "closed"]
Event = Literal["grant", "unidentified_grant", "bytes", "identified", "answered", "refused", "finished", "lost"]

TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    ("fast_idle", "grant"): "fast_busy",
    ("fast_idle", "unidentified_grant"): "identifying",
    ("fast_idle", "bytes"): "aiohttp",
    ("fast_idle", "refused"): "refusing",
    ("fast_idle", "finished"): "closing",
    ("identifying", "identified"): "fast_idle",
    ("identifying", "bytes"): "identifying",
    ("identifying", "finished"): "closing",
    ("fast_busy", "bytes"): "fast_busy",
    ("fast_busy", "answered"): "fast_idle",
    ("fast_busy", "finished"): "closing",
    ("aiohttp", "bytes"): "aiohttp",
    ("aiohttp", "finished"): "closing",
    ("refusing", "bytes"): "refusing",
    ("refusing", "finished"): "closing",
    ("closing", "bytes"): "closing",
    ("closing", "finished"): "closing",
    ("fast_idle", "lost"): "closed",
    ("identifying", "lost"): "closed",
    ("fast_busy", "lost"): "closed",
    ("aiohttp", "lost"): "closed",
    ("refusing", "lost"): "closed",
    ("closing", "lost"): "closed",
    ("closed", "answered"): "closed",
    ("closed", "identified"): "closed",
    ("closed", "finished"): "closed",
    ("closing", "answered"): "closing",
    ("closing", "identified"): "closing",
}
"""Every legal step of a connection. An event that is not here for its state is a fault of portd's own (KeyError)."""


class PlainGrants(Protocol):
    """What the front needs of the fast path."""

    def accept(self, end: ConnectionPeer, data: bytes, last: Head | None) -> PlainGrant | None: ...

    def grant(self, plain: PlainGrant, send: Send) -> Pending | None: ...


class Connections:
    """All open connections, TLS handshakes included, and how many each user has."""

    def __init__(self) -> None:
        self.fronts: set[Front] = set()
        self.refusing: set[Front] = set()
        self.is_stopping = False
        self._by_user: Counter[int | str] = Counter()

    def __len__(self) -> int:
        return self._by_user.total()

    def enter(self, user: int | str) -> None:
        """Count a connection of this user."""
        self._by_user[user] += 1

    def leave(self, user: int | str) -> None:
        """Count a connection of this user no longer."""
        self._by_user[user] -= 1
        if not self._by_user[user]:
            del self._by_user[user]

    def excess(self, user: int | str) -> str | None:
        """Return the bound that one more connection of this user would exceed, None where it would not."""
        if self._by_user[user] >= USER_CONNECTIONS_MAX:
            return f"this user has {USER_CONNECTIONS_MAX} connections open: close some"
        if len(self) >= CONNECTIONS_MAX:
            return f"{CONNECTIONS_MAX} connections are open"
        return None

    def unread_bytes(self) -> Counter[int | str]:
        """Return how many bytes of answers each user has not read yet."""
        unread: Counter[int | str] = Counter()
        for front in self.fronts:
            if front.is_stalled:
                unread[front.end.user] += front.unread_bytes
        return unread


class Front(asyncio.Protocol):
    """One client's connection."""

    end: ConnectionPeer

    def __init__(
        self,
        connections: Connections,
        authenticator: Authenticator,
        fast_path: PlainGrants | None,
        make_inner: Callable[[], asyncio.Protocol],
        refuse: Callable[[Busy], bytes],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.state: State = "fast_idle"
        self.is_stream = False
        self._connections = connections
        self._authenticator = authenticator
        self._fast_path = fast_path
        self._make_inner = make_inner
        self._refuse = refuse
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._inner: asyncio.Protocol | None = None
        self._kept = b""
        self._last_head: Head | None = None
        self._grant: Pending | None = None
        self._search: asyncio.Task[None] | None = None
        self._is_handling = False
        self._excess: str | None = None
        self._idle_since = loop.time()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    # --- what the transport reports ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Identify the caller; a connection beyond a bound is answered with `busy`."""
        self._transport = cast("asyncio.Transport", transport)
        try:
            self.end = self._authenticator.identify(transport)
        except OSError:  # it has gone already
            self._transport.abort()
            return
        self._excess = self._connections.excess(self.end.user)
        if self._excess is not None:
            self._step("refused")
            self._connections.refusing.add(self)
            self._set_timer("refusing", CLOSING_S, self._abort)
            if len(self._connections.refusing) > REFUSING_MAX:
                self._transport.abort()
            return
        self._connections.fronts.add(self)
        self._connections.enter(self.end.user)
        self._idle_since = self._loop.time()
        self._set_timer("idle", KEEPALIVE_S, self._check_idle)

    def data_received(self, data: bytes) -> None:
        """Classify data by the state of the connection."""
        if self.state == "fast_idle":
            self._receive_idle(data)
            return
        self._step("bytes")
        if self.state == "aiohttp":
            self._pass_on(data)
        elif self.state == "refusing":
            assert self._transport is not None
            self._transport.write(self._refuse(Busy(self._excess or "")))
            self.finish()
        elif self.state != "closing":
            self._kept += data
            if len(self._kept) > BUFFER_MAX_BYTES and self._transport is not None:
                self._transport.pause_reading()

    def eof_received(self) -> bool | None:
        """Let the transport close: a client that has said all does not wait for an answer."""
        return self._inner.eof_received() if self._inner is not None else None

    def pause_writing(self) -> None:
        """Note that the client does not read; it has ANSWER_TIMEOUT_S to begin again."""
        if not self.is_stream:
            self._set_timer("stalled", ANSWER_TIMEOUT_S, self._abort)
        if self._inner is not None:
            self._inner.pause_writing()
        elif self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        self._cancel_timer("stalled")
        if self._inner is not None:
            self._inner.resume_writing()
        elif self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; a grant that is under way is finished without it."""
        self._step("lost")
        self._connections.refusing.discard(self)
        if self in self._connections.fronts:
            self._connections.fronts.discard(self)
            self._connections.leave(self.end.user)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._transport = None
        self._kept = b""
        if self._inner is not None:
            self._inner.connection_lost(exc)

    # --- what the normal path reports ---

    def request_began(self) -> None:
        """Note that aiohttp has a whole head and handles the request."""
        self._is_handling = True
        self._cancel_timer("head")

    def request_ended(self) -> None:
        """Note that aiohttp is between two requests."""
        self._is_handling = False

    def finish(self) -> None:
        """Close after what has been written: half at once, the rest when the client has closed its side too."""
        self._step("finished")
        transport = self._transport
        if transport is None or "closing" in self._timers:
            return
        self._cancel_timer("head")
        if transport.get_write_buffer_size():
            self._set_timer("stalled", ANSWER_TIMEOUT_S, self._abort)
        if self._connections.is_stopping or not transport.can_write_eof():  # TLS: its closing alert ends both halves
            transport.close()
            return
        with suppress(OSError, RuntimeError):  # it may be gone already
            transport.write_eof()
            transport.resume_reading()
        self._set_timer("closing", CLOSING_S, self._close)

    def abort(self) -> None:
        """Close at once; what has not been sent is lost."""
        self._abort()

    async def stop(self, timeout_s: float) -> None:
        """Close an idle connection at once, and one whose grant is under way after its answer."""
        if self._grant is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._grant.wait(), timeout_s)  # its answer is written by an earlier callback
        if self._inner is None:
            self._close()

    @property
    def is_stalled(self) -> bool:
        """Return whether the client lets an answer wait."""
        return "stalled" in self._timers

    @property
    def unread_bytes(self) -> int:
        """Return how many bytes of answers wait for the client to read them."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    # --- the fast path ---

    def _receive_idle(self, data: bytes) -> None:
        plain = self._fast_path.accept(self.end, data, self._last_head) if self._fast_path is not None else None
        if plain is None:
            self._step("bytes")
            self._hand_over(data)
        elif self.end.needs_process:
            self._step("unidentified_grant")
            self._kept = data
            self._search = self._loop.create_task(self._identify())
        else:
            self._step("grant")
            self._last_head = plain.head
            assert self._fast_path is not None
            grant = self._fast_path.grant(plain, self._answer)
            if self.state == "fast_busy":  # else it has been answered already
                self._grant = grant

    async def _identify(self) -> None:
        await self._authenticator.find_process(self.end)
        self._step("identified")
        self._resume()

    def _answer(self, response: bytes | None) -> None:
        """Write the answer to a plain grant; what came in meanwhile waits for a turn of its own."""
        self._grant = None
        self._step("answered")
        transport = self._transport
        if transport is None or self.state != "fast_idle":
            return
        self._idle_since = self._loop.time()
        if response is None:
            self._close()
            return
        transport.write(response)
        if self._kept:
            self._loop.call_soon(self._resume)  # not here: the journal is settling a batch

    def _resume(self) -> None:
        if self.state != "fast_idle" or self._transport is None or not self._kept:
            return
        if len(self._kept) > BUFFER_MAX_BYTES:
            self._transport.resume_reading()
        kept, self._kept = self._kept, b""
        self._receive_idle(kept)

    # --- the normal path ---

    def _hand_over(self, data: bytes) -> None:
        assert self._transport is not None
        self._cancel_timer("idle")
        self._inner = self._make_inner()
        self._inner.connection_made(Outlet(self, self._transport))
        self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        if not self._is_handling and "head" not in self._timers:
            self._set_timer("head", REQUEST_TIMEOUT_S, self._close)
        assert self._inner is not None
        self._inner.data_received(data)

    # --- steps and timers ---

    def _step(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]

    def _check_idle(self) -> None:
        due_s = self._idle_since + KEEPALIVE_S - self._loop.time()
        if self.state != "fast_idle" or due_s > 0:
            self._set_timer("idle", max(due_s, 1.0), self._check_idle)
        else:
            self._close()

    def _close(self) -> None:
        if self._transport is not None:
            if self._transport.get_write_buffer_size() and "stalled" not in self._timers:
                self._set_timer("stalled", ANSWER_TIMEOUT_S, self._abort)
            self._transport.close()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _set_timer(self, name: str, delay_s: float, callback: Callable[[], None]) -> None:
        self._cancel_timer(name)
        self._timers[name] = self._loop.call_later(delay_s, callback)

    def _cancel_timer(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


class Outlet(asyncio.Transport):
    """The transport as aiohttp sees it: the connection's own, but its closing is the front's."""

    def __init__(self, front: Front, transport: asyncio.Transport) -> None:
        super().__init__()
        self._front = front
        self._transport = transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what the connection's transport knows, and the front under its name."""
        return self._front if name == FRONT else self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """Return whether no more can be written."""
        return self._front.state in ("closing", "closed") or self._transport.is_closing()

    def close(self) -> None:
        """Close after what has been written."""
        self._front.finish()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write data."""
        self._transport.write(data)

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Write several pieces of data."""
        self._transport.writelines(list_of_data)

    def write_eof(self) -> None:
        """Close the writing half."""
        self._transport.write_eof()

    def can_write_eof(self) -> bool:
        """Return whether one half can be closed alone."""
        return self._transport.can_write_eof()

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait to be sent."""
        return self._transport.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the low and the high water mark of writing."""
        return self._transport.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the water marks of writing."""
        self._transport.set_write_buffer_limits(high, low)

    def is_reading(self) -> bool:
        """Return whether data is read."""
        return self._transport.is_reading()

    def pause_reading(self) -> None:
        """Read no more for now."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        self._transport.resume_reading()


class Answerer(web.RequestHandler):
    """aiohttp's own protocol, which answers what it refuses by itself as the rest of the API does."""

    __slots__ = ("_answer_error",)

    def __init__(self, server: web.Server, answer_error: Callable[..., web.StreamResponse], **options: Any) -> None:
        super().__init__(server, **options)
        self._answer_error = answer_error

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer broken HTTP, and a fault that no handler caught."""
        response = self._answer_error(request, status, exc, message)
        response.force_close()
        return response
