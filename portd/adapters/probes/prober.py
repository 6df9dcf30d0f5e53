"""The prober: which checks run, when, how many at once, and which of their results are reported.

A watcher of leases: a check runs while its lease is bound, connects to the owner on its own port, and what is reported
is only a change of health by the rules of `core.health`; the last result of each check stands in `last`. Three kinds
differ. `listen` sends nothing: the lease's state is per the kernel, so each change of it counts at once. `report` is
the service's own: it counts from the grant on, and its silence from the first report or from the moment it is bound. A
lease whose port a foreign process holds is critical, whatever its check, and the foreign process is sent nothing.

Turns come from one heap, polled in steps of TICK_S, and wait for a slot (`slots`). A check whose next turn comes while
it still waits or runs loses that turn, so slow services cost others nothing and never pile up work.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterable
from contextlib import suppress
from typing import Final, Literal

from msgspec.structs import replace

from portd.adapters.probes import command, grpc, http, tcp
from portd.adapters.probes.connection import Target
from portd.adapters.probes.launching import Launcher
from portd.adapters.probes.results import CheckResult, ProbeFailed, describe
from portd.adapters.probes.slots import LINGER_S, Slots, program_shares, shares
from portd.adapters.probes.trusting import TrustStore
from portd.core.expiry import Deadlines
from portd.core.health import (
    FOREIGN_NOTE,
    Result,
    Tally,
    count,
    next_turn,
    resumed,
    silence,
    silent_at,
    start_step,
)
from portd.core.model import (
    Check,
    CommandCheck,
    ConnectCheck,
    Event,
    GrpcCheck,
    HttpCheck,
    Lease,
    ListenCheck,
    ReportCheck,
    TcpCheck,
)
from portd.core.visibility import reachable_at
from portd.leasing.seams import Clock, LastResult, ReportHealth

logger = logging.getLogger(__name__)

TICK_S: Final = 0.1
"""Turns are batched in steps of this: at a hundred checks a second, waking up for each costs more than the check.
It is the most that a check is late, and the shortest interval that is kept."""
STOPPED_S: Final = 1.0
"""A probe over which the lease clock lost more than this says nothing: it was portd that did not run."""
LATE_S: Final = 1.0
"""A turn that waits for a slot longer than this and half its interval is late. Below it nobody notices."""
LATE_KEPT_S: Final = 60.0
"""For how long late turns are a warning."""

OnResult = Callable[[str, Literal["passing", "warning", "critical", "skipped", "late"], float], None]
"""Called with each result, for the metrics: kind, result, seconds. `skipped` is a turn that came while the one before
still waited or ran, `late` one that waited for a slot too long."""

FindEndpoint = Callable[[str, str, str], Lease | None]
"""Finds the live lease of a service, instance and endpoint."""


class _Watched:
    """A check that runs."""

    __slots__ = (
        "check",
        "due",
        "has_passed",
        "is_slow",
        "is_waiting",
        "kind",
        "last",
        "lease",
        "step_s",
        "tally",
        "task",
    )

    def __init__(self, lease: Lease, check: Check, tally: Tally) -> None:
        self.lease = lease
        self.check = check
        self.kind = str(check.__struct_config__.tag)
        self.tally = tally
        self.has_passed = not tally.is_first  # until it has, turns come in small steps
        self.task: asyncio.Task[None] | None = None
        self.is_waiting = False
        self.is_slow = True  # until it has answered in time
        self.due = 0.0  # the tick of the turn that waits
        self.step_s: float | None = None  # the last step of a check that has not passed yet
        self.last: LastResult | None = None

    @property
    def user(self) -> Hashable:
        """Return whose slots the check occupies."""
        return self.lease.user

    def stands_for(self, lease: Lease) -> bool:
        """Return whether the check is still the one that the lease has now."""
        mine = self.lease
        return (mine.check, mine.address, mine.port) == (lease.check, lease.address, lease.port) and _is_checked(lease)


class Prober:
    """All health checks of this host. `run` is its task; `apply` is called with every event, in order."""

    def __init__(
        self,
        clock: Clock,
        report: ReportHealth,
        *,
        concurrency: int = 64,
        allow_commands: Collection[str] = (),
        on_result: OnResult | None = None,
        find_endpoint: FindEndpoint | None = None,
    ) -> None:
        self.allow_commands = allow_commands
        self._clock = clock
        self._report = report
        self._on_result: OnResult = on_result or (lambda kind, result, seconds: None)
        self._find_endpoint: FindEndpoint = find_endpoint or (lambda service, instance, endpoint: None)
        self._watched: dict[str, _Watched] = {}
        self._due: Deadlines[str] = Deadlines()
        self._slots: Slots[_Watched] = Slots(shares(concurrency))
        self._program_slots: Slots[_Watched] = Slots(program_shares(concurrency))
        self._late_at = -math.inf
        self._wake = asyncio.Event()
        self._launcher = Launcher()
        self._trust = TrustStore(clock, self._launcher)
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def check_count(self) -> int:
        """Return how many checks run."""
        return len(self._watched)

    @property
    def running_count(self) -> int:
        """Return how many checks are under way."""
        return self._slots.running_count + self._program_slots.running_count

    @property
    def waiting_count(self) -> int:
        """Return how many checks wait for a slot."""
        return self._slots.waiting_count + self._program_slots.waiting_count

    @property
    def is_late(self) -> bool:
        """Return whether a check waited too long for a slot within the last LATE_KEPT_S."""
        return self._clock.now().tick - self._late_at < LATE_KEPT_S

    def set_concurrency(self, concurrency: int) -> None:
        """Change how many checks may be under way; those that are go on."""
        self._slots.bounds = shares(concurrency)
        self._program_slots.bounds = program_shares(concurrency)

    def last(self, lease_id: str) -> LastResult | None:
        """Return the newest result of a lease's check, or None where it has had none since the daemon started."""
        watched = self._watched.get(lease_id)
        return None if watched is None else watched.last

    def oldest_result_ages(self) -> dict[str, float]:
        """Return, for each kind of check that has turns, the seconds since the result that is oldest, for the
        metrics."""
        now = self._clock.now().at
        ages: dict[str, float] = {}
        for watched in self._watched.values():
            if watched.last is not None and not isinstance(watched.check, ListenCheck):
                ages[watched.kind] = max(ages.get(watched.kind, 0.0), now - watched.last.at)
        return ages

    # --- what happens to leases ---

    def restore(self, leases: Iterable[Lease]) -> None:
        """Resume checks after a restart. Their health stands as if it had just been found: that the daemon was away is
        no news of a service, so `rise` and `fall` apply to the first result already."""
        now = self._clock.now().tick
        for lease in leases:
            if _is_checked(lease):
                watched = self._start(lease, resumed(now, lease.health))
                if not isinstance(watched.check, ReportCheck | ListenCheck) and not watched.tally.is_first:
                    self._arm(watched, next_turn(lease.id, watched.check.interval, now))
            elif lease.state == "conflict":
                self._condemn(lease)

    def apply(self, event: Event) -> None:
        """Follow an event: start, stop or replace the lease's check. Never raises, never waits."""
        lease = event.lease
        watched = self._watched.get(lease.id)
        if watched is not None:
            if watched.stands_for(lease):
                watched.lease = lease
            else:
                self._stop(watched)
                watched = None
        if watched is None and _is_checked(lease):
            self._start(lease, Tally(self._clock.now().tick, lease.health))
        elif watched is not None and event.type == "bound":
            self._await_report(watched)
        elif lease.state == "conflict" and event.type in ("conflict", "updated"):
            self._condemn(lease)
        elif event.type == "unbound" and isinstance(lease.check, ListenCheck):
            self._report(lease.id, "critical", "its owner does not listen any more")
            self._on_result("listen", "critical", 0.0)

    def reported(self, lease_id: str, status: Result, note: str) -> None:
        """Count a service's own report of its health. Nothing happens where no report is expected."""
        watched = self._watched.get(lease_id)
        if watched is not None and isinstance(watched.check, ReportCheck):
            self._count(watched, CheckResult(status, note), 0.0)
            self._arm(watched, silent_at(watched.tally, watched.check, self._clock.now().tick))

    def _start(self, lease: Lease, tally: Tally) -> _Watched:
        assert lease.check is not None
        watched = self._watched[lease.id] = _Watched(lease, lease.check, tally)
        if isinstance(watched.check, ListenCheck):
            self._count(watched, CheckResult("passing", "its owner listens"), 0.0)
        elif not isinstance(watched.check, ReportCheck):
            self._arm(watched, tally.since)  # the first result is wanted at once, the others in their turns
        elif lease.state == "bound":
            self._await_report(watched)
        return watched

    def _await_report(self, watched: _Watched) -> None:
        if isinstance(watched.check, ReportCheck) and watched.lease.id not in self._due:
            now = self._clock.now().tick
            watched.tally = replace(watched.tally, since=now)
            self._arm(watched, silent_at(watched.tally, watched.check, now))

    def _stop(self, watched: _Watched) -> None:
        del self._watched[watched.lease.id]
        self._due.discard(watched.lease.id)
        if watched.task is not None:
            watched.task.cancel()  # its connection too: the port may have become somebody else's

    def _condemn(self, lease: Lease) -> None:
        if lease.check is not None and (lease.health, lease.health_note) != ("critical", FOREIGN_NOTE):
            self._report(lease.id, "critical", FOREIGN_NOTE)

    # --- turns ---

    async def run(self) -> None:
        """Check for ever. When it is cancelled, what is under way is broken off, and nothing more is reported."""
        async with asyncio.TaskGroup() as self._tasks:
            try:
                while True:
                    self.run_due()
                    await self._next()
            finally:
                self.close()
                self._launcher.close()

    def close(self) -> None:
        """Start and report nothing more; `run` is still to be cancelled. May be called twice."""
        for slots in (self._slots, self._program_slots):
            slots.clear()
        for watched in list(self._watched.values()):
            self._stop(watched)

    def run_due(self) -> None:
        """Begin the turns that are due, and notice silence. May be called at any time while `run` runs."""
        now = self._clock.now().tick
        for lease_id in self._due.pop_due(now):
            watched = self._watched[lease_id]
            if isinstance(watched.check, ReportCheck):
                self._settle(watched, silence(watched.tally), f"no report for {watched.check.ttl:g} s")
                self._on_result("report", "critical", 0.0)
            else:
                self._due.set(lease_id, self._following(watched, now))
                self._turn(watched, now)
        self._begin_waiting()

    def _following(self, watched: _Watched, now: float) -> float:
        """Return the tick of the turn after this one."""
        if watched.has_passed or watched.step_s == watched.check.interval:
            return next_turn(watched.lease.id, watched.check.interval, now)
        watched.step_s = start_step(watched.check, watched.step_s)
        return now + watched.step_s

    async def _next(self) -> None:
        """Wait for the step in which the next turn comes."""
        due = self._due.next_tick()
        delay_s = None if due is None else math.ceil(due / TICK_S) * TICK_S - self._clock.now().tick
        self._wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._wake.wait()

    def _arm(self, watched: _Watched, tick: float) -> None:
        first = self._due.next_tick()
        self._due.set(watched.lease.id, tick)
        if first is None or tick < first:
            self._wake.set()

    def _turn(self, watched: _Watched, now: float) -> None:
        if watched.task is not None or watched.is_waiting:
            self._on_result(watched.kind, "skipped", 0.0)
            if watched.is_waiting:
                self._note_lateness(watched, now)
            return
        watched.is_waiting = True
        watched.due = now
        self._slots_of(watched).add(watched)

    def _slots_of(self, watched: _Watched) -> Slots[_Watched]:
        return self._program_slots if isinstance(watched.check, CommandCheck) else self._slots

    def _begin_waiting(self) -> None:
        for slots in (self._slots, self._program_slots):
            while (watched := slots.next()) is not None:
                watched.is_waiting = False
                if self._watched.get(watched.lease.id) is watched:
                    self._begin(watched, slots)
                else:
                    slots.end(watched)

    def _begin(self, watched: _Watched, slots: Slots[_Watched]) -> None:
        assert self._tasks is not None, "turns begin while run() runs"
        self._note_lateness(watched, self._clock.now().tick)
        watched.task = self._tasks.create_task(self._probe(watched))
        began_s = time.monotonic()
        lingers = None
        if slots is self._slots:
            lingers = asyncio.get_running_loop().call_later(LINGER_S, self._linger, watched)

        def end(task: asyncio.Task[None]) -> None:
            if lingers is not None:
                lingers.cancel()
            slots.end(watched)
            watched.task = None
            watched.is_slow = time.monotonic() - began_s > LINGER_S
            self._begin_waiting()

        watched.task.add_done_callback(end)

    def _linger(self, watched: _Watched) -> None:
        self._slots.linger(watched)
        self._begin_waiting()

    def _note_lateness(self, watched: _Watched, now: float) -> None:
        if now - watched.due > max(LATE_S, watched.check.interval / 2):
            self._late_at = now
            self._on_result(watched.kind, "late", 0.0)

    # --- results ---

    async def _probe(self, watched: _Watched) -> None:
        began_s, began_tick = time.monotonic(), self._clock.now().tick  # the loop's own time is that of its last turn
        try:
            async with asyncio.timeout(watched.check.timeout):
                result = await self._perform(watched.lease, watched.check)
        except TimeoutError:
            result = CheckResult("critical", f"no answer within {watched.check.timeout:g} s")
        except (ProbeFailed, OSError) as error:
            result = CheckResult("critical", describe(error))
        except Exception as error:
            logger.exception("the %s check of %s itself failed", watched.kind, watched.lease.instance)
            result = CheckResult("critical", f"the check itself failed: {describe(error)}")
        took_s = time.monotonic() - began_s
        lost_s = took_s - (self._clock.now().tick - began_tick)
        if lost_s < STOPPED_S and self._watched.get(watched.lease.id) is watched:
            had_passed = watched.has_passed
            self._count(watched, result, took_s)
            if result.status == "passing" and not had_passed:
                self._reschedule(watched)

    async def _perform(self, lease: Lease, check: Check) -> CheckResult:
        target = self._target(lease, check)
        match check:
            case HttpCheck():
                return await http.probe(target, check, await self._trust.find(lease, check))
            case TcpCheck():
                return await tcp.probe(target, await self._trust.find(lease, check))
            case GrpcCheck():
                return await grpc.probe(target, check, await self._trust.find(lease, check, ("h2",)))
            case CommandCheck():
                return await command.probe(lease, target, check, self.allow_commands, self._launcher)
            case ListenCheck() | ReportCheck():
                raise AssertionError(f"a check of kind {check.__struct_config__.tag} has no turns")

    def _target(self, lease: Lease, check: Check) -> Target:
        """Return where a check goes: the lease's own port, or another endpoint's of its own instance, at an address
        that is listened on. Raises ProbeFailed where there is none."""
        checked = lease
        if isinstance(check, ConnectCheck) and check.endpoint not in (None, lease.endpoint):
            other = self._find_endpoint(lease.service, lease.instance, str(check.endpoint))
            if other is None or other.state != "bound" or other.user != lease.user:
                raise ProbeFailed(f"nothing of {lease.instance} listens on its endpoint {check.endpoint}")
            if other.protocol == "udp":
                raise ProbeFailed(f"endpoint {check.endpoint} of {lease.instance} is not tcp")
            checked = other
        addresses = reachable_at(checked)
        if not addresses:
            raise ProbeFailed(f"{lease.instance} listens on no address that portd can connect to")
        return Target(addresses[0], checked.port)

    def _reschedule(self, watched: _Watched) -> None:
        """Put the next turn of a starting service that passes: in its interval, or soon where `rise` wants more
        passes."""
        watched.step_s = None
        self._arm(watched, self._following(watched, self._clock.now().tick))

    def _count(self, watched: _Watched, result: CheckResult, took_s: float) -> None:
        self._on_result(watched.kind, result.status, took_s)
        tally = count(watched.tally, watched.check, result.status, self._clock.now().tick)
        self._settle(watched, tally, result.note)

    def _settle(self, watched: _Watched, tally: Tally, note: str) -> None:
        """Keep the new tally, and report the health where it is another one. A note alone makes no event."""
        before = watched.tally
        watched.tally = tally
        watched.last = LastResult(note, self._clock.now().at)
        watched.has_passed = watched.has_passed or (tally.health == "passing" and not tally.is_first)
        is_news = tally.health != before.health or before.is_first != tally.is_first
        if is_news and tally.health != "unknown":
            self._report(watched.lease.id, tally.health, note)


def _is_checked(lease: Lease) -> bool:
    """Return whether the lease has a check that runs now: a service that reports does so from the grant on."""
    if lease.check is None:
        return False
    return lease.state == "bound" or (lease.state == "held" and isinstance(lease.check, ReportCheck))
