"""The prober: which checks run, when, how many at once, and what of their results is told.

A watcher of leases: a check runs while its lease is bound, asks the owner on its own port, and what is told is only a
change of health by the rules of `core.health`. Three kinds differ. `listen` sends nothing: the lease's state is the
kernel's word already, and needs no second one, so each change of it counts at once. `report` is the service's own
word: it is taken from the grant on, and its silence counts from the first report or from the moment it is bound. A
lease whose port a foreign process holds is critical, whatever its check, and the foreign process is sent nothing.

Turns come from one heap, looked at in steps of TICK_S; a turn takes one of `concurrency` slots for as long as its
time-out at most. When all are taken it waits in line for the next one, once: a check whose next turn comes while it
still waits or runs loses that turn, so that slow services cost others a delay and never pile up work.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Final, Literal

from msgspec.structs import replace

from portd.adapters.probes import command, grpc, tcp
from portd.adapters.probes.finding import Finding, ProbeFailed, describe
from portd.adapters.probes.http import HttpProbe
from portd.core.expiry import Deadlines
from portd.core.health import Result, Tally, next_turn, silence, silent_at, take
from portd.core.model import (
    Check,
    CommandCheck,
    Event,
    GrpcCheck,
    HttpCheck,
    Lease,
    ListenCheck,
    ReportCheck,
    TcpCheck,
)
from portd.leasing.seams import Clock, ReportHealth

logger = logging.getLogger(__name__)

TICK_S: Final = 0.1
"""Turns are gathered in steps of this: at a hundred checks a second, waking up for each costs more than the check.
It is the most that a check is late, and the shortest interval that is kept."""
STOPPED_S: Final = 1.0
"""A probe over which the lease clock lost more than this says nothing: it was portd that did not run."""
STRANGER: Final = "a foreign process holds the port"

OnResult = Callable[[str, Literal["passing", "warning", "critical", "skipped"], float], None]
"""Is told of each result, for the metrics: kind, result, seconds. `skipped` is a turn that found no slot in time."""


class _Watched:
    """A check that runs."""

    __slots__ = ("check", "is_in_line", "kind", "lease", "tally", "task")

    def __init__(self, lease: Lease, check: Check, tally: Tally) -> None:
        self.lease = lease
        self.check = check
        self.kind = str(check.__struct_config__.tag)
        self.tally = tally
        self.task: asyncio.Task[None] | None = None
        self.is_in_line = False

    def stands_for(self, lease: Lease) -> bool:
        """Tell whether the check is still the one that the lease has now."""
        mine = self.lease
        return (mine.check, mine.address, mine.port) == (lease.check, lease.address, lease.port) and _is_checked(lease)


class Prober:
    """All health checks of this host. `run` is its task; `apply` hears of every event, in order."""

    def __init__(
        self,
        clock: Clock,
        report: ReportHealth,
        *,
        concurrency: int = 64,
        allow_commands: Collection[str] = (),
        on_result: OnResult | None = None,
    ) -> None:
        self.concurrency = concurrency
        self.allow_commands = allow_commands
        self._clock = clock
        self._report = report
        self._on_result: OnResult = on_result or (lambda kind, result, seconds: None)
        self._watched: dict[str, _Watched] = {}
        self._due: Deadlines[str] = Deadlines()
        self._line: deque[_Watched] = deque()
        self._running_count = 0
        self._wake = asyncio.Event()
        self._http = HttpProbe()
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def check_count(self) -> int:
        """Return how many checks run."""
        return len(self._watched)

    @property
    def running_count(self) -> int:
        """Return how many slots are taken."""
        return self._running_count

    @property
    def waiting_count(self) -> int:
        """Return how many checks wait in line for a slot."""
        return len(self._line)

    # --- what happens to leases ---

    def restore(self, leases: Iterable[Lease]) -> None:
        """Take checks up after a restart. Their health stands as if it had just been found: that the daemon was away
        is no news of a service, so `rise` and `fall` apply to the first result already."""
        now = self._clock.now().tick
        for lease in leases:
            if _is_checked(lease):
                watched = self._start(lease, Tally(now, lease.health))
                if not isinstance(watched.check, ReportCheck | ListenCheck):
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
            self._start(lease, Tally(self._clock.now().tick))
        elif watched is not None and event.type == "bound":
            self._await_report(watched)
        elif lease.state == "conflict" and event.type in ("conflict", "updated"):
            self._condemn(lease)
        elif event.type == "unbound" and isinstance(lease.check, ListenCheck):
            self._report(lease.id, "critical", "its owner does not listen any more")
            self._on_result("listen", "critical", 0.0)

    def reported(self, lease_id: str, status: Result, note: str) -> None:
        """Take a service's own word for its health. Nothing happens where no report is expected."""
        watched = self._watched.get(lease_id)
        if watched is not None and isinstance(watched.check, ReportCheck):
            self._take(watched, Finding(status, note), 0.0)
            self._arm(watched, silent_at(watched.tally, watched.check, self._clock.now().tick))

    def _start(self, lease: Lease, tally: Tally) -> _Watched:
        assert lease.check is not None
        watched = self._watched[lease.id] = _Watched(lease, lease.check, tally)
        if isinstance(watched.check, ListenCheck):
            self._take(watched, Finding("passing", "its owner listens"), 0.0)
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
        if lease.check is not None and (lease.health, lease.health_note) != ("critical", STRANGER):
            self._report(lease.id, "critical", STRANGER)

    # --- turns ---

    async def run(self) -> None:
        """Check for ever. When it is cancelled, what is under way is broken off, and nothing more is told."""
        async with self._http:
            try:
                async with asyncio.TaskGroup() as self._tasks:
                    while True:
                        self.run_due()
                        await self._next()
            finally:
                self.close()

    def close(self) -> None:
        """Start and tell nothing more; `run` is still to be cancelled. May be called twice."""
        self._line.clear()
        for watched in list(self._watched.values()):
            self._stop(watched)

    def run_due(self) -> None:
        """Do what is due: begin turns, notice silence. May be called at any time while `run` runs."""
        now = self._clock.now().tick
        for lease_id in self._due.pop_due(now):
            watched = self._watched[lease_id]
            if isinstance(watched.check, ReportCheck):
                self._settle(watched, silence(watched.tally), f"no report for {watched.check.ttl:g} s")
                self._on_result("report", "critical", 0.0)
            else:
                self._due.set(lease_id, next_turn(lease_id, watched.check.interval, now))
                self._turn(watched)

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

    def _turn(self, watched: _Watched) -> None:
        if watched.task is not None or watched.is_in_line:
            self._on_result(watched.kind, "skipped", 0.0)
        elif self._running_count < self.concurrency:
            self._begin(watched)
        else:
            watched.is_in_line = True
            self._line.append(watched)

    def _begin(self, watched: _Watched) -> None:
        assert self._tasks is not None, "turns are taken while run() runs"
        self._running_count += 1
        watched.task = self._tasks.create_task(self._probe(watched))
        watched.task.add_done_callback(lambda task: self._end(watched))

    def _end(self, watched: _Watched) -> None:
        self._running_count -= 1
        watched.task = None
        while self._line and self._running_count < self.concurrency:
            following = self._line.popleft()
            following.is_in_line = False
            if self._watched.get(following.lease.id) is following:
                self._begin(following)

    # --- results ---

    async def _probe(self, watched: _Watched) -> None:
        began_s, began_tick = time.monotonic(), self._clock.now().tick  # the loop's own time stands still in a turn
        try:
            async with asyncio.timeout(watched.check.timeout):
                finding = await self._ask(watched.lease, watched.check)
        except TimeoutError:
            finding = Finding("critical", f"no answer within {watched.check.timeout:g} s")
        except (ProbeFailed, OSError) as error:
            finding = Finding("critical", describe(error))
        except Exception as error:
            logger.exception("the %s check of %s itself failed", watched.kind, watched.lease.instance)
            finding = Finding("critical", f"the check itself failed: {describe(error)}")
        took_s = time.monotonic() - began_s
        lost_s = took_s - (self._clock.now().tick - began_tick)
        if lost_s < STOPPED_S and self._watched.get(watched.lease.id) is watched:
            self._take(watched, finding, took_s)

    async def _ask(self, lease: Lease, check: Check) -> Finding:
        match check:
            case HttpCheck():
                return await self._http.probe(lease, check)
            case TcpCheck():
                return await tcp.probe(lease)
            case GrpcCheck():
                return await grpc.probe(lease, check)
            case CommandCheck():
                return await command.probe(lease, check, self.allow_commands)
            case ListenCheck() | ReportCheck():
                raise AssertionError(f"a check of kind {check.__struct_config__.tag} has no turns")

    def _take(self, watched: _Watched, finding: Finding, took_s: float) -> None:
        self._on_result(watched.kind, finding.result, took_s)
        self._settle(watched, take(watched.tally, watched.check, finding.result, self._clock.now().tick), finding.note)

    def _settle(self, watched: _Watched, tally: Tally, note: str) -> None:
        """Take the new tally, and tell of it where the health is another one. A note alone is no news."""
        before, health = watched.tally.health, tally.health
        watched.tally = tally
        if health != before and health != "unknown":
            self._report(watched.lease.id, health, note)


def _is_checked(lease: Lease) -> bool:
    """Tell whether the lease has a check that runs now: a service that reports does so from the grant on."""
    if lease.check is None:
        return False
    return lease.state == "bound" or (lease.state == "held" and isinstance(lease.check, ReportCheck))
