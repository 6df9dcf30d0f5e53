"""The HTTP server: it takes connections, lets calls through the gate, hands them to the routes, and answers every
refusal with a problem document. Slow and silent clients are cut off.

aiohttp's own request handler is subclassed for what it leaves open: what is known of the other end, the time that a
request's head may take, the shape of its answers to broken requests, and the fast lane. The names of aiohttp's that
begin with an underscore are those of 3.14, to which the dependency is pinned.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final

from aiohttp import HttpVersion11, web
from aiohttp.web_protocol import RequestHandler

from portd.adapters.http.calls import BODY_MAX_BYTES, Answer, Call, Reader, Route, encode
from portd.adapters.http.fastlane import FastLane, Head
from portd.adapters.http.gate import Gate, Guest
from portd.core.errors import InvalidRequest, NotFound, Refusal, Unauthenticated
from portd.core.problems import (
    PROBLEM_TYPE,
    MethodNotAllowed,
    Problem,
    headers_of,
    problem_of,
)
from portd.leasing.journal import Entry

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S: Final = 10.0
"""Seconds for the head of a request to arrive, and again for its body: a phone on a bad network takes one."""
ANSWER_TIMEOUT_S: Final = 30.0
"""Seconds for a client to take an answer; one that does not read is cut off."""
KEEPALIVE_S: Final = 75.0
"""Seconds that an idle connection stays: longer than common proxies keep theirs, so that they close first."""
LINGER_S: Final = 1.0
"""Seconds to go on reading what was refused as too large or too late: a client that is still sending would find the
connection reset, and never read why."""
CONNECTIONS_MAX: Final = 8_192
"""Connections at once; the next one is closed. Leaves descriptors for holds and pidfds at a limit of 20,000."""

FIRST_REQUEST_S: Final = 0.05
"""Seconds that a stop gives callers who have connected and not asked yet. A local one needs a thousandth of it."""


class Connection(RequestHandler):
    """One client's connection."""

    __slots__ = ("_abort_timer", "_fast", "_head_timer", "_is_partial", "_last_head", "_late", "_wire", "guest")

    guest: Guest

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Find out who is there; turn away what is too much."""
        self._wire: Any = transport
        self._head_timer: asyncio.TimerHandle | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self._fast: Entry | None = None
        self._is_partial = False
        self._last_head: Head | None = None
        self._late: list[bytes] = []
        server = self._manager
        assert isinstance(server, Server)
        self.guest = server.gate.identify(transport)
        super().connection_made(transport)
        if len(server.connections) > CONNECTIONS_MAX:
            self.force_close()

    def data_received(self, data: bytes) -> None:
        """Take data, in its turn: after the grant before it, and when aiohttp waits for the next request again."""
        is_between = self._waiter is None and not self._request_in_progress and not self._messages
        if is_between and not self._late:
            self._loop.call_soon(self._take_late)  # it waits by then; else a connection stays on the long way for good
        if self._fast is None and not self._late and not is_between:
            self._take(data)
            return
        self._late.append(data)
        if sum(map(len, self._late)) > BODY_MAX_BYTES:
            self.force_close()

    def _take_late(self) -> None:
        late, self._late = b"".join(self._late), []
        if late and self._wire is not None:
            self._take(late)

    def _take(self, data: bytes) -> None:
        """Take what is a plain grant as such; a request whose head does not end in time is given up."""
        if self._is_idle() and self._take_fast(data):
            return
        super().data_received(data)
        self._is_partial = not self._messages and not self._request_in_progress
        if self._messages or self._request_in_progress:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self._loop.call_later(REQUEST_TIMEOUT_S, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the timers."""
        self._wire = None
        self._stop_head_timer()
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        super().connection_lost(exc)

    async def start(self) -> None:
        """Serve one request after the other until the end."""
        try:
            await super().start()
        finally:
            self._bound_closing()

    def force_close(self) -> None:
        """Close without another request."""
        self._bound_closing()
        super().force_close()

    def _bound_closing(self) -> None:
        """Give a client that is still to read something a while for it: a transport would wait for ever to close."""
        if self._wire is not None and self._abort_timer is None and self._wire.get_write_buffer_size():
            self._abort_timer = self._loop.call_later(ANSWER_TIMEOUT_S, self._wire.abort)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what aiohttp itself refuses (broken HTTP), and what went wrong in portd, with a problem document."""
        if status < 500:
            refusal = InvalidRequest(f"this is not HTTP: {(message or 'bad request').splitlines()[0][:200]}")
            response = problem_response(problem_of(refusal))
        else:
            if not isinstance(exc, ConnectionError):  # a client that goes in the middle of its answer is no fault
                logger.error("a request failed: %s %s", request.method, request.rel_url, exc_info=exc)
            response = internal_error()
        response.force_close()
        return response

    async def finish_response(self, request: Any, resp: Any, start_time: Any) -> Any:
        """Send the answer, in bounded time."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            if self._wire is not None:
                self._wire.abort()
            return resp, True

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """Answer a grant that is under way, then close."""
        if self._fast is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._fast.wait(), timeout)  # its answer is sent by a callback that came before
        await super().shutdown(timeout)

    def _is_idle(self) -> bool:
        """Tell whether aiohttp waits for the first byte of a request, and the client takes its answers."""
        waiter = self._waiter
        return (
            waiter is not None
            and not waiter.done()
            and not self._messages
            and not self._is_partial
            and not self._close
            and not self._force_close
            and not self.writing_paused
        )

    def _take_fast(self, data: bytes) -> bool:
        server = self._manager
        if not isinstance(server, Server) or server.fast_lane is None:
            return False
        accepted = server.fast_lane.accept(self.guest, data, self._last_head)
        if accepted is None:
            return False
        wish, self._last_head = accepted
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        self._fast = server.fast_lane.grant(wish, self._last_head.caller, self._send)
        return True

    def _send(self, response: bytes | None) -> None:
        """Send the answer to a plain grant, then take what has come in meanwhile."""
        self._fast = None
        if self.transport is None or self.transport.is_closing():
            return
        if response is None:
            self.force_close()
            return
        self.transport.write(response)
        if self._late:
            self._loop.call_soon(self._take_late)  # not here: the journal is settling a batch

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class Server(web.Server):
    """Makes connections that know the gate."""

    def __init__(self, handler: Any, gate: Gate, fast_lane: FastLane | None, **kwargs: Any) -> None:
        super().__init__(handler, **kwargs)
        self.gate = gate
        self.fast_lane = fast_lane

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    """Runs the application on portd's own connections."""

    def __init__(self, app: web.Application, gate: Gate, fast_lane: FastLane | None) -> None:
        super().__init__(app, access_log=None, shutdown_timeout=1.0)
        self._gate = gate
        self._fast_lane = fast_lane

    async def _make_server(self) -> web.Server:
        # With cancellation nobody waits for a change, or the disk, on behalf of a client that has gone; the service
        # sees to it that the work goes on.
        stock = await super()._make_server()
        return Server(
            stock.request_handler,
            self._gate,
            self._fast_lane,
            request_factory=stock.request_factory,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=KEEPALIVE_S,
            lingering_time=LINGER_S,
        )


