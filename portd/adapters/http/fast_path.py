"""Fast path for plain grants: `POST /v1/leases` that arrives whole on an idle connection.

aiohttp's parser, request and response objects cost as much as the whole grant. A request is plain if nothing in it
could make a difference to how it is answered (a token, an origin, chunks, an unknown header) and the normal parser
would accept it as it stands; every other one is left to the normal path. Both paths decide and answer with the same
functions; this one does it without a task.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
from aiohttp.helpers import rfc822_formatted_time

from portd.adapters.http.authenticator import Authenticator, ConnectionPeer
from portd.adapters.http.calls import BODY_MAX_BYTES, encode
from portd.adapters.http.leases import GrantBody, LeaseCalls, as_requests
from portd.adapters.http.problems import PROBLEM_TYPE, headers_of, problem_of
from portd.core.errors import ForbiddenOrigin, Refusal
from portd.core.failpoints import failpoint
from portd.core.rights import Caller
from portd.leasing.pending import Pending
from portd.leasing.service import LeaseService, is_foreign

logger = logging.getLogger(__name__)

REQUEST_LINE: Final = b"POST /v1/leases HTTP/1.1\r\n"
HEAD_MAX_BYTES: Final = 4_096
"""A longer head is left to the normal parser, which has bounds of its own (8,190 bytes a line)."""
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
"""Headers that change nothing about a grant. Any other one sends the request to the normal path."""
_HEAD: Final = re.compile(rb"POST /v1/leases HTTP/1\.1(?:\r\n[A-Za-z-]+:[\t\x20-\x7e]*)+")
"""Field lines in visible ASCII, ended by CRLF: a subset of RFC 9112, section 5, without its obsolete forms."""
_LENGTH: Final = re.compile(rb"[1-9][0-9]{0,6}\Z")
_REASONS: Final = {200: b"OK", 201: b"Created"}

OnRefusal = Callable[[Refusal, int | None, int | None], None]
Send = Callable[[bytes | None], None]
"""Sends a whole response; None closes the connection instead, after a fault of portd's own."""


class Head(NamedTuple):
    """The head of a plain grant; the next one on its connection is mostly the same."""

    data: bytes
    body_size: int
    caller: Caller


class PlainGrant(NamedTuple):
    """A plain grant that has been decoded and validated."""

    body: GrantBody
    head: Head


class FastPath:
    """Accepts plain grants for all connections."""

    def __init__(
        self,
        authenticator: Authenticator,
        service: LeaseService,
        calls: LeaseCalls,
        revision: Callable[[], int],
        store_id: str,
        on_refusal: OnRefusal = lambda refusal, uid, pid: None,
    ) -> None:
        self._on_refusal = on_refusal
        self._authenticator = authenticator
        self._service = service
        self._calls = calls
        self._revision = revision
        self._store = f"X-Portd-Store: {store_id}\r\n".encode("ascii")
        self._decode = msgspec.json.Decoder(GrantBody).decode

    def accept(self, end: ConnectionPeer, data: bytes, last: Head | None) -> PlainGrant | None:
        """Return the plain grant that `data` is, whole and nothing else; None for everything else.

        `last` is the head that was accepted on this connection before: the same one need not be parsed again.
        """
        head_size = data.find(b"\r\n\r\n", 0, HEAD_MAX_BYTES)
        if head_size < 0:
            return None
        head = last if last is not None and data[:head_size] == last.data else self._read(end, data[:head_size])
        if head is None or len(data) - head_size - 4 != head.body_size:
            return None
        try:
            body = self._decode(data[head_size + 4 :])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return None  # the normal path reports the error
        requests = as_requests(body)
        if any(each.adopt for each in requests) or self._service.unsettled(requests) is not None:
            return None  # the normal path can wait
        return PlainGrant(body, head)

    def grant(self, plain: PlainGrant, send: Send) -> Pending | None:
        """Grant, and send the answer: at once, or when the request that is returned is settled."""
        body, caller = plain.body, plain.head.caller
        try:
            pending = self._service.decide(as_requests(body), caller)
        except Refusal as refusal:
            if not is_foreign(refusal):
                self._on_refusal(refusal, caller.uid, caller.pid)
                send(_refuse(refusal))
                return None
            pending = self._service.refused(refusal, caller)
        except Exception:  # as on the normal path, a fault is logged and its cause not revealed
            logger.exception("a grant failed")
            send(None)
            return None
        was_settled = pending.is_settled
        pending.then(lambda: send(self._respond(pending, body, caller)))
        return None if was_settled else pending

    def _respond(self, pending: Pending, body: GrantBody, caller: Caller) -> bytes | None:
        failpoint("http.answering")
        try:
            answer = self._calls.show_granted(self._service.granted(pending), body, caller)
        except Refusal as refusal:
            self._on_refusal(refusal, caller.uid, caller.pid)
            return _refuse(refusal)
        except Exception:
            logger.exception("a grant failed")
            return None
        headers = b"X-Portd-Revision: %d\r\n%s" % (self._revision(), self._store)
        return _response(answer.status, _REASONS[answer.status], b"application/json", headers, encode(answer.body))

    def _read(self, end: ConnectionPeer, data: bytes) -> Head | None:
        if end.peer is None or not data.startswith(REQUEST_LINE):
            return None
        headers = plain_headers(data)
        if headers is None:
            return None
        try:
            self._authenticator.check_origin(end, {"Host": headers[b"host"].decode("ascii")})
        except ForbiddenOrigin:
            return None
        return Head(data, int(headers[b"content-length"]), self._authenticator.caller(end, {}))


def plain_headers(head: bytes) -> dict[bytes, bytes] | None:
    """Return the headers of a plain grant's head (without its final CRLF CRLF), None where it is not plain.

    What is accepted here is accepted by the normal parser too, with the same meaning.
    """
    if not _HEAD.fullmatch(head):
        return None
    headers: dict[bytes, bytes] = {}
    for line in head[len(REQUEST_LINE) :].split(b"\r\n"):
        name, _, value = line.partition(b":")
        name = name.lower()
        if name not in _HARMLESS or name in headers:
            return None
        headers[name] = value.strip(b" \t")
    is_plain = (
        headers.get(b"host")
        and headers.get(b"content-type", b"application/json") == b"application/json"
        and headers.get(b"connection", b"keep-alive").lower() == b"keep-alive"
        and _LENGTH.match(headers.get(b"content-length", b""))
        and int(headers[b"content-length"]) <= BODY_MAX_BYTES
    )
    return headers if is_plain else None


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
