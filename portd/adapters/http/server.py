"""The HTTP server: accepts connections, authenticates each request, calls its route, and answers.

Every refusal is answered with a problem document. `front.py` has what concerns a connection, `problems.py` what a
refusal becomes; this module joins routes, authentication and answers.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Final

from aiohttp import HttpVersion11, web

from portd.adapters.http import front as fronts
from portd.adapters.http.authenticator import WRONG_TOKEN_DELAY_S, Authenticator
from portd.adapters.http.calls import BODY_MAX_BYTES, Answer, Call, Reader, Route, encode
from portd.adapters.http.front import FRONT, Answerer, Connections, Front, PlainGrants
from portd.adapters.http.paging import Rows
from portd.adapters.http.problems import (
    PROBLEM_TYPE,
    MethodNotAllowed,
    Problem,
    headers_of,
    internal_error,
    problem_of,
)
from portd.adapters.http.tls import TlsAcceptor
from portd.core.errors import Busy, InvalidRequest, NotFound, NotOwner, Refusal, Unauthenticated
from portd.core.failpoints import failpoint

logger = logging.getLogger(__name__)

FIRST_REQUEST_S: Final = 0.05
"""Seconds that a stop leaves to clients that have connected and not sent their request yet. A local one needs a
thousandth of it."""
STOP_S: Final = 1.0
"""Seconds that a stop leaves to requests under way."""
UNREAD_MAX_BYTES: Final = 256 << 20
"""Bytes of answers that may wait for their clients in all: beyond, reading requests are refused with `busy`."""
USER_UNREAD_MAX_BYTES: Final = 32 << 20
"""The same for the clients of one user."""

OnRefusal = Callable[[Refusal, int | None, int | None], None]

BACKLOG: Final = 4096
"""Connections that may wait while the daemon restarts; systemd/portd.socket has the same. asyncio reports a full unix
socket as ENOTCONN to its clients."""


class HttpServer:
    """The API on any number of sockets. `revision` gives the value of X-Portd-Revision, `store_id` of X-Portd-Store.

    `on_refusal` is called with every refusal of a handler, and the caller's uid and pid where they are known.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        revision: Callable[[], int],
        store_id: str,
        on_refusal: OnRefusal = lambda refusal, uid, pid: None,
    ) -> None:
        self._authenticator = authenticator
        self._on_refusal = on_refusal
        self._revision = revision
        self._store_id = store_id
        self._app = web.Application(client_max_size=BODY_MAX_BYTES, middlewares=[_answer_all])
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            shutdown_timeout=STOP_S,
            # A client that has gone waits for nothing; the service sees to it that the work goes on.
            handler_cancellation=True,
        )
        self._connections = Connections()
        self._fast_path: PlainGrants | None = None
        self._servers: list[asyncio.Server | TlsAcceptor] = []

    def add(self, routes: Iterable[Route]) -> None:
        """Serve these routes; only before the start."""
        for route in routes:
            self._app.router.add_route(route.method, route.path, self._handler(route), expect_handler=_expect)

    async def start(self, fast_path: PlainGrants | None = None) -> None:
        """Get ready to serve; sockets come after."""
        self._fast_path = fast_path
        await self._runner.setup()

    async def serve(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept on a bound socket until the stop; the socket is then closed."""
        if tls is not None:
            acceptor = TlsAcceptor(listener, tls, self._connections, self._make_front)
            acceptor.start()
            self._servers.append(acceptor)
            return
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_server(self._make_front, sock=listener, backlog=BACKLOG))

    async def stop_accepting(self) -> None:
        """Stop accepting; wait briefly so that clients already connected can send their request."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        if servers:
            await asyncio.sleep(FIRST_REQUEST_S)

    async def close(self) -> None:
        """End streams and long polls, answer what is under way for a second, close everything."""
        await self.stop_accepting()
        self._connections.is_stopping = True
        await asyncio.gather(*(front.stop(STOP_S) for front in tuple(self._connections.fronts)))
        await self._runner.cleanup()

    @property
    def connection_count(self) -> int:
        """Return how many connections are open."""
        return len(self._connections)

    @property
    def wrong_token_count(self) -> int:
        """Return how many requests showed a token that gave no right."""
        return self._authenticator.wrong_token_count

    def _make_front(self) -> Front:
        return Front(
            self._connections,
            self._authenticator,
            self._fast_path,
            self._make_inner,
            _refuse_connection,
            asyncio.get_running_loop(),
        )

    def _make_inner(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None
        return Answerer(
            server,
            _answer_error,
            loop=asyncio.get_running_loop(),
            access_log=None,
            keepalive_timeout=fronts.KEEPALIVE_S,
            lingering_time=fronts.CLOSING_S,
        )

    def _handler(self, route: Route) -> Any:
        reader = Reader(route)
        needs_process = route.method == "POST" and route.path == "/v1/leases"

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                call = await self._authenticate(route, reader, request, needs_process)
                self._check_unread(call)
                answer = await route.handler(call)
                if isinstance(answer, web.StreamResponse):
                    return answer
                if isinstance(answer.body, Rows):
                    return await self._respond_in_slices(request, answer, answer.body)
                return self._respond(answer)
            except Refusal as refusal:
                peer = _front(request).end.peer
                self._on_refusal(refusal, peer and peer.uid, peer and peer.pid)
                gave_no_right = isinstance(refusal, NotOwner | Unauthenticated)
                if gave_no_right and self._authenticator.shows_unknown_token(request.headers):
                    self._authenticator.report_wrong_token(_front(request).end)
                    await asyncio.sleep(WRONG_TOKEN_DELAY_S)
                return _refuse(refusal)

        return handle

    async def _authenticate(self, route: Route, reader: Reader, request: web.Request, needs_process: bool) -> Call:
        front = _front(request)
        self._authenticator.check_origin(front.end, request.headers)
        caller = self._authenticator.caller(front.end, request.headers)
        is_let_in = route.access == "anybody" or (route.access == "lease" and caller.token_hash is not None)
        if not caller.is_known and not is_let_in:
            raise Unauthenticated(
                "the caller can't be identified over this connection: send a token of the configuration as "
                "'Authorization: Bearer TOKEN'"
            )
        query = reader.query(request)
        body = await reader.body(request, fronts.REQUEST_TIMEOUT_S)
        if front.end.needs_process and (needs_process or caller.uid == 0):
            await self._authenticator.find_process(front.end)
            caller = self._authenticator.caller(front.end, request.headers)
        return Call(request, caller, query, body)

    def _check_unread(self, call: Call) -> None:
        """Refuse a reading request while the clients of this user, or all, leave too many bytes of answers unread."""
        if call.request.method != "GET":
            return
        unread = self._connections.unread_bytes()
        if unread and (
            unread[_front(call.request).end.user] > USER_UNREAD_MAX_BYTES or unread.total() > UNREAD_MAX_BYTES
        ):
            raise Busy("too many answers wait for their clients to read them")

    def _respond(self, answer: Answer) -> web.Response:
        failpoint("http.answering")
        headers = self._headers(answer)
        if answer.body is None:
            return web.Response(status=answer.status, headers=headers)
        headers.setdefault("Content-Type", "application/json")
        body = answer.body if isinstance(answer.body, bytes) else encode(answer.body)
        return web.Response(body=body, status=answer.status, headers=headers)

    async def _respond_in_slices(self, request: web.Request, answer: Answer, rows: Rows) -> web.StreamResponse:
        """Send a long document piece by piece: others are served between two, and a slow reader holds up the rest."""
        headers = {"Content-Type": "application/json", **self._headers(answer)}
        slices = rows.slices(encode)
        first = next(slices)
        second = next(slices, None)
        if second is None:
            return web.Response(body=first, status=answer.status, headers=headers)
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        for piece in chain((first, second), slices):
            await response.write(piece)
            await asyncio.sleep(0)
        await response.write_eof()
        return response

    def _headers(self, answer: Answer) -> dict[str, str]:
        revision = answer.revision if answer.revision is not None else self._revision()
        return {"X-Portd-Revision": str(revision), "X-Portd-Store": self._store_id, **answer.headers}


def _front(request: web.BaseRequest) -> Front:
    front = request.get_extra_info(FRONT)
    if not isinstance(front, Front):
        raise ConnectionResetError  # the client has gone, and its transport with it
    return front


@web.middleware
async def _answer_all(request: web.Request, handler: Any) -> web.StreamResponse:
    """Answer unknown paths and methods, and what no handler expected, with a problem document too."""
    front = _front(request)
    front.request_began()
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        refusal = MethodNotAllowed(f"{request.path} has no method {request.method}: use {allowed}")
        return problem_response(problem_of(refusal), {"Allow": allowed})
    except web.HTTPNotFound:
        return _refuse(NotFound(f"there is no {request.path}: see /openapi.json"))
    except web.HTTPException as error:
        return _refuse(InvalidRequest(error.reason))
    except (ConnectionError, asyncio.CancelledError):
        raise  # the client has gone, or the daemon stops: nobody to answer
    except Exception:  # the last line of defence: a fault becomes a 500 and one log line with its trace
        logger.exception("%s %s failed", request.method, request.rel_url)
        return problem_response(internal_error())
    finally:
        front.request_ended()
    return response


async def _expect(request: web.Request) -> None:
    """Request the body where the client waits for that; any other expectation may be ignored (RFC 9110, 10.1.1)."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer's head is still to be written


def problem_response(problem: Problem, headers: dict[str, str] | None = None) -> web.Response:
    """Make the response that carries a problem document."""
    response = web.Response(body=encode(problem), status=problem.status, headers=headers, content_type=PROBLEM_TYPE)
    if problem.status in (408, 413):
        response.force_close()  # the rest of the body is never read
    return response


def _refuse(refusal: Refusal) -> web.Response:
    return problem_response(problem_of(refusal), headers_of(refusal))


def _refuse_connection(refusal: Busy) -> bytes:
    """Render the whole answer to the first request of a connection beyond a bound."""
    body = encode(problem_of(refusal))
    headers = {**headers_of(refusal), "Content-Type": PROBLEM_TYPE, "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 503 Service Unavailable\r\n{head}Connection: close\r\n\r\n".encode("ascii") + body


def _answer_error(
    request: web.BaseRequest, status: int, error: BaseException | None, message: str | None
) -> web.StreamResponse:
    """Answer what aiohttp itself refuses (broken HTTP), and what went wrong outside of every handler."""
    if status < 500:
        reason = (message or "bad request").splitlines()[0][:200]
        return _refuse(InvalidRequest(f"the request is not valid HTTP: {reason}"))
    if not isinstance(error, ConnectionError):  # a client that goes in the middle of its answer is no fault
        logger.error("a request failed: %s %s", request.method, request.rel_url, exc_info=error)
    return problem_response(internal_error())
