"""The asyncio shell: the same calls, steps and errors as the sync client, without a thread.

async with aio.lease("orders", check="http:/healthz") as lease:
    server = await asyncio.start_server(handle, sock=await lease.listen())
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from random import random
from typing import Any, Literal, Unpack

from . import calls, endpoints, leasing, peers, steps
from .client import READ_BYTES, SILENCE_S, TIMEOUT_S, reason
from .endpoints import Endpoint
from .errors import DaemonUnavailable, NoAnswerInTime, PortdError, PortTaken, ProtocolError, Retryable
from .listening import acquired, ephemeral, is_taken, passed, ready
from .lookup import Instance, Memory, filters, follow_up, pick, shown
from .protocol import EventReader, Request, ResponseReader, ServerEvent, result
from .state import LeaseState
from .types import Instances, LeaseDocument, LeaseOptions, LeaseRequest, Scope, Status

logger = logging.getLogger("portd_client")


class AsyncClient:
    """Speaks to one daemon; see `Client` for its arguments. Every call raises Problem or DaemonUnavailable."""

    def __init__(self, url: str | None = None, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        environ = os.environ
        self._candidates = [endpoints.parse(url)] if url else endpoints.candidates(environ, os.getuid())
        self._token = token if token is not None or "PORTD_LEASE" in environ else environ.get("PORTD_TOKEN")
        self._timeout_s = timeout_s
        self._memory = Memory()

    @property
    def endpoint(self) -> Endpoint:
        """Return the place that answered last, or that is tried first."""
        return self._candidates[0]

    @property
    def url(self) -> str:
        """Return that place as PORTD_URL writes it."""
        return self.endpoint.url

    async def grant(self, wish: LeaseRequest) -> LeaseDocument:
        """Lease one port. The answer carries the lease's `token`, this once."""
        return await self.call(calls.grant(wish))  # type: ignore[no-any-return]

    async def grant_all(self, wishes: Sequence[LeaseRequest]) -> list[LeaseDocument]:
        """Lease several ports, all or none."""
        return await self.call(calls.grant(wishes))  # type: ignore[no-any-return]

    async def leases(self, **filters: Any) -> AsyncIterator[LeaseDocument]:
        """Yield the leases that fit all filters, page after page."""
        while True:
            page = await self.call(calls.leases(**filters))
            for document in page["leases"]:
                yield document
            if page["next"] is None:
                return
            filters["cursor"] = page["next"]

    async def lease(self, lease_id: str) -> LeaseDocument:
        """Return one lease."""
        return await self.call(calls.lease(lease_id))  # type: ignore[no-any-return]

    async def service(self, name: str, **filters: Any) -> Instances:
        """Return a service's instances; with `after` and `wait` (seconds), once something changes."""
        return await self.call(  # type: ignore[no-any-return]
            calls.service(name, **filters),
            timeout_s=self._timeout_s + float(filters.get("wait") or 0),
        )

    async def call(self, request: Request, *, timeout_s: float | None = None) -> Any:
        """Make any call of `portd_client.calls`, and return its decoded answer (None where there is no body)."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        reader, parts = ResponseReader(), []
        try:
            async with asyncio.timeout(limit_s), aclosing(self._receive(request, reader)) as stream:
                async for part in stream:
                    parts.append(part)
                    reader.check_size()
        except TimeoutError:
            raise NoAnswerInTime(self.url, limit_s) from None
        return result(reader.status, reader.headers.get("content-type", ""), b"".join(parts))

    async def events(self, after: int | None = None, service: str | None = None) -> AsyncIterator[ServerEvent]:
        """Follow events until the daemon hangs up; see `Client.events`."""
        reader, events, problem = ResponseReader(), EventReader(), b""
        request = calls.events(after, service)
        try:
            async with aclosing(self._receive(request, reader, "text/event-stream", SILENCE_S)) as stream:
                async for part in stream:
                    if reader.status != 200:
                        problem += part
                        continue
                    for event in events.feed(part):
                        yield event
        except TimeoutError:
            raise NoAnswerInTime(self.url, SILENCE_S) from None
        if reader.status != 200:
            result(reader.status, reader.headers.get("content-type", ""), problem)

    async def resolve(
        self, service: str, *, endpoint: str = "main", tags: Sequence[str] = (), scope: Scope | None = None
    ) -> Instance:
        """Return one working instance, by chance; raises NoInstances when there is none; see `lookup.resolve`."""
        return pick(service, await self.resolve_all(service, endpoint=endpoint, tags=tags, scope=scope))

    async def resolve_all(
        self, service: str, *, endpoint: str = "main", tags: Sequence[str] = (), scope: Scope | None = None
    ) -> list[Instance]:
        """Return all working instances, perhaps none."""
        question = (service, endpoint, scope, *tags)
        try:
            return self._memory.keep(question, await self.service(service, **filters(endpoint, tags, scope)))
        except (DaemonUnavailable, ProtocolError, Retryable) as error:
            return self._memory.recall(question, error)

    async def watch(
        self, service: str, *, endpoint: str = "main", tags: Sequence[str] = (), scope: Scope | None = None
    ) -> AsyncIterator[list[Instance]]:
        """Yield the working instances now and whenever they change, without end; see `lookup.watch`."""
        query = filters(endpoint, tags, scope)
        found = await self.service(service, **query)
        yield [Instance(document) for document in found["instances"]]
        wait = follow_up(found, scope)
        while True:
            try:
                newer = await self.service(service, **query, **wait)
            except (DaemonUnavailable, ProtocolError, Retryable):
                await asyncio.sleep(steps.RETRY_S)
                wait = {}
                continue
            wait = follow_up(newer, scope)
            if shown(newer) != shown(found):
                yield [Instance(document) for document in newer["instances"]]
            found = newer

    async def _receive(
        self, request: Request, reader: ResponseReader, accept: str = "application/json", silence_s: float | None = None
    ) -> AsyncGenerator[bytes, None]:
        stream, writer, endpoint = await self._connect()
        try:
            writer.write(request.render(endpoint.authority, self._token, accept))
            while not reader.is_complete:
                async with asyncio.timeout(silence_s):
                    data = await stream.read(READ_BYTES)
                reader.feed(data)
                if part := reader.take():
                    yield part
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise ProtocolError(f"{endpoint.url}: the connection broke: {error}") from error
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Endpoint]:
        tried = []
        for endpoint in self._candidates:
            try:
                stream, writer = await _connect_to(endpoint)
            except OSError as error:
                tried.append((endpoint.url, reason(error)))
                continue
            self._candidates = [endpoint, *(other for other in self._candidates if other is not endpoint)]
            return stream, writer, endpoint
        raise DaemonUnavailable(tried)


async def _connect_to(endpoint: Endpoint) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to one place; raises OSError when nobody is there, or somebody who is not portd."""
    if endpoint.tls:
        return await asyncio.open_connection(endpoint.host, endpoint.port, ssl=ssl.create_default_context())
    if endpoint.path:
        peers.check_directory(endpoint)
        stream, writer = await asyncio.open_unix_connection(endpoint.path)
        with _closed_on_error(writer):
            peers.check_unix(writer.get_extra_info("socket"))
        return stream, writer
    loop = asyncio.get_running_loop()
    failure: OSError | None = None
    for _, _, _, _, address in await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM):
        try:
            listener = peers.LoopbackCheck(str(address[0]), endpoint.port)
            stream, writer = await asyncio.open_connection(str(address[0]), endpoint.port)
            with _closed_on_error(writer):
                listener.check()
        except OSError as error:
            failure = error
        else:
            return stream, writer
    raise failure or OSError(f"{endpoint.host} has no address")


