"""The short way for the one request that comes by the thousand: a plain grant on an idle keep-alive connection.

aiohttp's parser, request and response objects cost as much as the whole grant. A request that is nothing but
`POST /v1/leases` with a body that is complete and valid is taken here; anything else, and whatever could make a
difference (a token, an origin, chunks, an unknown header's meaning), goes the long way. Both ways end in the same
handler, so there is one behaviour; the tests send everything both ways and compare.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from aiohttp.helpers import rfc822_formatted_time

from portd.adapters.http.calls import BODY_MAX_BYTES, Answer, encode
from portd.adapters.http.gate import Gate, Guest
from portd.core.errors import ForbiddenOrigin, Refusal
from portd.core.problems import PROBLEM_TYPE, headers_of, problem_of
from portd.core.rights import Caller

REQUEST_LINE: Final = b"POST /v1/leases HTTP/1.1\r\n"
_HARMLESS: Final = frozenset({b"host", b"content-type", b"content-length", b"accept", b"user-agent",
                              b"accept-encoding", b"accept-language"})
"""Headers that change nothing about a grant. One that is not here sends the request the long way."""
_LENGTH = re.compile(rb"[1-9][0-9]{0,6}\Z")
_REASONS: Final = {200: b"OK", 201: b"Created"}

Grant = Callable[[Any, Caller], Awaitable[Answer]]


class FastLane:
    """Takes plain grants for all connections. `grant` is the handler of the long way."""

    def __init__(self, gate: Gate, decode: Callable[[bytes], Any], grant: Grant, revision: Callable[[], int],
                 hash_token: Callable[[str], bytes]) -> None:
        self._gate = gate
        self._decode = decode
        self._grant = grant
        self._revision = revision
        self._hash_token = hash_token

    def accept(self, guest: Guest, data: bytes, last_head: bytes) -> tuple[Any, Caller, bytes] | None:
        """Return (body, caller, head) of a plain grant, or None for what must go the long way.

        `last_head` is a head that was accepted on this connection before: the same one need not be read again.
        """
        if guest.peer is None or guest.peer.pid is None:
            return None
        end = data.find(b"\r\n\r\n")
        head = data[:end]
        if end < 0 or (head != last_head and not self._is_plain(guest, head)):
            return None
        body = data[end + 4:]
        if len(body) != _length(head):
            return None
        try:
            decoded = self._decode(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return None  # the long way finds the words for it
        caller, _ = self._gate.caller(guest, {}, self._hash_token)
        return decoded, caller, head

    async def answer(self, decoded: Any, caller: Caller) -> bytes:
        """Grant, and return the whole response."""
        try:
            answer = await self._grant(decoded, caller)
        except Refusal as refusal:
            problem = problem_of(refusal)
            headers = "".join(f"{name}: {value}\r\n" for name, value in headers_of(refusal).items())
            return _response(problem.status, b"Refused", PROBLEM_TYPE, headers, encode(problem))
        revision = f"X-Portd-Revision: {self._revision()}\r\n"
        return _response(answer.status, _REASONS[answer.status], "application/json", revision, encode(answer.body))

    def _is_plain(self, guest: Guest, head: bytes) -> bool:
        if not head.startswith(REQUEST_LINE):
            return False
        headers: dict[bytes, bytes] = {}
        for line in head[len(REQUEST_LINE):].split(b"\r\n"):
            name, colon, value = line.partition(b":")
            name = name.lower()
            if not colon or name not in _HARMLESS or name in headers:
                return False
            headers[name] = value.strip()
        if headers.get(b"content-type", b"application/json") != b"application/json":
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


def _response(status: int, reason: bytes, content_type: str, headers: str, body: bytes) -> bytes:
    head = (f"{headers}Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
            f"Date: {rfc822_formatted_time()}\r\n\r\n")
    return b"HTTP/1.1 %d %s\r\n%s%s" % (status, reason, head.encode("latin-1"), body)
