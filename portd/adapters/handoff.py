"""Handoff: bound sockets passed to their owners over a unix socket (SCM_RIGHTS, unix(7)), so that there is no gap.

One message asks and one answers, on a SOCK_SEQPACKET connection. What is passed is the hold itself: the owner's socket
and portd's copy are one, so when the owner has exited and its lease ends, closing the copy closes the port; no
connection waits in the backlog of a dead owner. As HTTP does, this module receives the service.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any, Final, Protocol

import msgspec
from msgspec import Meta, Struct

from portd.core.errors import FILE_LIMIT, Busy, InvalidRequest, PortTaken, Refusal
from portd.core.model import Lease
from portd.core.model import Protocol as LeaseProtocol
from portd.core.requests import LeaseRequest
from portd.core.rights import Caller
from portd.core.shares import Shares
from portd.core.validation import explain
from portd.leasing.queries import LeaseQueries
from portd.leasing.service import LeaseService

MESSAGE_MAX_BYTES: Final = 64 * 1024
CONNECTIONS_MAX: Final = 256
CONNECTIONS_PER_USER: Final = 64
"""Open connections, of all users and of one: a user that fills its share keeps nobody else out."""
IDLE_S: Final = 30.0
"""Seconds that a connection may stay open without a message."""
FIRST_MESSAGE_S: Final = 0.05
"""Seconds that a stop gives callers that have connected and not sent yet. A local one needs a thousandth of it."""
ACCEPT_AGAIN_S: Final = 0.1
"""Seconds until connections are accepted again when not even the reserved descriptor could be had."""
STOP_S: Final = 0.5
"""Seconds that a stop gives requests under way: a grant waits for the disk."""
_OUT_OF_FILES: Final = (errno.EMFILE, errno.ENFILE)


class HandoffRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A live lease (`lease`), or one to be granted first (`request`). `backlog` is listen(2)'s."""

    lease: str | None = None
    request: LeaseRequest | None = None
    listen: bool = False
    backlog: Annotated[int, Meta(ge=0, le=65535)] = 128


class PassedHolds(Protocol):
    """What the handoff needs of the holds: a lease's sockets, TCP before UDP."""

    def pass_on(
        self, lease_id: str, protocol: LeaseProtocol, address: str, port: int
    ) -> Mapping[Any, socket.socket]: ...


Identify = Callable[[socket.socket], Caller]
Wake = Callable[[], None]
RenderProblem = Callable[[Refusal], Any]
OnRefusal = Callable[[Refusal, int | None, int | None], None]


