"""Server-sent events (WHATWG HTML, section 9.2): every change of a lease, as it happens.

An event is rendered once for all followers that see the same, whatever their number, and written to each transport
together with the other events of the same turn of the loop. A follower that does not read is cut off as soon as its
buffer is full: it resumes from the last id that it saw, and the daemon buffers nothing without bound.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from aiohttp import HttpVersion11, web
from msgspec import Struct

from portd.adapters.http.calls import Call, Route, encode
from portd.adapters.http.front import FRONT
from portd.adapters.http.problems import problem_of
from portd.adapters.http.revisions import After, Revisions
from portd.core.errors import InvalidRequest, RevisionGone
from portd.core.model import Event, Label
from portd.core.rights import Caller
from portd.core.shares import Shares
from portd.core.views import EventView, view_event
from portd.leasing.feed import Feed

BUFFER_MAX_BYTES: Final = 2 << 20
"""Bytes that may wait for one follower: two thousand events, so that a thousand owners that exit at once cut nobody
off. The chunks are shared among followers: a thousand slow ones hold one copy. A follower past it is cut off."""
FOLLOWERS_MAX: Final = 4_096
USER_FOLLOWERS_MAX: Final = 2_048
"""Followers at once, of all callers and of one user."""
FLUSH_S_A_STREAM: Final = 0.00005
"""Seconds between two rounds of writing, for each stream. A write costs 10 µs: a thousand followers get their events
twenty times a second under load and cost a fifth of the loop, and a single one gets each at once."""
SLICE: Final = 64
"""Streams written to, or past events rendered, in one turn of the loop: grants go on between two slices."""
CATCH_UP_S: Final = 10.0
"""Seconds that a follower may need to read the past; one that does not is cut off."""
HEARTBEAT_S: Final = 15.0
"""Seconds between comments on a quiet stream: proxies cut a connection that is silent for a minute."""


class EventQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the stream begins, and whose events it has."""

    after: After | None = None
    service: Label | None = None