@contextmanager
def _closed_on_error(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        writer.transport.abort()
        raise


async def drive(client: AsyncClient, sequence: steps.Steps) -> Any:
    """Make the calls of a sequence, and return its result."""
    try:
        request = next(sequence)
        while True:
            try:
                answer = await client.call(request)
            except PortdError as error:
                request = sequence.throw(error)
            else:
                request = sequence.send(answer)
    except StopIteration as stop:
        return stop.value


def lease(
    service: str,
    *,
    client: AsyncClient | None = None,
    fallback: Literal["ephemeral"] | None = None,
    on_change: Callable[[AsyncLease], object] | None = None,
    drain_s: float = 0.0,
    **options: Unpack[LeaseOptions],
) -> AsyncLease:
    """Return a lease to enter: `async with lease("orders") as lease`.

    The arguments are those of `portd_client.lease`; `on_change` is called on the event loop. At SIGTERM the loop goes
    on until the lease is drained and given back, and the process dies of the signal, unless it minds SIGTERM itself.
    """
    return AsyncLease(client or AsyncClient(), steps.wish(service, options), fallback, on_change, drain_s)


class AsyncLease(LeaseState):
    """A lease of this process, from entering to leaving; one task keeps it meanwhile."""

    def __init__(
        self,
        client: AsyncClient,
        wish: LeaseRequest,
        fallback: str | None,
        on_change: Callable[[AsyncLease], object] | None,
        drain_s: float,
    ) -> None:
        super().__init__(wish, drain_s)
        self.client = client
        self._fallback = fallback
        self._on_change = on_change
        self._reserved: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._leaving = asyncio.Lock()

    async def __aenter__(self) -> AsyncLease:
        given = steps.given(os.environ, self.wish.get("endpoint", "main"))
        try:
            found = None if given is None else await drive(self.client, steps.adopt(given, self.wish))
            if found is None:
                self.take(await self.client.grant(self.wish))
            elif given is not None:
                self.take(found, given.token, adopted=True)
        except DaemonUnavailable as error:
            if self._fallback != "ephemeral":
                raise
            logger.warning("portd: %s; taking a port of the kernel's choice for %s", error, self.wish["service"])
            self._reserved = ephemeral(self, error)
            return self
        self._task = asyncio.create_task(self._keep_on(), name=f"portd {self.service}")
        _open.add(self)
        _mind_sigterm()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.release()

    async def listen(self, backlog: int = 128) -> socket.socket:
        """Return the lease's socket, listening; see `Lease.listen`."""
        return (await self.sockets(backlog))[0]

    async def sockets(self, backlog: int = 128) -> list[socket.socket]:
        """Return the lease's sockets, TCP before UDP; they are the caller's to close."""
        if self._reserved is not None:
            opened, self._reserved = [self._reserved], None
        else:
            opened = passed(self)
        declines = 0
        while not opened:
            try:
                opened = await asyncio.to_thread(acquired, self.client.endpoint, self, backlog)
            except (OSError, PortTaken) as error:
                declines += 1
                if not is_taken(error) or declines > steps.DECLINES_MAX:
                    raise
                self.document = await self.client.call(calls.decline(self.id, self.token))
        return ready(opened, backlog)

    async def report(self, status: Status, note: str = "") -> None:
        """Report health, for a lease whose check is `report`."""
        if self.id:
            await self.client.call(calls.report(self.id, status, note, self.token))

    async def drain(self, on: bool = True) -> None:
        """Leave look-ups and keep the port; `drain(False)` comes back."""
        if self.id:
            self.document = await self.client.call(calls.drain(self.id, on, self.token))

    async def release(self) -> None:
        """Give the lease back, drained if it is to be; may be called twice. No daemon is no error here."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        async with self._leaving:  # at SIGTERM it may be under way already
            task, self._task = self._task, None
            if task is not None:
                await self._give_back(task)

    async def _give_back(self, task: asyncio.Task[None]) -> None:
        try:
            if self.drain_s and self.is_mine and await self._told(calls.drain(self.id, True, self.token)):
                await asyncio.sleep(self.drain_s)
        finally:
            task.cancel()
            await asyncio.wait([task])
            _open.discard(self)
        if self.is_mine:
            await self._told(calls.release(self.id, self.token))

    async def _told(self, request: Request) -> bool:
        """Make a call of those that end a lease; whether it was heard: if not, the daemon ends the lease by itself."""
        try:
            await self.client.call(request, timeout_s=leasing.RELEASE_TIMEOUT_S)
        except PortdError:
            return False
        return True

    async def _keep_on(self) -> None:
        pause_s = steps.pause_s(self.document, random())
        while True:
            await asyncio.sleep(pause_s)
            try:
                found = await drive(
                    self.client, steps.keep(self.document, self.token, self.wish, may_move=self._on_change is not None)
                )
            except (DaemonUnavailable, ProtocolError, Retryable):
                pause_s = min(steps.RETRY_S, pause_s)
                continue
            except PortdError as error:
                logger.warning("portd: the lease of %s is lost, and can't be had again: %s", self, error)
                pause_s = steps.CHECK_S
                continue
            pause_s = steps.pause_s(found, random())
            if self.keep(found) and self._on_change is not None:
                try:
                    self._on_change(self)
                except Exception:  # the program's own fault must not end the keeping of its lease
                    logger.exception("portd: on_change failed for %s", self)


# --- SIGTERM ---

_open: set[AsyncLease] = set()


def _mind_sigterm() -> None:
    """Give back at SIGTERM what is held, where nobody else minds it: asyncio would die of it without a word.

    The handler is a plain one: whoever sets another, by `signal` or `add_signal_handler`, replaces it without a trace.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) in (
        signal.SIG_DFL,
        leasing.on_sigterm,
    ):
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, frame: object) -> None:
    """Have the running loop give everything back, then die of the signal; the second one does not wait."""
    signal.signal(number, signal.SIG_DFL)
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # between two loops, or after the last
        leasing.on_sigterm(number, frame)
    else:
        loop.call_soon_threadsafe(_leave, loop)  # threadsafe: it wakes a loop that waits


def _leave(loop: asyncio.AbstractEventLoop) -> None:
    async def leave() -> None:
        await asyncio.gather(
            *(one.release() for one in _open), asyncio.to_thread(leasing.release_all), return_exceptions=True
        )
        os.kill(os.getpid(), signal.SIGTERM)

    _tasks.add(loop.create_task(leave(), name="portd leaves"))


_tasks: set[asyncio.Task[None]] = set()
"""The task of leaving, which the loop itself would not keep alive."""
