"""The gateway's process: its sockets, its lease, its start and stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from aiohttp import web

from portd._client.aio import AsyncClient
from portd._client.errors import PortdError
from portd.adapters.gateway.directory import Directory
from portd.adapters.gateway.headers import is_loopback
from portd.adapters.gateway.proxy import HEAD_MAX_BYTES, Proxy
from portd.core.hostnames import GATEWAY_SERVICE

logger = logging.getLogger(__name__)

BACKLOG: Final = 1024
KEEPALIVE_S: Final = 75.0
"""Seconds that an idle connection of a client stays open."""
STOP_S: Final = 1.0
"""Seconds that a stop leaves to requests under way."""


def open_listeners(addresses: Sequence[tuple[str, int]]) -> list[socket.socket]:
    """Listen on addresses; `::1` is left out on a host without IPv6. Raises OSError for one that can't be had."""
    opened: list[socket.socket] = []
    try:
        for host, port in addresses:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                opened.append(socket.create_server((host, port), family=family, backlog=BACKLOG))
            except OSError as error:
                if host == "::1" and opened and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue
                raise
    except BaseException:
        for one in opened:
            one.close()
        raise
    return opened


class Gateway:
    """One gateway on some listening sockets."""

    def __init__(self, client: AsyncClient, listeners: Sequence[socket.socket]) -> None:
        self._client = client
        self._listeners = listeners
        self._addresses = [listener.getsockname()[:2] for listener in listeners]

    async def run(self, stopped: asyncio.Event) -> None:
        """Serve until `stopped` is set."""
        directory = Directory(self._client, self._lease)
        proxy = Proxy(directory, self._addresses[0][1])
        server = web.Server(
            proxy.handle,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=KEEPALIVE_S,
            max_line_size=HEAD_MAX_BYTES,
            max_field_size=HEAD_MAX_BYTES,
            auto_decompress=False,
        )
        runner = web.ServerRunner(server, shutdown_timeout=STOP_S)
        await runner.setup()
        following = asyncio.create_task(directory.follow())
        try:
            for listener in self._listeners:
                await web.SockSite(runner, listener, backlog=BACKLOG).start()
            await stopped.wait()
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            await runner.cleanup()
            await proxy.close()

    async def _lease(self) -> None:
        """Lease the port that the gateway listens on, so that it is shown, and found by `portd url`."""
        host, port = self._addresses[0]
        is_both = {("127.0.0.1", port), ("::1", port)} <= set(self._addresses)
        request: Any = {
            "service": GATEWAY_SERVICE,
            "port": port,
            "adopt": True,
            "address": "localhost" if is_both else host,
        }
        try:
            await self._client.grant(request)
        except PortdError as error:
            logger.warning("the gateway's port %d is not leased: %s", port, error)


async def serve(client: AsyncClient, listeners: Sequence[socket.socket]) -> None:
    """Serve on listening sockets until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if wide := [listener for listener in listeners if not is_loopback(listener.getsockname()[0])]:
        logger.warning(
            "the gateway listens on %s: every host that reaches it gets at the services", wide[0].getsockname()
        )
    await Gateway(client, listeners).run(stopped)
