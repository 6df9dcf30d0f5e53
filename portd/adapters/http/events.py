"""Server-sent events (WHATWG HTML, section 9.2): what happens, as it happens.

An event is rendered once for those who may read command lines and once for the others, whatever the number of
followers, and goes to each through its transport. A follower that does not read is cut off as soon as its buffer is
full: it resumes from the last id that it saw, and the daemon buffers nothing without bound.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

from aiohttp import HttpVersion11, web
from msgspec import Meta, Struct

from portd.adapters.http.calls import Call, Route, encode
from portd.core.errors import Busy, InvalidRequest
from portd.core.model import Event, Label
from portd.core.problems import InvalidQuery
from portd.core.rights import Caller, sees_cmdline
from portd.core.views import EventView, view_event
from portd.feed import Feed

BUFFER_MAX_BYTES: Final = 2 << 20
"""What may wait for one follower: two thousand events, so that a thousand owners that exit at once cut nobody off. The
chunks are shared among followers: a thousand that are slow hold one copy. A follower past it is cut off."""
FOLLOWERS_MAX: Final = 4_096
CATCH_UP_S: Final = 10.0
"""Seconds that a follower may take to read the past; one that does not is cut off."""
HEARTBEAT_S: Final = 15.0
"""Seconds between comments on a quiet stream: proxies cut what is silent for a minute."""


class EventQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`after` is the last revision that is known; without it (and without Last-Event-ID) the stream starts now."""

    after: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    service: Label | None = None


class EventCalls:
    """The handler of /v1/events."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._rendered: tuple[int, dict[bool, bytes]] = (0, {})
        self._streams: set[asyncio.Future[None]] = set()
        self.dropped_count = 0

    def routes(self) -> list[Route]:
        """Return the routes of this room."""
        return [Route("GET", "/v1/events", self.follow, "Follow events as server-sent events", {200: EventView},
                      query=EventQuery, refusals=("revision_gone", "busy"), media_type="text/event-stream")]

    def close(self) -> None:
        """End every stream: the daemon stops."""
        for gone in tuple(self._streams):
            if not gone.done():
                gone.set_result(None)

    async def follow(self, call: Call) -> web.StreamResponse:
        """GET /v1/events."""
        if call.request.version < HttpVersion11:
            raise InvalidRequest("a stream of events needs HTTP/1.1")
        if self._feed.follower_count >= FOLLOWERS_MAX:
            raise Busy(f"{FOLLOWERS_MAX} followers are connected already")
        service = call.query.service
        past = self._feed.since(self._start(call), service)
        response = web.StreamResponse(headers={
            "Content-Type": "text/event-stream", "Cache-Control": "no-store",
            "X-Portd-Revision": str(self._feed.revision)})
        gone = asyncio.get_running_loop().create_future()
        transport: Any = call.request.transport
        backlog: list[bytes] = []
        caught_up = False

        def forward(event: Event) -> None:
            chunk = self._render(event, call.caller)
            if not caught_up:
                backlog.append(chunk)  # the past has not been sent yet
            elif transport.is_closing() or transport.get_write_buffer_size() > BUFFER_MAX_BYTES:
                if not gone.done():
                    self.dropped_count += 1
                    gone.set_result(None)
            else:
                transport.write(chunk)

        self._streams.add(gone)
        try:
            with self._feed.following(forward, service):  # nothing is missed: `past` ends where this begins
                response.enable_chunked_encoding()
                await response.prepare(call.request)
                async with asyncio.timeout(CATCH_UP_S):
                    for event in past:
                        await response.write(self._text(event, call.caller))
                    await response.write(b": following\n\n")
                for chunk in backlog:
                    transport.write(chunk)
                caught_up = True
                await self._until_gone(gone, transport)
        except TimeoutError:
            self.dropped_count += 1
        finally:
            self._streams.discard(gone)
        transport.abort()  # a stream has no end but this one: what follows would wait for a buffer that nobody empties
        return response

    def _start(self, call: Call) -> int:
        if call.query.after is not None:
            return int(call.query.after)
        last = call.request.headers.get("Last-Event-ID")
        if last is None:
            return self._feed.revision
        if not last.isdecimal() or len(last) > 16:
            raise InvalidQuery("Last-Event-ID is no revision", pointer="/Last-Event-ID")
        return int(last)

    @staticmethod
    async def _until_gone(gone: asyncio.Future[None], transport: Any) -> None:
        while not gone.done() and not transport.is_closing():
            await asyncio.wait([gone], timeout=HEARTBEAT_S)
            if gone.done() or transport.is_closing() or transport.get_write_buffer_size() > BUFFER_MAX_BYTES:
                return
            transport.write(_chunk(b": alive\n\n"))

    def _render(self, event: Event, caller: Caller) -> bytes:
        revision, chunks = self._rendered
        if revision != event.revision:
            chunks = {}
            self._rendered = (event.revision, chunks)
        cmdline = sees_cmdline(caller, event.lease.owner.uid)
        if cmdline not in chunks:
            chunks[cmdline] = _chunk(_render(event, cmdline=cmdline))
        return chunks[cmdline]

    @staticmethod
    def _text(event: Event, caller: Caller) -> bytes:
        return _render(event, cmdline=sees_cmdline(caller, event.lease.owner.uid))


def _render(event: Event, *, cmdline: bool) -> bytes:
    data = encode(view_event(event, cmdline=cmdline))
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.revision, event.type.encode(), data)


def _chunk(data: bytes) -> bytes:
    """Frame data as one chunk (RFC 9112 section 7.1)."""
    return b"%x\r\n%s\r\n" % (len(data), data)
