"""The `http` check, plain and over TLS: one request, and a bounded answer.

Every check opens a connection of its own, and hangs up first. A kept one would prove nothing about `accept`, would
occupy a worker of a server that has few, cost a descriptor a service at either end, and still lead to the old process
after the port has changed hands; `Connection: close` would leave the TIME_WAIT on the service's own port, where it
keeps the next start from binding without SO_REUSEADDR. No redirect is followed: a 3xx is judged by its status as any
other. HTTP is spoken by h11 (sans I/O), so that bytes, interim answers and chunks are counted here: a client library
reads `100 Continue` for ever.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

import h11

from portd.adapters.probes.connection import Connection, Target, Trust, opened
from portd.adapters.probes.results import USER_AGENT, CheckResult, ProbeFailed, note
from portd.core.model import HttpCheck

HEAD_MAX_BYTES: Final = 64 * 1024
BODY_MAX_BYTES: Final = 64 * 1024
"""How much of a body is read: enough for any page that says how a service is. What comes after it is not waited for."""
EVENTS_MAX: Final = 4096
"""Chunks and interim answers of one check: a body of single-byte chunks costs CPU out of all proportion to its size."""
EVENTS_A_TURN: Final = 256
"""Events that are parsed before the loop gets its turn: a few milliseconds."""
INTERIM_MAX: Final = 16
"""Interim (1xx) answers before the real one: servers send one or two."""
BODY_WAIT_S: Final = 1.0
"""How long the rest of a body is waited for that decides nothing: hanging up at once would look like a failure in the
service's log."""
TOO_MANY_REQUESTS: Final = 429
"""RFC 6585 section 4: the service works, and has enough to do."""


class Response(NamedTuple):
    """The head of an answer, and the beginning of its body."""

    status: int
    reason: str
    body: bytes


async def probe(target: Target, check: HttpCheck, trust: Trust | None) -> CheckResult:
    """Send the request once. Raises ProbeFailed or OSError when there is no proper answer; the caller sets the
    time-out."""
    async with opened(target, trust) as connection:
        return judge(check, await Exchange(connection, target, check, trust).run())


class Exchange:
    """One request and its answer on one connection."""

    def __init__(self, connection: Connection, target: Target, check: HttpCheck, trust: Trust | None) -> None:
        self._connection = connection
        self._target = target
        self._check = check
        self._server_name = None if trust is None else trust.server_name
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_MAX_BYTES)
        self._events = 0
        self._status = 0
        self._reason = ""
        self._body = bytearray()

    async def run(self) -> Response:
        """Send the request and read the answer; raises ProbeFailed for what is no HTTP, or too much of it."""
        try:
            self._connection.send(self._request())
            await self._read_head()
            # Where the status alone decides, a body that does not end (a stream) does not make the service sick.
            may_linger = is_expected(self._check, self._status) and self._check.expect_body is None
            try:
                async with asyncio.timeout(min(BODY_WAIT_S, self._check.timeout / 2) if may_linger else None):
                    await self._read_body()
            except TimeoutError:
                if not may_linger:
                    raise
        except h11.RemoteProtocolError as error:
            if "closed connection" in str(error) or "without sending complete" in str(error):
                raise ProbeFailed("the answer broke off") from error
            raise ProbeFailed(f"no HTTP answer: {note(str(error))}") from error
        except h11.LocalProtocolError as error:
            raise ProbeFailed(f"the check's headers make no request: {note(str(error))}") from error
        return Response(self._status, self._reason, bytes(self._body))

    def _request(self) -> bytes:
        check = self._check
        given = {name.lower() for name in check.headers}
        usual = {
            "Host": self._server_name or self._target.authority,
            "User-Agent": USER_AGENT,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Connection": "keep-alive",
        }
        if check.method == "POST" and "transfer-encoding" not in given:
            usual["Content-Length"] = "0"
        headers = [(name, value) for name, value in usual.items() if name.lower() not in given]
        request = h11.Request(
            method=check.method,
            target=check.path,
            headers=[*headers, *((k, v.strip()) for k, v in check.headers.items())],
        )
        return (self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b"")

    async def _read_head(self) -> None:
        interim = 0
        while True:
            event = await self._next_event()
            if isinstance(event, h11.InformationalResponse):
                interim += 1
                if interim > INTERIM_MAX:
                    raise ProbeFailed(f"more than {INTERIM_MAX} interim answers, and no final one")
            elif isinstance(event, h11.Response):
                self._status, self._reason = event.status_code, event.reason.decode("latin-1")
                return
            else:
                raise ProbeFailed("the connection was closed without an answer")

    async def _read_body(self) -> None:
        while len(self._body) < BODY_MAX_BYTES:
            event = await self._next_event()
            if not isinstance(event, h11.Data):
                return
            self._body += event.data[: BODY_MAX_BYTES - len(self._body)]

    async def _next_event(self) -> object:
        """Return the next part of the answer; raises ProbeFailed where the connection ends before its head."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self._connection.receive()
            if not data and not self._status:
                said = self._http.trailing_data[0]
                raise ProbeFailed(
                    f"no HTTP answer: {note(said[:80])}" if said else "the connection was closed without an answer"
                )
            self._http.receive_data(data)
        self._events += 1
        if self._events > EVENTS_MAX:
            raise ProbeFailed("the answer comes in too many pieces")
        if self._events % EVENTS_A_TURN == 0:
            await asyncio.sleep(0)
        return event


def is_expected(check: HttpCheck, status: int) -> bool:
    """Return whether the status is one that passes."""
    return status in check.expect_status if check.expect_status else 200 <= status < 300


def judge(check: HttpCheck, response: Response) -> CheckResult:
    """Judge an answer by its status and the beginning of its body."""
    line = f"{response.status} {response.reason}".strip()
    body = response.body
    if not is_expected(check, response.status):
        text = note(f"{line}: ".encode() + body) if body else note(line)
        return CheckResult("warning" if response.status == TOO_MANY_REQUESTS else "critical", text)
    if check.expect_body is not None and check.expect_body.encode() not in body:
        return CheckResult("critical", note(f"{line}, but its first {len(body)} bytes lack {check.expect_body!r}"))
    return CheckResult("passing", note(line))
