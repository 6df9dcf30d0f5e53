"""A whole service in a world that a test drives: clock, kernel and processes are fakes, the store survives restarts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Network
from typing import Any

from portd.core.model import Event, Lease, Listener
from portd.core.ownership import Holder, key_of
from portd.core.requests import LeaseRequest
from portd.core.rights import Caller
from portd.core.static_ports import StaticPort
from portd.core.views import LeaseView
from portd.leasing.engine import LeaseEngine, build_engine
from portd.leasing.policy import Policy
from portd.leasing.seams import LeaseStore, Successor
from portd.leasing.service import Granted
from portd.testing.fakes import BOOT_ID, FakeClock, FakeHolds, FakeProcesses
from portd.testing.memory_store import MemoryStore


class Surface:
    """All that the engine offers, in one object: a test says what it does, not which part does it."""

    def __init__(self, engine: LeaseEngine) -> None:
        self.parts = (engine.service, engine.queries, engine.observer, engine.timer, engine)

    def view(self, lease: Lease, caller: Caller | None = None, **_: Any) -> LeaseView:
        """Show a lease; without a caller all that an admin sees."""
        return self.parts[1].view(lease, caller or World.caller(uid=0, admin=True))

    def __getattr__(self, name: str) -> Any:
        for part in self.parts:
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(name)


class World:
    """Builds the service as the daemon does. `restart` is a daemon that was killed: only the store outlives it."""

    def __init__(
        self,
        ports: Iterable[int] = range(20000, 20010),
        *,
        statics: Iterable[StaticPort] = (),
        cooldown_s: float = 5.0,
        quota_per_uid: int = 0,
        listed: Mapping[str, Collection[int | str]] | None = None,
        has_shared_names: bool = False,
        store: LeaseStore | None = None,
    ) -> None:
        self.ports = list(ports)
        self.statics = list(statics)
        self.cooldown_s = cooldown_s
        self.policy = Policy(86_400.0, quota_per_uid, "shared", frozenset({"/bin/true"}), "testhost")._replace(
            has_shared_names=has_shared_names,
            is_listed=lambda service, user: user in listed[service] if listed and service in listed else None,
        )
        self.clock = FakeClock()
        self.processes = FakeProcesses()
        self.store: Any = store or MemoryStore()
        self.boot_id = BOOT_ID
        self.foreign: set[Any] = set()
        self.listening: dict[int, int] = {}
        """Who listens on a port on 127.0.0.1, by pid: what a port's lease passes to when its owner exits."""
        self.events: list[Event] = []
        self._ids = itertools.count(1)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> World:
        """Start the service on what the store remembers."""
        self.holds = FakeHolds()
        self.holds.foreign = self.foreign
        self.engine = build_engine(
            pools={"default": self.ports},
            statics=self.statics,
            own_block=IPv4Network("127.77.0.0/16"),
            cooldown_s=self.cooldown_s,
            policy=self.policy,
            store=self.store,
            holds=self.holds,
            processes=self.processes,
            clock=self.clock,
            make_id=lambda at: f"lease-{next(self._ids):04}",
        )
        self.table, self.allocator, self.journal = self.engine.table, self.engine.allocator, self.engine.journal
        self.service = Surface(self.engine)
        self.feed = self.engine.feed
        self.engine.passing.find_successors = self._find_successors
        self.engine.adopter.find_listeners = self._find_listeners
        self.journal.subscribe(self.events.append)
        self.engine.restore(await self.store.load(), self.boot_id)
        self._task = asyncio.create_task(self.journal.run())
        return self

    def successor(self, lease: Lease) -> Successor | None:
        """Return the live process that listens on the lease's port, as its successor, or None."""
        pid = self.listening.get(lease.port)
        if pid is None or not self.processes.is_running(pid):
            return None
        identity = self.processes.find(pid, "socket").id
        return Successor(pid, identity.start_ticks, "descendant", ("127.0.0.1",), (key_of(identity),))

    def _find_successors(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            self.service.observe_exit(lease, self.successor(lease))

    async def _find_listeners(self, port: int) -> list[tuple[Listener, Holder]]:
        pid = self.listening.get(port)
        if pid is None or not self.processes.is_running(pid):
            return []
        process = self.processes.find(pid, "socket")
        listener = Listener("tcp", "127.0.0.1", port, process.owner.uid or 0, port)
        return [(listener, Holder(process.owner, (key_of(process.id),)))]

    async def kill(self) -> None:
        """End the daemon with nothing said: what is on its way is lost."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._task
        self.engine.close()

    async def restart(self) -> World:
        """Kill the daemon, and start another on the same store."""
        await self.kill()
        self.processes.forget_watchers()
        return await self.start()

    async def grant(self, pid: int = 0, uid: int = 1000, admin: bool = False, **fields: Any) -> Lease:
        """Grant one lease to a process (0: one that is not known)."""
        return (await self.ask([LeaseRequest(**fields)], pid=pid, uid=uid, admin=admin)).leases[0]

    async def ask(self, requests: list[LeaseRequest], *, pid: int = 0, uid: int = 1000, admin: bool = False) -> Granted:
        """Make a call of the service's as a process."""
        granted: Granted = await self.service.grant(requests, self.caller(pid, uid, admin=admin))
        return granted

    @staticmethod
    def caller(pid: int = 0, uid: int = 1000, *, admin: bool = False) -> Caller:
        """Make a caller that the kernel knows."""
        return Caller(uid=uid, pid=pid or None, known_by="peercred", admin=admin)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and do what is due."""
        self.clock.advance(seconds)
        self.engine.timer.run_due()

    async def settle(self) -> None:
        """Wait until everything that came in is in the store."""
        await self.journal.drain(5.0)


def in_world(**options: Any) -> Callable[[Callable[[World], Awaitable[None]]], Callable[[], None]]:
    """Run a test in a world of its own, made with these options, and end it well."""

    def decorate(test: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
        async def inner() -> None:
            world = await World(**options).start()
            try:
                await test(world)
            finally:
                await world.kill()

        def run() -> None:
            asyncio.run(inner())

        run.__name__, run.__doc__ = test.__name__, test.__doc__  # by hand: pytest would take a wrapped test's
        return run  # parameter for a fixture

    return decorate
