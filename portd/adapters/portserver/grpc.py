"""gRPC's port server (grpc, tools/run_tests/python_utils/port_server.py): HTTP on a loopback port.

`GET /get` answers a port as digits, `/drop/N` gives it back, `/version_number` the version of the protocol. A request
carries no pid, so a port is leased for ten minutes, as the original does.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from aiohttp import web

from portd.adapters.portserver.leases import lease_port
from portd.core.errors import Refusal
from portd.core.rights import Caller
from portd.leasing.service import LeaseService

logger = logging.getLogger(__name__)

VERSION: Final = 21
"""What the original answers; its clients restart a server that is older than they are."""
AGE_S: Final = 600.0

Identify = Callable[[Any, Mapping[str, str]], Caller]
OnRefusal = Callable[[Refusal, int | None, int | None], None]


class GrpcPortServer:
    """Serves gRPC's port protocol at one loopback address."""

    def __init__(
        self, address: tuple[str, int], service: LeaseService, identify: Identify, on_refusal: OnRefusal
    ) -> None:
        self.address = address
        self.problem: str | None = None
        self._service = service
        self._identify = identify
        self._on_refusal = on_refusal
        self._given: dict[int, str] = {}
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen. An address that can't be had is reported in `problem`: leases matter more."""
        app = web.Application()
        app.router.add_get("/get", self._get)
        app.router.add_get("/drop/{port}", self._drop)
        app.router.add_get("/version_number", self._version)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        family = socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
            listener.bind(self.address)
            await web.SockSite(self._runner, listener).start()
        except OSError as error:
            listener.close()
            self.problem = f"port {self.address[1]} can't be served: {error.strerror or error}"
            logger.error("[compat] grpc_port_server: %s", self.problem)

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _get(self, request: web.Request) -> web.Response:
        caller: Caller | None = None
        try:
            caller = self._identify(request.transport, request.headers)
            lease = await lease_port(self._service, caller, ttl=AGE_S)
        except Refusal as refusal:
            self._on_refusal(refusal, *((caller.uid, caller.pid) if caller else (None, None)))
            return web.Response(status=503, text=refusal.detail)
        self._given[lease.port] = lease.id
        return web.Response(text=str(lease.port))

    async def _drop(self, request: web.Request) -> web.Response:
        text = request.match_info["port"]
        lease_id = self._given.pop(int(text), None) if text.isdecimal() else None
        if lease_id is not None:
            with suppress(Refusal):  # another user's, or ended meanwhile: the original answers 200 all the same
                await self._service.release(lease_id, self._identify(request.transport, request.headers))
        return web.Response()

    async def _version(self, request: web.Request) -> web.Response:
        return web.Response(text=str(VERSION))
