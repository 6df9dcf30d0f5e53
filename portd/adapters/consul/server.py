"""The listeners of Consul's API: loopback alone, since its callers are identified by the kernel."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from aiohttp import web

from portd.adapters.consul import naming
from portd.adapters.consul.answers import Answers
from portd.adapters.consul.reads import Reads
from portd.adapters.consul.shapes import Node
from portd.adapters.consul.writes import Writes
from portd.core.errors import ForbiddenOrigin, Refusal
from portd.core.model import Event
from portd.core.rights import Caller
from portd.leasing.queries import LeaseQueries
from portd.leasing.service import LeaseService

logger = logging.getLogger(__name__)

Identify = Callable[[web.Request], Awaitable[Caller]]
CheckOrigin = Callable[[web.Request], None]


class ConsulServer:
    """Serves Consul's API at some loopback addresses. It is a watcher of events, for blocking queries."""

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        service: LeaseService,
        queries: LeaseQueries,
        identify: Identify,
        check_origin: CheckOrigin,
    ) -> None:
        self.addresses = addresses
        self.problem: str | None = None
        self._queries = queries
        self._check_origin = check_origin
        self._answers = Answers(lambda: queries.revision, naming.affects)
        self._reads = Reads(queries, self._answers, self._node_of)
        self._writes = Writes(service, self._reads, identify)
        self._runner: web.AppRunner | None = None
        self._reaper: asyncio.Task[None] | None = None

    def apply(self, event: Event) -> None:
        """Receive an event."""
        self._answers.apply(event)

    async def start(self) -> None:
        """Listen. An address that can't be had is reported in `problem`: leases matter more."""
        app = web.Application(middlewares=[self._guard])
        for path, handler in self._reads.routes():
            app.router.add_get(path, handler)
        for path, handler in self._writes.routes():
            app.router.add_put(path, handler)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await self._runner.setup()
        for address in self.addresses:
            try:
                await web.SockSite(self._runner, _listen(address), backlog=4096).start()
            except OSError as error:
                self.problem = f"{address[0]} port {address[1]} can't be served: {error.strerror or error}"
                logger.error("[compat] consul: %s", self.problem)
        self._reaper = asyncio.create_task(self._writes.reap())

    async def close(self) -> None:
        """Answer every blocking query, then stop listening."""
        self._answers.close()
        if self._reaper is not None:
            self._reaper.cancel()
            with suppress(asyncio.CancelledError):
                await self._reaper
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Refuse what a web page could have sent, with Consul's text."""
        try:
            self._check_origin(request)
        except ForbiddenOrigin as refusal:
            return web.Response(status=403, text=f"{refusal.detail}\n")
        try:
            response: web.StreamResponse = await handler(request)
        except Refusal as refusal:
            return web.Response(status=500, text=f"{refusal.detail}\n")
        return response

    def _node_of(self, request: web.Request) -> Node:
        local = request.transport.get_extra_info("sockname") if request.transport is not None else None
        return Node(self._queries.host, local[0] if local else "127.0.0.1")


def _listen(address: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