class HttpServer:
    """The API on any number of sockets. `revision` gives the value of X-Portd-Revision."""

    def __init__(self, gate: Gate, hash_token: Callable[[str], bytes], revision: Callable[[], int]) -> None:
        self._gate = gate
        self._hash_token = hash_token
        self._revision = revision
        self._app = web.Application(client_max_size=BODY_MAX_BYTES, middlewares=[_refuse_unknown])
        self._runner: _Runner | None = None

    def add(self, routes: Iterable[Route]) -> None:
        """Serve these routes; only before the start."""
        for route in routes:
            self._app.router.add_route(route.method, route.path, self._handler(route), expect_handler=_expect)

    async def start(self, fast_lane: FastLane | None = None) -> None:
        """Get ready to serve; sockets come after."""
        self._runner = _Runner(self._app, self._gate, fast_lane)
        await self._runner.setup()

    async def serve(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept on a bound socket until the stop; the socket is then closed."""
        assert self._runner is not None
        await web.SockSite(self._runner, listener, ssl_context=tls, backlog=1024).start()

    async def shut(self) -> None:
        """Accept nobody any more, and let those who have just been let in ask: nobody is turned away at the door."""
        if self._runner is not None and self._runner.sites:
            for site in tuple(self._runner.sites):
                await site.stop()
            await asyncio.sleep(FIRST_REQUEST_S)

    async def close(self) -> None:
        """End streams and long polls, answer what is under way for a second, close everything."""
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def connection_count(self) -> int:
        """Return how many connections are open."""
        server = self._runner.server if self._runner is not None else None
        return len(server.connections) if server is not None else 0

    def _handler(self, route: Route) -> Any:
        reader = Reader(route)
        needs_pid = route.method == "POST" and route.path == "/v1/leases"

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                call = await self._let_in(route, reader, request, needs_pid)
                answer = await route.handler(call)
                return answer if isinstance(answer, web.StreamResponse) else self._respond(answer)
            except Refusal as refusal:
                return self._refuse(refusal)

        return handle

    async def _let_in(self, route: Route, reader: Reader, request: web.Request, needs_pid: bool) -> Call:
        guest: Guest = request.protocol.guest  # type: ignore[attr-defined]
        if route.access != "anybody":
            self._gate.check_origin(guest, request.headers)
        caller, known = self._gate.caller(guest, request.headers, self._hash_token)
        if not known and not (route.access == "anybody" or (route.access == "lease" and caller.token_hash)):
            raise Unauthenticated(
                "callers from elsewhere need a token of the configuration: send it as 'Authorization: Bearer TOKEN'"
            )
        query = reader.query(request)
        body = await reader.body(request, REQUEST_TIMEOUT_S)
        if caller.pid is None and caller.uid is not None and (needs_pid or caller.uid == 0):
            await self._gate.with_pid(guest)
            caller, _ = self._gate.caller(guest, request.headers, self._hash_token)
        return Call(request, caller, query, body)

    def _respond(self, answer: Answer) -> web.Response:
        headers = {"X-Portd-Revision": str(self._revision()), **answer.headers}
        if answer.body is None:
            return web.Response(status=answer.status, headers=headers)
        headers.setdefault("Content-Type", "application/json")
        body = answer.body if isinstance(answer.body, bytes) else encode(answer.body)
        return web.Response(body=body, status=answer.status, headers=headers)

    @staticmethod
    def _refuse(refusal: Refusal) -> web.Response:
        return problem_response(problem_of(refusal), headers_of(refusal))


@web.middleware
async def _refuse_unknown(request: web.Request, handler: Any) -> web.StreamResponse:
    """Answer for paths and methods that are not there, and for what nobody foresaw."""
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        refusal: Refusal = MethodNotAllowed(f"{request.method} can't be done on {request.path}; possible: {allowed}")
        return problem_response(problem_of(refusal), {"Allow": allowed})
    except web.HTTPNotFound:
        return problem_response(problem_of(NotFound(f"there is no {request.path} here; see /openapi.json")))
    except web.HTTPException as error:
        return problem_response(problem_of(InvalidRequest(error.reason)))
    except (ConnectionError, asyncio.CancelledError):
        raise  # the client has gone, or the daemon stops: nobody to answer
    except Exception:  # the last line of defence: a fault of ours becomes a 500 and one line with its trace
        logger.exception("%s %s failed", request.method, request.rel_url)
        return internal_error()
    return response


async def _expect(request: web.Request) -> None:
    """Ask for the body where the client waits for that; any other expectation may be ignored (RFC 9110, 10.1.1)."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer's head is still to be written


def problem_response(problem: Problem, headers: dict[str, str] | None = None) -> web.Response:
    """Make the response that carries a problem document."""
    return web.Response(body=encode(problem), status=problem.status, headers=headers, content_type=PROBLEM_TYPE)


def internal_error() -> web.Response:
    """Make the answer to a fault of ours: it tells nothing that a client could use, or should know."""
    problem = Problem(
        "urn:portd:problem:internal_error",
        "portd failed",
        500,
        "this is a fault of portd's; its log says more",
        "internal_error",
    )
    return problem_response(problem)
