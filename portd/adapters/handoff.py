"""Handoff: bound sockets passed to their owners over a unix socket (SCM_RIGHTS, unix(7)), so that there is no gap.

One message asks, one answers, on a SOCK_SEQPACKET connection. What is passed is the hold itself: the owner's socket and
portd's copy are one, so when the owner has gone and its lease ends, closing the copy closes the port; no connection
waits in the backlog of a dead owner. As HTTP does, this module receives the service.
"""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Protocol

import msgspec
from msgspec import Meta, Struct

from portd.core.errors import FILE_LIMIT, Busy, InvalidRequest, PortTaken, Refusal
from portd.core.model import Lease
from portd.core.model import Protocol as LeaseProtocol
from portd.core.requests import LeaseRequest
from portd.core.rights import Caller, check_change, sees_cmdline
from portd.core.validation import explain
from portd.leasing.service import LeaseService

logger = logging.getLogger(__name__)

MESSAGE_MAX_BYTES: Final = 64 * 1024
CONNECTIONS_MAX: Final = 256
IDLE_S: Final = 30.0
"""Seconds that a connection may stay without asking."""
FIRST_MESSAGE_S: Final = 0.05
"""Seconds that a stop gives callers who have connected and not asked yet. A local one needs a thousandth of it."""
ACCEPT_AGAIN_S: Final = 0.1
"""Seconds until the door is opened again when no descriptor was left for who came."""
_OUT_OF_FILES: Final = (errno.EMFILE, errno.ENFILE)
STOP_S: Final = 0.5
"""Seconds that a stop gives what is under way: a grant waits for the disk."""


class Wish(Struct, frozen=True, forbid_unknown_fields=True):
    """A lease that is there (`lease`), or one to be granted first (`request`). `backlog` is listen(2)'s."""

    lease: str | None = None
    request: LeaseRequest | None = None
    listen: bool = False
    backlog: Annotated[int, Meta(ge=0, le=65535)] = 128


class PassedHolds(Protocol):
    """What the handoff needs of the holds."""

    def pass_on(
        self, lease_id: str, protocol: LeaseProtocol, address: str, port: int
    ) -> Mapping[Any, socket.socket]: ...


Identify = Callable[[socket.socket], Caller]
Nudge = Callable[[], None]


class HandoffServer:
    """Serves the handoff socket."""

    def __init__(
        self,
        service: LeaseService,
        holds: PassedHolds,
        identify: Identify,
        wake: Nudge,
        render_problem: Callable[[Refusal], Any],
    ) -> None:
        self._service = service
        self._holds = holds
        self._identify = identify
        self._nudge = wake
        self._render_problem = render_problem
        self._decode = msgspec.json.Decoder(Wish).decode
        self._listeners: list[socket.socket] = []
        self._connections: dict[asyncio.Task[None], socket.socket] = {}

    def serve(self, listener: socket.socket) -> None:
        """Accept on a bound, listening SOCK_SEQPACKET socket until the stop."""
        self._listeners.append(listener)
        self._watch(listener)

    async def close(self) -> None:
        """Stop accepting, answer what has been asked, and cut off who is connected then."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        await self._wait(FIRST_MESSAGE_S)
        for connection in self._connections.values():
            connection.shutdown(socket.SHUT_RD)  # messages that are here already are read yet, then comes the end
        await self._wait(STOP_S)
        for conversation in self._connections:
            conversation.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _wait(self, timeout_s: float) -> None:
        if self._connections:
            await asyncio.wait(self._connections, timeout=timeout_s)

    def _watch(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in _OUT_OF_FILES:  # who waits at the door keeps it readable: don't ask again at once
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener)
                loop.call_later(ACCEPT_AGAIN_S, self._watch, listener)
            return
        connection.setblocking(False)
        if len(self._connections) >= CONNECTIONS_MAX:
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(self._converse(connection))
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)

    async def _converse(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connection:
            try:
                caller = self._identify(connection)
                while True:
                    async with asyncio.timeout(IDLE_S):
                        message = await loop.sock_recv(connection, MESSAGE_MAX_BYTES + 1)
                    if not message:
                        return
                    lease, sockets, answer = await self._answer(message, caller)
                    _send(connection, answer, sockets)
                    if lease is not None:
                        self._nudge()
            except (TimeoutError, OSError):
                return  # silent, slow, or gone

    async def _answer(self, message: bytes, caller: Caller) -> tuple[Lease | None, list[socket.socket], bytes]:
        try:
            wish = self._read(message)
            lease, token = await self._lease(wish, caller)
            sockets = self._open(lease, wish)
        except Refusal as refusal:
            return None, [], msgspec.json.encode({"problem": self._render_problem(refusal)})
        view = self._service.view(lease, cmdline=sees_cmdline(caller, lease.owner.uid), token=token)
        return lease, sockets, msgspec.json.encode({"lease": view})

    def _read(self, message: bytes) -> Wish:
        if len(message) > MESSAGE_MAX_BYTES:
            raise InvalidRequest(f"a message has {MESSAGE_MAX_BYTES} bytes at the most", pointer="")
        try:
            wish = self._decode(message)
        except msgspec.ValidationError as error:
            what, pointer = explain(error)
            raise InvalidRequest(what, pointer=pointer) from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the message is not JSON: {error}", pointer="") from None
        if (wish.lease is None) == (wish.request is None):
            raise InvalidRequest("give either 'lease' or 'request'", pointer="/lease")
        return wish

    async def _lease(self, wish: Wish, caller: Caller) -> tuple[Lease, str | None]:
        if wish.request is not None:
            granted = await self._service.grant([wish.request], caller)
            return granted.leases[0], granted.tokens[0]
        assert wish.lease is not None
        self._service.granter.check_caller(caller)
        lease = await self._service.find(wish.lease)
        check_change(caller, lease)
        return self._service.live(lease), None

    def _open(self, lease: Lease, wish: Wish) -> list[socket.socket]:
        """Return the lease's sockets, tcp before udp, listening where asked for."""
        try:
            sockets = self._holds.pass_on(lease.id, lease.protocol, lease.address, lease.port)
            if wish.listen and "tcp" in sockets:
                # Connections that a server before left behind forbid to listen without this option (TIME_WAIT, a minute
                # long); a socket that listens keeps others off with it as well as without.
                sockets["tcp"].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
                sockets["tcp"].listen(wish.backlog)
        except OSError as error:
            if error.errno in _OUT_OF_FILES:
                raise Busy(FILE_LIMIT) from error
            raise PortTaken(
                f"port {lease.port} of {lease.instance} is somebody's already ({error.strerror}): decline "
                f"it for another, or see 'portd who {lease.port}'",
                pointer="/lease",
            ) from error
        return [sockets[part] for part in ("tcp", "udp") if part in sockets]


def _send(connection: socket.socket, answer: bytes, sockets: list[socket.socket]) -> None:
    descriptors = array.array("i", [passed.fileno() for passed in sockets])
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if sockets else []
    connection.sendmsg([answer], ancillary)  # whoever does not read gets no second chance: BlockingIOError ends it
