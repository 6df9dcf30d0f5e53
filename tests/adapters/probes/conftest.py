"""A prober on a clock that a test drives, and services of every temper for it to check."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvloop
from msgspec.structs import replace

from portd.adapters.probes.prober import Prober
from portd.core.model import Check, Event, EventType, Lease, Owner
from portd.testing.fakes import FakeClock

PATIENCE_S = 10.0
"""How long a test waits for what must come."""

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Bed:
    """A prober, what it reported, and the leases that it was notified of."""

    def __init__(self, **settings: Any) -> None:
        self.clock = FakeClock()
        self.reported: list[tuple[str, str, str]] = []
        self.results: list[tuple[str, str]] = []
        self.changed = asyncio.Event()
        self.prober = Prober(self.clock, self._report, on_result=self._count, **settings)
        self._numbers = itertools.count(1)
        self._revisions = itertools.count(1)

    def _report(self, lease_id: str, health: str, note: str) -> None:
        self.reported.append((lease_id, health, note))
        self.changed.set()

    def _count(self, kind: str, result: str, seconds: float) -> None:
        assert seconds >= 0
        self.results.append((kind, result))
        self.changed.set()

    @property
    def health(self) -> list[str]:
        """What was reported, without lease ids and notes."""
        return [health for _, health, _ in self.reported]

    def lease(self, check: Check | None, port: int, **fields: Any) -> Lease:
        """Make a bound lease of a new id."""
        number = next(self._numbers)
        default = {
            "id": f"lease-{number}",
            "service": "orders",
            "instance": f"orders-{number}",
            "endpoint": "main",
            "protocol": "tcp",
            "address": "127.0.0.1",
            "pool": "default",
            "hold": "shared",
            "state": "bound",
            "lifetime": "process",
            "owner": Owner(pid=1, uid=65534, known_by="peercred"),
            "host": "here",
            "created_at": 0.0,
        }
        described: dict[str, Any] = {**default, **fields}
        return Lease(check=check, port=port, **{"uid": described["owner"].uid, **described})

    def notify(self, event: EventType, lease: Lease, **fields: Any) -> Lease:
        """Apply an event; return the lease as it is after it."""
        lease = replace(lease, **fields)
        self.prober.apply(Event(next(self._revisions), event, 0.0, lease))
        return lease

    def bind(self, check: Check, port: int, **fields: Any) -> Lease:
        """Bind a lease that has the check."""
        return self.notify("bound", self.lease(check, port, **fields))

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def until_so(self, condition: Callable[[], object]) -> None:
        """Wait for a condition that the prober does not report."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0)

    async def result(self, check: Check, port: int, **fields: Any) -> tuple[str, str]:
        """Return the health and the note that a first check of the port gives."""
        lease = self.bind(check, port, **fields)
        count = len(self.reported)
        await self.until(lambda: len(self.reported) > count)
        self.notify("ended", lease, state="ended")
        return self.reported[-1][1:]

    async def turn(self, seconds: float = 10.0) -> None:
        """Let an interval pass, and wait for its results."""
        self.clock.advance(seconds)
        self.prober.run_due()
        await self.idle()

    async def idle(self) -> None:
        """Wait until no check is under way."""
        await self.until_so(lambda: not self.prober.running_count and not self.prober.waiting_count)


@asynccontextmanager
async def opened_bed(**settings: Any) -> AsyncIterator[Bed]:
    bed = Bed(**settings)
    before = asyncio.all_tasks()
    task = asyncio.create_task(bed.prober.run())
    await asyncio.sleep(0)
    try:
        yield bed
        assert not task.done(), "the prober has died"
    finally:
        bed.prober.close()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert not {one for one in asyncio.all_tasks() - before if "Prober" in repr(one)}


@asynccontextmanager
async def opened_service(
    handler: Handler, *, host: str = "127.0.0.1", ssl: Any = None, limit: int = 2**16
) -> AsyncIterator[int]:
    """Serve raw connections; each is closed at the end, whatever its handler does."""
    writers: list[asyncio.StreamWriter] = []
    handlers: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        with suppress(ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, host, 0, ssl=ssl, limit=limit)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in handlers:
            task.cancel()
        for writer in writers:
            writer.transport.abort()
        if handlers:
            await asyncio.wait(handlers)
        await asyncio.sleep(0)


def answering(data: bytes, *, seen: list[bytes] | None = None) -> Handler:
    """Make a handler that answers each request with the same bytes, and keeps the connection until the peer goes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            if seen is not None:
                seen.append(head)
            writer.write(data)
            await writer.drain()

    return handle


def http_answer(status: str = "200 OK", body: bytes = b"", headers: str = "") -> bytes:
    """Make an HTTP/1.1 answer."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a scenario: on the loop of the daemon, and on the one that any other program has."""
    return asyncio.run if request.param == "asyncio" else uvloop.run


@pytest.fixture
def bed() -> Callable[..., Any]:
    """Open a prober for a scenario."""
    return opened_bed


@pytest.fixture
def service() -> Callable[..., Any]:
    """Open a service for a scenario."""
    return opened_service


@pytest.fixture
def answer() -> Callable[..., bytes]:
    """Make HTTP answers."""
    return http_answer


@pytest.fixture
def answers() -> Callable[..., Handler]:
    """Make handlers that answer always the same."""
    return answering


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is bound, so that nobody else takes it, and not listened on."""
    with socket.socket() as hold:
        hold.bind(("127.0.0.1", 0))
        yield hold.getsockname()[1]
