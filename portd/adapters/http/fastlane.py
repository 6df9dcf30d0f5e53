"""The short way for the one request that comes by the thousand: a plain grant on an idle keep-alive connection.

aiohttp's parser, request and response objects cost as much as the whole grant. A request that is nothing but
`POST /v1/leases` with a body that is complete and valid is taken here; anything else, and whatever could make a
difference (a token, an origin, chunks, an unknown header's meaning, a name that is being granted), goes the long way.
Both ways decide and answer by the same functions, so there is one behaviour; this one does it without a task. The tests
send everything both ways and compare.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
from aiohttp.helpers import rfc822_formatted_time

from portd.adapters.http.calls import BODY_MAX_BYTES, encode
from portd.adapters.http.gate import Gate, Guest
from portd.adapters.http.leases import Grants, LeaseCalls, as_requests
from portd.core.errors import ForbiddenOrigin, Refusal
from portd.core.problems import PROBLEM_TYPE, headers_of, problem_of
from portd.core.rights import Caller
from portd.leasing.journal import Entry
from portd.leasing.service import Decision, LeaseService

logger = logging.getLogger(__name__)

REQUEST_LINE: Final = b"POST /v1/leases HTTP/1.1\r\n"
_HARMLESS: Final = frozenset(
    {
        b"host",
        b"content-type",
        b"content-length",
        b"accept",
        b"user-agent",
        b"accept-encoding",
        b"accept-language",
        b"connection",
    }
)
"""Headers that change nothing about a grant. One that is not here sends the request the long way."""
_LENGTH = re.compile(rb"[1-9][0-9]{0,6}\Z")
_REASONS: Final = {200: b"OK", 201: b"Created"}

Send = Callable[[bytes | None], None]
"""Sends a whole response; None closes the connection instead, after a fault of ours."""


class Head(NamedTuple):
    """A request's head that was found to be plain; the next one on its connection is mostly the same."""

    data: bytes
    body_size: int
    caller: Caller


class FastLane:
    """Takes plain grants for all connections."""

    def __init__(
        self, gate: Gate, service: LeaseService, calls: LeaseCalls, hash_token: Callable[[str], bytes]
    ) -> None:
        self._gate = gate
        self._service = service
        self._calls = calls
        self._hash_token = hash_token
        self._decode = msgspec.json.Decoder(Grants).decode

    def accept(self, guest: Guest, data: bytes, last: Head | None) -> tuple[Grants, Head] | None:
        """Return what a plain grant asks for, and its head; None for what must go the long way.

        `last` is the head that was accepted on this connection before: the same one need not be read again.
        """
        head_size = data.find(b"\r\n\r\n")
        if head_size < 0:
            return None
        head = last if last is not None and data[:head_size] == last.data else self._read(guest, data[:head_size])
        if head is None or len(data) - head_size - 4 != head.body_size:
            return None
        try:
            wish = self._decode(data[head_size + 4 :])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return None  # the long way finds the words for it
        if self._service.unsettled(as_requests(wish)) is not None:
            return None  # the long way can wait
        return wish, head

    def grant(self, wish: Grants, caller: Caller, send: Send) -> Entry | None:
        """Grant, and send the answer: at once, or when the entry that is returned is settled."""
        try:
            decision = self._service.decide(as_requests(wish), caller)
        except Refusal as refusal:
            send(_refuse(refusal))
            return None
        except Exception:  # as on the long way: a fault of ours is logged, and tells the client nothing
            logger.exception("a grant failed")
            send(None)
            return None
        if decision.entry is None:
            send(self._respond(decision, wish, caller))
            return None
        decision.entry.then(lambda: send(self._respond(decision, wish, caller)))
        return decision.entry

    def _respond(self, decision: Decision, wish: Grants, caller: Caller) -> bytes | None:
        try:
            answer = self._calls.show_granted(self._service.granted(decision), wish, caller)
        except Refusal as refusal:
            return _refuse(refusal)
        except Exception:
            logger.exception("a grant failed")
            return None
        revision = b"X-Portd-Revision: %d\r\n" % self._service.table.revision
        return _response(answer.status, _REASONS[answer.status], b"application/json", revision, encode(answer.body))

    def _read(self, guest: Guest, data: bytes) -> Head | None:
        if guest.peer is None or guest.peer.pid is None or not self._is_plain(guest, data):
            return None
        return Head(data, _length(data), self._gate.caller(guest, {}, self._hash_token)[0])

    def _is_plain(self, guest: Guest, head: bytes) -> bool:
        if not head.startswith(REQUEST_LINE):
            return False
        headers: dict[bytes, bytes] = {}
        for line in head[len(REQUEST_LINE) :].split(b"\r\n"):
            name, colon, value = line.partition(b":")
            name = name.lower()
            if not colon or name not in _HARMLESS or name in headers:
                return False
            headers[name] = value.strip()
        if headers.get(b"content-type", b"application/json") != b"application/json":
            return False
        if headers.get(b"connection", b"keep-alive").lower() != b"keep-alive":
            return False
        if not _LENGTH.match(headers.get(b"content-length", b"")) or _length(head) > BODY_MAX_BYTES:
            return False
        try:
            self._gate.check_origin(guest, {"Host": headers.get(b"host", b"").decode("latin-1")})
        except ForbiddenOrigin:
            return False
        return True


def _length(head: bytes) -> int:
    at = head.lower().find(b"\r\ncontent-length:") + 17
    return int(head[at:].split(b"\r\n", 1)[0])


def _refuse(refusal: Refusal) -> bytes:
    problem = problem_of(refusal)
    headers = "".join(f"{name}: {value}\r\n" for name, value in headers_of(refusal).items())
    return _response(problem.status, b"Refused", PROBLEM_TYPE.encode(), headers.encode("latin-1"), encode(problem))


def _response(status: int, reason: bytes, content_type: bytes, headers: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %d %s\r\n%sContent-Type: %s\r\nContent-Length: %d\r\nDate: %s\r\n\r\n%s" % (
        status,
        reason,
        headers,
        content_type,
        len(body),
        rfc822_formatted_time().encode(),
        body,
    )
