"""Puts the engine together: the same parts, in the same order, for the daemon and for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network

from portd.core.allocator import Allocator
from portd.core.names import ServiceNames
from portd.core.static_ports import StaticPort
from portd.core.table import LeaseTable
from portd.leasing.adopting import Adopter
from portd.leasing.deciding import Decider
from portd.leasing.drafting import Drafter
from portd.leasing.feed import Feed
from portd.leasing.journal import Journal
from portd.leasing.observing import Observer
from portd.leasing.owners import Owners
from portd.leasing.passing import Passing
from portd.leasing.placing import Placer
from portd.leasing.policy import Policy, new_id
from portd.leasing.queries import LeaseQueries
from portd.leasing.seams import Clock, Holds, LeaseStore, Loaded, Processes
from portd.leasing.service import LeaseService
from portd.leasing.static_holds import StaticHolds
from portd.leasing.timers import HoldKeeper, LeaseClocks, Timer
from portd.leasing.waiting import Freed


@dataclass(frozen=True)
class LeaseEngine:
    """The parts of the engine. Callers need `service` (commands), `queries`, `observer` and `feed`; `journal.run` is
    its one task."""

    table: LeaseTable
    allocator: Allocator
    journal: Journal
    decider: Decider
    service: LeaseService
    observer: Observer
    passing: Passing
    adopter: Adopter
    queries: LeaseQueries
    feed: Feed
    timer: Timer
    statics: StaticHolds

    def restore(self, loaded: Loaded, boot_id: str) -> None:
        """Restore everything; what the start observes is published after the feed has its past."""
        self.feed.restore(loaded)
        self.observer.restore(loaded, boot_id)

    def reconfigure(self, policy: Policy, cooldown_s: float) -> None:
        """Apply what can change while the engine runs."""
        self.decider.reconfigure(policy)
        self.allocator.cooldown_s = cooldown_s

    def close(self) -> None:
        """Stop the timer; leases stay for the next start."""
        self.timer.close()


def build_engine(
    *,
    pools: Mapping[str, Iterable[int]],
    statics: Iterable[StaticPort],
    own_block: IPv4Network,
    cooldown_s: float,
    policy: Policy,
    store: LeaseStore,
    holds: Holds,
    processes: Processes,
    clock: Clock,
    make_id: Callable[[float], str] = new_id,
) -> LeaseEngine:
    """Build the engine on these seams; nothing is restored yet."""
    table: LeaseTable = LeaseTable()
    allocator = Allocator(pools, statics, own_block, cooldown_s, table.ports())
    names = ServiceNames()
    journal = Journal(table, store, clock)
    clocks = LeaseClocks(table, journal, clock)
    keeper = HoldKeeper(holds)
    freed = Freed()
    timer = Timer(clocks, keeper, allocator, holds, clock, table.get)
    timer.on_freed = freed.notify
    owners = Owners(processes, table)
    static_holds = StaticHolds(allocator.statics, table, holds)
    drafter = Drafter(table, allocator, names, static_holds, policy, make_id)
    placer = Placer(table, allocator, holds, keeper, clocks, policy)
    decider = Decider(table, owners, clocks, drafter, placer)
    queries = LeaseQueries(table, allocator, journal, clocks, keeper, store, clock, lambda: decider.policy)
    passing = Passing(table, allocator, journal, processes, clock, keeper, owners)
    observer = Observer(
        table, allocator, names, journal, owners, passing, clocks, keeper, static_holds, timer, freed, holds, clock
    )
    adopter = Adopter(processes, owners.check_caller)
    service = LeaseService(table, journal, decider, clocks, keeper, owners, passing, adopter, queries, freed, clock)
    feed = Feed()
    journal.subscribe(feed.apply)
    journal.subscribe_durable(feed.confirm)
    journal.subscribe_touched(feed.touch)
    return LeaseEngine(
        table, allocator, journal, decider, service, observer, passing, adopter, queries, feed, timer, static_holds
    )
