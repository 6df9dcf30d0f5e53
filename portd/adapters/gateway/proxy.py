"""The reverse proxy: one request, from its host name to the answer of an instance.

aiohttp has both halves as public API, with a parser that is fuzzed and kept up, and is a dependency already. It has no
HTTP/2 and drops trailers: HTTP/2 is Caddy's (`portd gateway --caddy`).

What is retried: a request of which nothing was sent (the connection was refused), and a GET, HEAD or OPTIONS without a
body whose connection broke before the answer began. Nothing else: the service may have acted on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Final

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    DummyCookieJar,
    HttpVersion11,
    TCPConnector,
    WSServerHandshakeError,
    web,
)
from multidict import CIMultiDict
from yarl import URL

from portd.adapters.gateway import headers as rules
from portd.adapters.gateway import pages, websockets
from portd.adapters.gateway.balancing import Loads, Target
from portd.adapters.gateway.directory import Directory
from portd.core.hostnames import SUFFIX, PublicName, parse_host

logger = logging.getLogger(__name__)

WAIT_S: Final = 2.0
"""Seconds that a request waits for a service that restarts."""
POLL_S: Final = 0.1
"""Seconds after which a target that refused is tried again without an event: it may listen before portd has seen it."""
CONNECT_S: Final = 1.0
"""Seconds for a connection to a service: it is on this host."""
HEAD_MAX_BYTES: Final = 64 << 10
"""The longest request line, header and answer head: cookies of a dozen dev servers on one parent domain add up."""
SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
REFUSED: Final = frozenset({"CONNECT", "TRACE"})
"""Methods that a gateway has no use for (RFC 9110 sections 9.3.6 and 9.3.8)."""
SKIPPED: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
"""Headers that aiohttp would add to a request of its own."""


class Broken(Exception):
    """A target failed before it answered. `is_untouched`: nothing of the request has reached it."""

    def __init__(self, target: Target, reason: str, *, is_untouched: bool) -> None:
        super().__init__(reason)
        self.target = target
        self.is_untouched = is_untouched


class Proxy:
    """Answers the requests of one gateway; make it in a running loop."""

    def __init__(self, directory: Directory, port: int) -> None:
        self._directory = directory
        self._port = port
        self._loads = Loads()
        self._reusing = _session(force_close=False)
        self._fresh = _session(force_close=True)

    async def close(self) -> None:
        """Close the connections to services."""
        await self._reusing.close()
        await self._fresh.close()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        names = parse_host(request.host)
        if request.method in REFUSED:
            return pages.respond(request, 405, "Method not allowed", [f"The gateway does not serve {request.method}."])
        if not names:
            return await self._answer_foreign(request)
        if rules.is_loop(request.headers):
            loop = (
                f"{names[0].service} sends its requests back to the gateway: give it the address of the other service."
            )
            return pages.respond(request, 508, "Loop detected", [loop])
        self._loads.forget_unused()
        return await self._answer(request, names)

    async def _answer(self, request: web.BaseRequest, names: Sequence[PublicName]) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_S
        failed: set[Target] = set()
        is_known: bool | None = None
        while True:
            targets = [one for one in await self._directory.targets(names) if one not in failed]
            left_s = deadline - loop.time()
            if not targets:
                if is_known is None:
                    is_known = bool(failed) or await self._is_known(names)
                if not is_known or left_s <= 0:
                    return await self._explain(request, names)
                await self._directory.wait_for_change(names, min(POLL_S, left_s))
                failed.clear()
                continue
            target = self._loads.pick(targets)
            with self._loads.use(target):
                try:
                    if rules.is_websocket(request.method, request.headers):
                        return await self._open_websocket(request, target)
                    return await self._forward(request, target)
                except Broken as error:
                    may_retry = error.is_untouched or (request.method in SAFE and not request.body_exists)
                    if not may_retry or left_s <= 0:
                        said = f"{target.instance} at {target.origin} did not answer: {error}."
                        return pages.respond(request, 502, "Bad gateway", [said])
                    failed.add(target)

    async def _forward(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        """Send a request to a target and its answer to the client; raises Broken before the answer has begun."""
        body = _Body(request) if request.body_exists else None
        session = self._reusing if body is None and request.method in SAFE else self._fresh
        try:
            answer = await session.request(
                request.method,
                URL(target.origin + _path(request), encoded=True),
                headers=self._headers(request),
                data=None if body is None else body.read(),
                expect100=body is not None and body.waits,
                allow_redirects=False,
                ssl=False,
            )
        except (ClientError, TimeoutError) as error:
            raise _broken(target, error) from error
        try:
            return await _send_answer(request, answer, is_body_read=body is None or request.content.at_eof())
        finally:
            answer.release()

    async def _open_websocket(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        url = URL(target.origin + _path(request), encoded=True)
        try:
            service = await websockets.connect(self._fresh, url, self._headers(request))
        except WSServerHandshakeError as error:
            return web.Response(status=error.status, text=f"{error.message}\n")
        except (ClientError, TimeoutError) as error:
            raise _broken(target, error) from error
        return await websockets.relay(request, service)

    def _headers(self, request: web.BaseRequest) -> CIMultiDict[str]:
        return rules.to_service(request.headers, request.remote or "127.0.0.1", request.host)

    async def _is_known(self, names: Sequence[PublicName]) -> bool:
        """Return whether somebody has or had one of the names: then it may come back."""
        for name in names:
            if await self._directory.live(name) or await self._directory.ended(name):
                return True
        return False

    async def _explain(self, request: web.BaseRequest, names: Sequence[PublicName]) -> web.Response:
        """Answer for names that nobody serves: 503 where somebody has or had one of them, else 404."""
        services = await self._directory.services()
        for name in names:
            live, ended = await self._directory.live(name), await self._directory.ended(name)
            if live or ended:
                title = f"{name.service} does not answer"
                return pages.respond(request, 503, title, pages.why_none(name, live, ended), services, self._port)
        if not self._directory.is_following:
            said = ["The daemon does not answer, and the gateway has not seen this name yet: see 'portd status'."]
            return pages.respond(request, 503, "portd is away", said)
        title = f"There is no {request.host.partition(':')[0]}"
        return pages.respond(request, 404, title, pages.why_none(names[0], [], []), services, self._port)

    async def _answer_foreign(self, request: web.BaseRequest) -> web.Response:
        """Answer for hosts that are no names of portd: `localhost` itself lists the services."""
        if request.host.partition(":")[0].lower() == SUFFIX:
            services = await self._directory.services()
            said = [] if services else ["No service answers at the moment."]
            return pages.respond(request, 200, "Services of this host", said, services, self._port)
        said = [f"{request.host!r} is no name of portd: names are SERVICE.localhost and INSTANCE.SERVICE.localhost."]
        return pages.respond(request, 404, "No such host", said)


class _Body:
    """A request's body on its way to the service."""

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request
        self.waits = request.version >= HttpVersion11 and request.headers.get("Expect", "").lower() == "100-continue"

    async def read(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes. It is first read when the service accepts it: then the client may send it."""
        if self.waits:
            await self._request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._request.writer.output_size = 0  # the answer's head is still to be written
        async for part in self._request.content.iter_any():
            yield part


def _session(*, force_close: bool) -> ClientSession:
    """Make a session. Connections are reused only for requests that may be repeated: a service may close an idle one
    just when a request is sent on it."""
    return ClientSession(
        connector=TCPConnector(limit=0, force_close=force_close, keepalive_timeout=None if force_close else 15.0),
        cookie_jar=DummyCookieJar(),
        skip_auto_headers=SKIPPED,
        auto_decompress=False,
        timeout=ClientTimeout(total=None, sock_connect=CONNECT_S),
        max_line_size=HEAD_MAX_BYTES,
        max_field_size=HEAD_MAX_BYTES,
    )


async def _send_answer(request: web.BaseRequest, answer: ClientResponse, *, is_body_read: bool) -> web.StreamResponse:
    """Send a service's answer to the client, each part as it comes."""
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=rules.end_to_end(answer.headers))
    if not is_body_read:
        response.force_close()
    await response.prepare(request)
    try:
        async for part in answer.content.iter_any():
            await response.write(part)
    except (ClientError, TimeoutError) as error:
        logger.info("an answer for %s broke off: %s", request.host, error)
        if request.transport is not None:
            request.transport.close()  # without an end the client sees that the answer is not whole
        return response
    await response.write_eof()
    return response


def _path(request: web.BaseRequest) -> str:
    """Return path and query as the client sent them; a request in absolute form has them too."""
    target = request.raw_path
    return target if target.startswith("/") else request.rel_url.raw_path_qs


def _broken(target: Target, error: Exception) -> Broken:
    is_untouched = isinstance(error, ClientConnectorError | ConnectionTimeoutError)
    return Broken(
        target, "connection refused" if is_untouched else str(error) or "no answer", is_untouched=is_untouched
    )