class HandoffServer:
    """Serves the handoff socket. `wake` is called when a socket was passed: its owner is about to listen."""

    def __init__(
        self,
        service: LeaseService,
        queries: LeaseQueries,
        holds: PassedHolds,
        identify: Identify,
        wake: Wake,
        render_problem: RenderProblem,
        on_refusal: OnRefusal = lambda refusal, uid, pid: None,
    ) -> None:
        self._on_refusal = on_refusal
        self._service = service
        self._queries = queries
        self._holds = holds
        self._identify = identify
        self._wake = wake
        self._render_problem = render_problem
        self._decode = msgspec.json.Decoder(HandoffRequest).decode
        self._listeners: list[socket.socket] = []
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
        self._shares = Shares("handoff connections", total=CONNECTIONS_MAX, per_user=CONNECTIONS_PER_USER)
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def serve(self, listener: socket.socket) -> None:
        """Accept on a bound, listening SOCK_SEQPACKET socket until the stop."""
        self._listeners.append(listener)
        self._watch(listener)

    async def close(self) -> None:
        """Stop accepting, answer what has been sent, and disconnect everybody then."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        await self._wait(FIRST_MESSAGE_S)
        for connection in self._connections.values():
            connection.shutdown(socket.SHUT_RD)  # messages that are here already are read, then comes the end
        await self._wait(STOP_S)
        for conversation in self._connections:
            conversation.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._close_reserve()

    async def _wait(self, timeout_s: float) -> None:
        if self._connections:
            await asyncio.wait(self._connections, timeout=timeout_s)

    # --- connections ---

    def _watch(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in _OUT_OF_FILES:
                self._refuse_at_limit(listener)
            return
        connection.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._converse(connection))
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)

    def _refuse_at_limit(self, listener: socket.socket) -> None:
        """Answer a caller at the file limit, on the descriptor that is kept in reserve for it."""
        if self._reserve < 0:  # a connection that waits keeps the listener readable: don't try again at once
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(ACCEPT_AGAIN_S, self._watch, listener)
        else:
            self._close_reserve()
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.setblocking(False)
                    _send(connection, self._render(Busy(FILE_LIMIT)), [])
        with suppress(OSError):
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _close_reserve(self) -> None:
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    async def _converse(self, connection: socket.socket) -> None:
        with connection, suppress(TimeoutError, OSError):  # silent, slow, or gone
            caller = self._identify(connection)
            try:
                with self._shares.use(caller.uid):
                    await self._serve_caller(connection, caller)
            except Refusal as refusal:
                _send(connection, self._render(refusal), [])

    async def _serve_caller(self, connection: socket.socket, caller: Caller) -> None:
        loop = asyncio.get_running_loop()
        while True:
            async with asyncio.timeout(IDLE_S):
                message = await loop.sock_recv(connection, MESSAGE_MAX_BYTES + 1)
            if not message:
                return
            answer, sockets = await self._answer(message, caller)
            _send(connection, answer, sockets)
            if sockets:
                self._wake()

    # --- messages ---

    async def _answer(self, message: bytes, caller: Caller) -> tuple[bytes, list[socket.socket]]:
        try:
            request = self._read(message)
            lease, token = await self._lease(request, caller)
            sockets = self._open(lease, request)
        except Refusal as refusal:
            self._on_refusal(refusal, caller.uid, caller.pid)
            return self._render(refusal), []
        view = self._queries.view(lease, caller, token=token)
        return msgspec.json.encode({"lease": view}), sockets

    def _render(self, refusal: Refusal) -> bytes:
        return msgspec.json.encode({"problem": self._render_problem(refusal)})

    def _read(self, message: bytes) -> HandoffRequest:
        if len(message) > MESSAGE_MAX_BYTES:
            raise InvalidRequest(f"a message has at most {MESSAGE_MAX_BYTES} bytes", pointer="")
        try:
            request = self._decode(message)
        except msgspec.ValidationError as error:
            what, pointer = explain(error)
            raise InvalidRequest(what, pointer=pointer) from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the message is not JSON: {error}", pointer="") from None
        if (request.lease is None) == (request.request is None):
            raise InvalidRequest("give either 'lease' or 'request'", pointer="/lease")
        return request

    async def _lease(self, request: HandoffRequest, caller: Caller) -> tuple[Lease, str | None]:
        """Return the lease whose sockets are requested, and the token of one that was granted for it.

        The caller itself must be in this host's network: its sockets lead into it.
        """
        if request.request is not None:
            granted = await self._service.grant([request.request], caller)
            return granted.leases[0], granted.tokens[0]
        assert request.lease is not None
        return await self._service.open_lease(request.lease, caller), None

    def _open(self, lease: Lease, request: HandoffRequest) -> list[socket.socket]:
        """Return the lease's sockets, TCP before UDP, listening where requested."""
        try:
            passed = self._holds.pass_on(lease.id, lease.protocol, lease.address, lease.port)
            sockets = sorted(passed.values(), key=lambda one: one.type == socket.SOCK_DGRAM)
            for one in sockets:
                if request.listen and one.type == socket.SOCK_STREAM:
                    # Connections that an earlier server left behind forbid to listen without this option (TIME_WAIT, a
                    # minute); a socket that listens keeps others off with it as well as without.
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
                    one.listen(request.backlog)
        except OSError as error:
            if error.errno in _OUT_OF_FILES:
                raise Busy(FILE_LIMIT) from error
            raise PortTaken(
                f"port {lease.port} of {lease.instance} is in use ({error.strerror}): decline the lease for another "
                f"port, or see 'portd who {lease.port}'",
                pointer="/lease",
            ) from error
        return sockets


def _send(connection: socket.socket, answer: bytes, sockets: list[socket.socket]) -> None:
    """Send one message; raises BlockingIOError for a caller that does not read, which ends its connection."""
    descriptors = array.array("i", [passed.fileno() for passed in sockets])
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if sockets else []
    connection.sendmsg([answer], ancillary)