class _Stream:
    """One follower's connection."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.gone = asyncio.get_running_loop().create_future()
        self.backlog: list[bytes] | None = []  # until the past has been sent

    def send(self, data: bytes) -> None:
        """Write chunks, or end the stream of a follower that does not read."""
        if self.backlog is not None:
            self.backlog.append(data)
        elif self.transport.is_closing() or self.transport.get_write_buffer_size() > BUFFER_MAX_BYTES:
            self.end()
        else:
            self.transport.write(data)

    def end(self) -> None:
        """Let the stream come to its end."""
        if not self.gone.done():
            self.gone.set_result(None)


class _Group:
    """Followers who see the same: an event is rendered and kept once for all of them."""

    def __init__(self, caller: Caller, service: str | None) -> None:
        self.caller = caller
        self.service = service
        self.streams: set[_Stream] = set()
        self.pending: list[bytes] = []

    def pop_pending(self) -> list[tuple[_Stream, bytes]]:
        """Return the pending data for each stream; nothing is pending then."""
        data = b"".join(self.pending)
        self.pending.clear()
        return [(stream, data) for stream in self.streams] if data else []


class EventCalls:
    """The handler of /v1/events."""

    def __init__(self, feed: Feed, revisions: Revisions) -> None:
        self._feed = feed
        self._revisions = revisions
        self._shares = Shares("event streams", total=FOLLOWERS_MAX, per_user=USER_FOLLOWERS_MAX)
        self._groups: dict[tuple[bool, int | None, str | None], _Group] = {}
        self._timer: asyncio.Handle | None = None
        self._round: list[tuple[_Stream, bytes]] = []  # what is still to be written of a round
        self._written_at = 0.0

    def routes(self) -> list[Route]:
        """Return the routes of this module."""
        return [
            Route(
                "GET",
                "/v1/events",
                self.follow,
                "Follow events as server-sent events",
                {200: EventView},
                query=EventQuery,
                refusals=("revision_gone", "busy"),
                media_type="text/event-stream",
            )
        ]

    def close(self) -> None:
        """End every stream: the daemon stops."""
        for group in self._groups.values():
            for stream in tuple(group.streams):
                stream.end()

    @property
    def stream_count(self) -> int:
        """Return how many follow now."""
        return sum(len(group.streams) for group in self._groups.values())

    async def follow(self, call: Call) -> web.StreamResponse:
        """GET /v1/events."""
        if call.request.version < HttpVersion11:
            raise InvalidRequest("a stream of events needs HTTP/1.1")
        with self._shares.use(call.caller.user):
            service = call.query.service
            try:
                start = self._start(call)
                await self._feed.wait_confirmed(start)
                past = self._feed.since(start, service)
            except RevisionGone as refusal:
                if not _is_event_source(call.request):
                    raise
                return await self._send_gone(call.request, refusal)
            return await self._stream(call, service, past)

    async def _stream(self, call: Call, service: str | None, past: Iterator[Event]) -> web.StreamResponse:
        stream = _Stream(call.request.transport)
        call.request.get_extra_info(FRONT).is_stream = True
        response = self._response()
        viewer = _viewer(call.caller)
        with contextlib.suppress(TimeoutError), self._joined(stream, viewer, service):
            # Nothing is missed: `past` ends where this context begins.
            await response.prepare(call.request)
            async with asyncio.timeout(CATCH_UP_S):
                for number, event in enumerate(past, 1):
                    await response.write(self._text(event, viewer))
                    if number % SLICE == 0:
                        await asyncio.sleep(0)
                await response.write(b": following\n\n")
            backlog, stream.backlog = stream.backlog or [], None
            for data in backlog:
                stream.send(data)
            await self._until_gone(stream.gone, stream.transport)
        stream.transport.abort()  # a stream has no other end: a regular one would wait for a full buffer
        return response

    async def _send_gone(self, request: web.Request, refusal: RevisionGone) -> web.StreamResponse:
        """Send the refusal as an event: an EventSource hides the status and the body of every other answer."""
        response = self._response()
        response.force_close()
        await response.prepare(request)
        await response.write(b"event: gone\ndata: %s\n\n" % encode(problem_of(refusal)))
        await response.write_eof()
        return response

    def _response(self) -> web.StreamResponse:
        headers = {
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",  # nginx holds an answer back otherwise
            "X-Portd-Revision": str(self._feed.revision),
            "X-Portd-Store": self._revisions.store_id,
        }
        response = web.StreamResponse(headers=headers)
        response.enable_chunked_encoding()
        return response

    @contextlib.contextmanager
    def _joined(self, stream: _Stream, caller: Caller, service: str | None) -> Iterator[None]:
        """Be one of those who see the same while the context is open."""
        key = (caller.admin, caller.uid, service)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(caller, service)
            self._feed.follow(partial(self._on_event, group), group, service)
        self._round += group.pop_pending()  # the new stream has it in its past already
        self._write(len(self._round))
        group.streams.add(stream)
        try:
            yield
        finally:
            group.streams.discard(stream)
            if not group.streams and self._groups.get(key) is group:
                del self._groups[key]
                self._feed.unfollow(group, service)

    def _on_event(self, group: _Group, event: Event) -> None:
        group.pending.append(_chunk(self._text(event, group.caller)))
        if self._timer is None:
            loop = asyncio.get_running_loop()
            due = self._written_at + self.stream_count * FLUSH_S_A_STREAM
            self._timer = (
                loop.call_soon(self._begin_round) if due <= loop.time() else loop.call_at(due, self._begin_round)
            )

    def _begin_round(self) -> None:
        self._round = [each for group in self._groups.values() for each in group.pop_pending()]
        self._continue_round()

    def _continue_round(self) -> None:
        """Write a slice of the round; events that come meanwhile go with the next one."""
        self._write(SLICE)
        loop = asyncio.get_running_loop()
        if self._round:
            self._timer = loop.call_soon(self._continue_round)
            return
        self._written_at = loop.time()
        self._timer = None
        if any(group.pending for group in self._groups.values()):
            self._timer = loop.call_later(self.stream_count * FLUSH_S_A_STREAM, self._begin_round)

    def _write(self, count: int) -> None:
        slice_, self._round = self._round[:count], self._round[count:]
        for stream, data in slice_:
            stream.send(data)

    def _start(self, call: Call) -> int:
        """Return the revision after which the stream begins: that of the query, of the last event, or the newest."""
        if call.query.after is not None:
            return self._revisions.parse(call.query.after, "after")
        last = call.request.headers.get("Last-Event-ID")
        return self._feed.revision if last is None else self._revisions.parse(last, "Last-Event-ID")

    @staticmethod
    async def _until_gone(gone: asyncio.Future[None], transport: Any) -> None:
        while not gone.done() and not transport.is_closing():
            await asyncio.wait([gone], timeout=HEARTBEAT_S)
            if gone.done() or transport.is_closing() or transport.get_write_buffer_size() > BUFFER_MAX_BYTES:
                return
            transport.write(_chunk(b": alive\n\n"))

    @staticmethod
    def _text(event: Event, caller: Caller) -> bytes:
        data = encode(view_event(event, caller))
        return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.revision, event.type.encode(), data)


def _viewer(caller: Caller) -> Caller:
    """Return what decides what a caller sees in a stream; everybody with the same sees the same. Its token, which may
    be a lease's own, does not count."""
    return Caller(admin=True) if caller.admin else Caller(uid=caller.uid)


def _is_event_source(request: web.Request) -> bool:
    """Return whether a browser's EventSource makes the request: by the headers that no script sets (Fetch standard)."""
    return request.headers.get("Accept") == "text/event-stream" and "Sec-Fetch-Mode" in request.headers


def _chunk(data: bytes) -> bytes:
    """Frame data as one chunk (RFC 9112, section 7.1)."""
    return b"%x\r\n%s\r\n" % (len(data), data)
