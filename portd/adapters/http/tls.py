"""TLS connections: accepted here, so that a handshake counts as a connection from its first byte on.

asyncio makes the protocol when the handshake is done; until then a connection would use a descriptor that no bound
knows.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from typing import Final

from portd.adapters.http.front import Connections, Front

HANDSHAKE_TIMEOUT_S: Final = 5.0
"""Seconds for a TLS handshake: three round trips on a bad network take one."""
ACCEPT_BATCH: Final = 64
"""Connections accepted in one turn of the loop."""
ACCEPT_AGAIN_S: Final = 0.1
"""Seconds until the next accept when no descriptor was left."""
_OUT_OF_FILES: Final = (errno.EMFILE, errno.ENFILE)


class TlsAcceptor:
    """Accepts on a bound socket, and serves each connection after its handshake."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        connections: Connections,
        make_front: Callable[[], Front],
    ) -> None:
        self._listener = listener
        self._context = context
        self._connections = connections
        self._make_front = make_front
        self._handshakes: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin to accept."""
        self._listener.setblocking(False)
        self._listener.listen(1024)
        self._watch()

    def close(self) -> None:
        """Stop accepting and end the handshakes under way."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self._handshakes:
            task.cancel()

    def _watch(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                connection, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_FILES:  # the waiting connection keeps the listener readable
                    self._loop.remove_reader(self._listener)
                    self._loop.call_later(ACCEPT_AGAIN_S, self._watch)
                return
            connection.setblocking(False)
            user = str(address[0]).partition("%")[0]
            if self._connections.excess(user) is not None:  # before the handshake nothing can be answered
                connection.close()
                continue
            task = self._loop.create_task(self._handshake(connection, user))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _handshake(self, connection: socket.socket, user: str) -> None:
        self._connections.enter(user)
        try:
            await self._loop.connect_accepted_socket(
                self._make_front, connection, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S
            )
        except (OSError, TimeoutError, ssl.SSLError):
            connection.close()
        finally:
            self._connections.leave(user)  # the front has counted itself
