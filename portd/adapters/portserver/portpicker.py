"""portpicker's port server: `PORTSERVER_ADDRESS` of python_portpicker, and of whatever speaks like it.

The protocol (python_portpicker, src/portserver.py): a stream unix socket, often abstract; the client sends its pid as
digits, with or without a newline, and reads the port as digits and a newline. A refusal is the end of the stream. There
is no release: the port returns when the process has exited and nobody uses it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from portd.adapters.portserver.leases import lease_port
from portd.core.errors import Refusal
from portd.core.rights import Caller
from portd.core.shares import Shares
from portd.leasing.service import LeaseService

logger = logging.getLogger(__name__)

REQUEST_MAX_BYTES: Final = 20
"""A pid and a newline; a client sends it in one piece and does not shut its side down."""
PID_MAX: Final = 4_194_304
"""The kernel's largest pid_max (proc(5))."""
REQUEST_TIMEOUT_S: Final = 5.0
CONNECTIONS_MAX: Final = 512
CONNECTIONS_PER_USER: Final = 256

Identify = Callable[[socket.socket], Caller]
OnRefusal = Callable[[Refusal, int | None, int | None], None]


class PortpickerServer:
    """Serves portpicker's protocol on one unix socket: a path, or `@NAME` in the abstract namespace (unix(7))."""

    def __init__(self, address: str, service: LeaseService, identify: Identify, on_refusal: OnRefusal) -> None:
        self.address = address
        self.problem: str | None = None
        self._service = service
        self._identify = identify
        self._on_refusal = on_refusal
        self._shares = Shares("port server connections", total=CONNECTIONS_MAX, per_user=CONNECTIONS_PER_USER)
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. An address that can't be had is reported in `problem`: leases matter more."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if self.address.startswith("@"):
                listener.bind("\0" + self.address[1:])
            else:
                self._bind_path(listener)
        except OSError as error:
            listener.close()
            self.problem = f"{self.address} can't be served: {error.strerror or error}"
            logger.error("[compat] portserver: %s", self.problem)
            return
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener, backlog=1024, limit=REQUEST_MAX_BYTES
        )

    def _bind_path(self, listener: socket.socket) -> None:
        path = Path(self.address)
        with suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(self.address)
            raise OSError(f"another program answers at {self.address}")
        path.unlink(missing_ok=True)
        listener.bind(self.address)
        path.chmod(0o666)

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            self._remove_path()

    def _remove_path(self) -> None:
        if not self.address.startswith("@"):
            Path(self.address).unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller = self._identify(writer.get_extra_info("socket"))
        try:
            with self._shares.use(caller.uid):
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    request = await reader.read(REQUEST_MAX_BYTES)
                pid = _pid_of(request)
                if pid is not None:
                    lease = await lease_port(self._service, caller, pid=pid)
                    writer.write(b"%d\n" % lease.port)
        except Refusal as refusal:
            self._on_refusal(refusal, caller.uid, caller.pid)
        except (TimeoutError, OSError):
            pass  # silent, or gone
        finally:
            writer.close()


def _pid_of(request: bytes) -> int | None:
    """Return the pid of a request, None for what is none; 1 and below are never leased for."""
    text = request.strip()
    return int(text) if text.isdigit() and 1 < int(text) <= PID_MAX else None
