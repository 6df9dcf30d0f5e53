"""The asyncio shell: the same calls, steps and errors as the sync client, without a thread.

async with aio.lease("orders", check="http:/healthz") as lease:
    server = await asyncio.start_server(handle, sock=await lease.listen())
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from random import random
from typing import Any, Literal, TypeVar, Unpack

from . import calls, endpoints, leasing, leaving, peers, steps
from .client import READ_BYTES, SILENCE_S, TIMEOUT_S, reason
from .endpoints import Endpoint
from .errors import DaemonUnavailable, NoAnswerInTime, PortdError, ProtocolError, Retryable
from .listening import ephemeral, open_once, ready, retry_after
from .lookup import AWAY, Instance, Query, Watch, memory, pick
from .protocol import Event, EventReader, Request, ResponseReader, result
from .state import LeaseHandle, LeaseState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .lookup import AllLookupOptions, LookupOptions, WatchOptions
    from .types import (
        Host,
        Instances,
        LanService,
        LeaseChange,
        LeaseDocument,
        LeaseFilters,
        LeaseOptions,
        LeasePage,
        LeaseRequest,
        PortView,
        ServiceFilters,
        ServicePage,
        ServiceSummary,
        Status,
    )

T = TypeVar("T")
logger = logging.getLogger("portd_client")


class AsyncClient:
    """Speaks to one daemon; see `Client` for its arguments. Every call raises Problem or DaemonUnavailable."""

    def __init__(self, url: str | None = None, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        environ = os.environ
        self._candidates = [endpoints.parse(url)] if url else endpoints.candidates(environ, os.geteuid())
        self._token = token if token is not None or "PORTD_LEASE" in environ else environ.get("PORTD_TOKEN")
        self._timeout_s = timeout_s

    @property
    def endpoint(self) -> Endpoint:
        """Return the endpoint that answered last, or that is tried first."""
        return self._candidates[0]

    @property
    def timeout_s(self) -> float:
        """Return the seconds that a call may take, beside what it waits for."""
        return self._timeout_s

    @property
    def url(self) -> str:
        """Return that endpoint as PORTD_URL writes it."""
        return self.endpoint.url

    async def grant(self, request: LeaseRequest, *, wait_s: float | None = None) -> LeaseDocument:
        """Request one lease. The answer carries the lease's `token`, this once.

        The daemon waits up to `wait_s` seconds for an exact port, the instance's previous one, or any.
        """
        found: LeaseDocument = await self.call(calls.grant(request, wait_s), timeout_s=self._waiting(wait_s))
        return found

    async def grant_all(self, requests: Sequence[LeaseRequest], *, wait_s: float | None = None) -> list[LeaseDocument]:
        """Request several leases, all or none."""
        found: list[LeaseDocument] = await self.call(calls.grant(requests, wait_s), timeout_s=self._waiting(wait_s))
        return found

    async def leases(self, **filters: Unpack[LeaseFilters]) -> AsyncIterator[LeaseDocument]:
        """Yield the leases that match all filters, page after page."""
        cursor = None
        while True:
            page: LeasePage = await self.call(calls.leases(**filters, cursor=cursor))
            for document in page["leases"]:
                yield document
            if (cursor := page["next"]) is None:
                return

    async def lease(self, lease_id: str) -> LeaseDocument:
        """Return one lease, an ended one too while the daemon remembers it; raises LeaseLost."""
        return await self.call(calls.lease(lease_id))

    async def renew(self, lease_id: str, seconds: float | None = None, *, token: str | None = None) -> LeaseDocument:
        """Restart the clock of a ttl lease; `seconds` is a new period, None keeps the last one."""
        return await self.call(calls.renew(lease_id, seconds, token))

    async def decline(self, lease_id: str, *, token: str | None = None) -> LeaseDocument:
        """Request another port under the same lease: somebody else has this one."""
        return await self.call(calls.decline(lease_id, token))

    async def drain(self, lease_id: str, on: bool = True, *, token: str | None = None) -> LeaseDocument:
        """Take an instance out of look-ups while it keeps its ports; `on=False` brings it back."""
        return await self.call(calls.drain(lease_id, on, token))

    async def transfer(self, lease_id: str, pid: int, *, token: str | None = None) -> LeaseDocument:
        """Hand a lease over to another process of this host."""
        return await self.call(calls.transfer(lease_id, pid, token))

    async def change(self, lease_id: str, fields: LeaseChange, *, token: str | None = None) -> LeaseDocument:
        """Replace a lease's tags, metadata, weight, check or announcement."""
        return await self.call(calls.change(lease_id, fields, token))

    async def report(self, lease_id: str, status: Status, note: str = "", *, token: str | None = None) -> LeaseDocument:
        """Report health, for a lease whose check is `report`."""
        return await self.call(calls.report(lease_id, status, note, token))

    async def release(self, lease_id: str, *, token: str | None = None) -> None:
        """Release a lease; one that has ended stays so."""
        await self.call(calls.release(lease_id, token))

    async def ports(self) -> list[PortView]:
        """Return every port of the host that is leased, static, cooling or listened on."""
        found: list[PortView] = (await self.call(calls.ports()))["ports"]
        return found

    async def port(self, number: int, protocol: Literal["tcp", "udp"] | None = None) -> PortView:
        """Return who has a port, per the kernel and per the lease table; None is TCP."""
        found: PortView = await self.call(calls.port(number, protocol))
        return found

    async def history(self, number: int, at: str | None = None) -> list[LeaseDocument]:
        """Return who had a port, newest first; `at` (RFC 3339) selects one moment."""
        found: list[LeaseDocument] = (await self.call(calls.history(number, at)))["leases"]
        return found

    async def services(self) -> AsyncIterator[ServiceSummary]:
        """Yield the services' names with counts by health, page after page."""
        cursor = None
        while True:
            page: ServicePage = await self.call(calls.services(cursor=cursor))
            for summary in page["services"]:
                yield summary
            if (cursor := page.get("next")) is None:
                return

    async def service(self, name: str, **filters: Unpack[ServiceFilters]) -> Instances:
        """Return a service's instances; with `wait` (seconds) and `after` or `min`, once there is what it waits for."""
        return await self.call(calls.service(name, **filters), timeout_s=self._waiting(filters.get("wait")))

    async def lan(self, type: str | None = None) -> list[LanService]:
        """Return the DNS-SD services seen on the LAN; `type` selects one, as "_http._tcp"."""
        found: list[LanService] = (await self.call(calls.lan(type)))["services"]
        return found

    async def hosts(self) -> list[Host]:
        """Return the hosts of the cluster."""
        return await self.call(calls.hosts())

    async def status(self) -> dict[str, Any]:
        """Return the daemon's condition: version, pools, counts, warnings."""
        return await self.call(calls.status())

    async def events(self, after: int | None = None, service: str | None = None) -> AsyncIterator[Event]:
        """Follow events until the daemon closes the stream; see `Client.events`."""
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

    async def call(self, request: Request[T], *, timeout_s: float | None = None) -> T:
        """Make any call of `portd_client.calls`, and return its decoded answer (None where there is no body)."""
        return (await self.exchange(request, timeout_s=timeout_s))[0]

    async def exchange(self, request: Request[T], *, timeout_s: float | None = None) -> tuple[T, dict[str, str]]:
        """Make any call, and return its decoded answer and its header fields, whose names are in lower case."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        reader, parts = ResponseReader(), []
        try:
            async with asyncio.timeout(limit_s), aclosing(self._receive(request, reader)) as stream:
                async for part in stream:
                    parts.append(part)
                    reader.check_size()
        except TimeoutError:
            raise NoAnswerInTime(self.url, limit_s) from None
        return result(reader.status, reader.headers.get("content-type", ""), b"".join(parts)), reader.headers

    # --- look-ups ---

    async def resolve(self, service: str, **options: Unpack[LookupOptions]) -> Instance:
        """Return one instance that serves; see `portd_client.resolve`."""
        return await resolve(service, client=self, **options)

    async def resolve_all(self, service: str, **options: Unpack[AllLookupOptions]) -> list[Instance]:
        """Return all instances that serve; see `portd_client.resolve_all`."""
        return await resolve_all(service, client=self, **options)

    async def watch(self, service: str, **options: Unpack[WatchOptions]) -> AsyncIterator[list[Instance]]:
        """Yield the instances that serve, whenever they change; see `portd_client.watch`."""
        async for instances in watch(service, client=self, **options):
            yield instances

    # --- connections ---

    def _waiting(self, wait_s: float | None) -> float:
        """Return the time-out of a call that the daemon may hold back for `wait_s` seconds."""
        return self._timeout_s + float(wait_s or 0)

    async def _receive(
        self,
        request: Request[Any],
        reader: ResponseReader,
        accept: str = "application/json",
        silence_s: float | None = None,
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


async def resolve(service: str, *, client: AsyncClient | None = None, **options: Unpack[LookupOptions]) -> Instance:
    """Return one instance that serves; see `portd_client.resolve`."""
    return pick(service, await resolve_all(service, client=client, **options))


async def resolve_all(
    service: str, *, client: AsyncClient | None = None, **options: Unpack[AllLookupOptions]
) -> list[Instance]:
    """Return all instances that serve; see `portd_client.resolve_all`."""
    client, query = client or AsyncClient(), Query(service, **options)
    try:
        answer = await client.call(query.first(), timeout_s=client.timeout_s + query.wait_s)
        found = memory.keep(client.url, query, answer)
    except AWAY as error:
        found = memory.recall(client.url, query, error)
    return query.check(found)


async def watch(
    service: str, *, client: AsyncClient | None = None, **options: Unpack[WatchOptions]
) -> AsyncIterator[list[Instance]]:
    """Yield the instances that serve, whenever they change; see `portd_client.watch`."""
    client, state = client or AsyncClient(), Watch(Query(service, **options))
    while True:
        try:
            answer, headers = await client.exchange(state.request(), timeout_s=client.timeout_s + state.wait_s)
        except PortdError as error:
            await asyncio.sleep(state.failed(error))
            continue
        if (news := state.news(answer, headers)) is not None:
            yield news


def lease(
    service: str,
    *,
    client: AsyncClient | None = None,
    fallback: Literal["ephemeral"] | None = None,
    on_change: OnChange | None = None,
    on_lost: OnLost | None = None,
    drain_s: float = 0.0,
    **options: Unpack[LeaseOptions],
) -> AsyncLease:
    """Return a lease to enter: `async with lease("orders") as lease`.

    The arguments are those of `portd_client.lease`; `on_change` and `on_lost` are called on the event loop.
    """
    state = LeaseState(steps.request(service, options), drain_s)
    return AsyncLease(client or AsyncClient(), state, fallback, on_change, on_lost)


@asynccontextmanager
async def listen(
    service: str,
    *,
    backlog: int = 128,
    client: AsyncClient | None = None,
    fallback: Literal["ephemeral"] | None = None,
    on_change: OnChange | None = None,
    on_lost: OnLost | None = None,
    drain_s: float = 0.0,
    **options: Unpack[LeaseOptions],
) -> AsyncIterator[tuple[AsyncLease, socket.socket]]:
    """Enter a lease with its listening socket: `async with listen("orders") as (lease, listener)`.

    The socket is the caller's to close, or its server's. The arguments are those of `portd_client.listen`.
    """
    made = lease(
        service, client=client, fallback=fallback, on_change=on_change, on_lost=on_lost, drain_s=drain_s, **options
    )
    async with made:
        yield made, await made.listen(backlog)


class AsyncLease(LeaseHandle):
    """A lease of this process, from entering to leaving; one task keeps it meanwhile."""

    def __init__(
        self,
        client: AsyncClient,
        state: LeaseState,
        fallback: str | None,
        on_change: OnChange | None,
        on_lost: OnLost | None,
    ) -> None:
        super().__init__(state)
        self._client = client
        self._fallback = fallback
        self._on_change = on_change
        self._on_lost = on_lost
        self._reserved: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._leaving = asyncio.Lock()

    async def __aenter__(self) -> AsyncLease:
        state = self._state
        given = steps.from_environment(os.environ, self.endpoint)
        try:
            found = None if given is None else await drive(self._client, steps.adopt(given, state.request))
            if found is None:
                state.begin(await self._client.grant(state.request))
            elif given is not None:
                state.begin(found, given.token, adopted=True)
        except DaemonUnavailable as error:
            if self._fallback != "ephemeral":
                raise
            logger.warning("portd: %s; using a port of the kernel's choice for %s", error, self.service)
            self._reserved = ephemeral(state, error)
            return self
        self._task = asyncio.create_task(self._keep_on(), name=f"portd {self.service}")
        _open.add(self)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.release()

    async def listen(self, backlog: int = 128) -> socket.socket:
        """Return the lease's socket, listening; see `Lease.listen`."""
        return (await self.sockets(backlog))[0]

    async def sockets(self, backlog: int = 128) -> list[socket.socket]:
        """Return the lease's sockets, TCP before UDP; they are the caller's to close."""
        opened, self._reserved = ([self._reserved] if self._reserved is not None else []), None
        declines = 0
        while not opened:
            try:
                opened = await asyncio.to_thread(open_once, self._client.endpoint, self._state, backlog)
            except Exception as error:
                declines += 1
                retry_after(error, declines)
                await self.decline()
        return ready(opened, backlog)

    async def renew(self, seconds: float | None = None) -> None:
        """Restart the clock of a ttl lease, which the background does by itself; `seconds` is a new period."""
        await self._change(calls.renew(self.id, seconds, self.token))

    async def decline(self) -> None:
        """Give the port back as used by somebody else; afterwards `port` is another."""
        await self._change(calls.decline(self.id, self.token))

    async def transfer(self, pid: int) -> None:
        """Hand the lease over to another process of this host; this one neither keeps nor releases it any more."""
        if self.is_fallback:
            return
        await self._change(calls.transfer(self.id, pid, self.token))
        async with self._leaving:
            task, self._task = self._task, None
            if task is not None:
                await self._stop(task)

    async def change(self, fields: LeaseChange) -> None:
        """Replace tags, metadata, weight, check or announcement."""
        await self._change(calls.change(self.id, fields, self.token))
        self._state.request = {**self._state.request, **fields}  # type: ignore[typeddict-item]

    async def report(self, status: Status, note: str = "") -> None:
        """Report health, for a lease whose check is `report`."""
        await self._change(calls.report(self.id, status, note, self.token))

    async def drain(self, on: bool = True) -> None:
        """Leave look-ups and keep the port; `drain(False)` comes back."""
        await self._change(calls.drain(self.id, on, self.token))

    async def release(self) -> None:
        """Release the lease, after draining for `drain_s`; may be called twice. An absent daemon is no error here."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        async with self._leaving:  # a signal may have begun it already
            task, self._task = self._task, None
            if task is not None:
                await self._give_back(task)

    async def _change(self, request: Request[LeaseDocument]) -> None:
        """Make a call that answers with the lease as it is now. A fallback has no daemon to call."""
        if not self.is_fallback:
            self._state.document = await self._client.call(request)

    async def _give_back(self, task: asyncio.Task[None]) -> None:
        state = self._state
        try:
            if state.drain_s and state.is_mine and await self._succeeds(calls.drain(self.id, True, self.token)):
                await asyncio.sleep(state.drain_s)
        finally:
            await self._stop(task)
        if state.is_mine:
            await self._succeeds(calls.release(self.id, self.token))

    async def _stop(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.wait([task])
        _open.discard(self)

    async def _succeeds(self, request: Request[Any]) -> bool:
        """Make one of the calls that end a lease. Where it fails the daemon ends the lease by itself."""
        try:
            await self._client.call(request, timeout_s=leasing.RELEASE_TIMEOUT_S)
        except PortdError:
            return False
        return True

    async def _keep_on(self) -> None:
        state = self._state
        pause_s = steps.pause_s(state.document, random())
        is_lost = False
        while True:
            await asyncio.sleep(pause_s)
            try:
                found = await drive(
                    self._client,
                    steps.keep(state.document, state.token, state.request, may_move=self._on_change is not None),
                )
            except (DaemonUnavailable, ProtocolError, Retryable):
                pause_s = min(steps.RETRY_S, pause_s)
                continue
            except PortdError as error:
                if not is_lost:
                    self._report_loss(error)
                pause_s, is_lost = steps.CHECK_S, True
                continue
            pause_s, is_lost = steps.pause_s(found, random()), False
            if state.update(found) and self._on_change is not None:
                try:
                    self._on_change(self)
                except Exception:  # the program's own fault must not end the keeping of its lease
                    logger.exception("portd: on_change failed for %s", self)

    def _report_loss(self, error: PortdError) -> None:
        if self._on_lost is None:
            logger.warning("portd: the lease of %s is lost, and can't be granted again: %s", self, error)
            return
        try:
            self._on_lost(self, error)
        except Exception:  # the program's own fault must not end the keeping of its lease
            logger.exception("portd: on_lost failed for %s", self)


OnChange = Callable[[AsyncLease], object]
OnLost = Callable[[AsyncLease, PortdError], object]

# --- signals ---

_open: set[AsyncLease] = set()
_tasks: set[asyncio.Task[None]] = set()
"""The task of leaving, which the loop itself would not keep alive."""


def _leave(number: int) -> bool:
    """Have the running loop release everything, then die of the signal; False where no loop runs."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return False

    async def leave() -> None:
        await asyncio.gather(
            *(one.release() for one in _open), asyncio.to_thread(leaving.release_all), return_exceptions=True
        )
        os.kill(os.getpid(), number)

    loop.call_soon_threadsafe(  # threadsafe: it wakes a loop that waits
        lambda: _tasks.add(loop.create_task(leave(), name="portd leaves"))
    )
    return True


leaving.on_loop.append(_leave)
