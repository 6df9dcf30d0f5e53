"""The state watch: polls the kernel's listeners and reports each lease whose state differs.

The kernel notifies nobody when a socket begins to listen, so the table of listeners is read a few times a second. That
costs by the number of listeners on this host, 1.4 µs each, and not by the number of leases; only a new socket is
attributed to a process, which is the expensive part. Whose listener it is, is judged by `core.ownership`.

Judging is synchronous and always on a table that was read this moment: no process is reported as foreign because of
what was true before another lease began.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal

from portd.adapters.kernel import procfs
from portd.adapters.kernel.attribution import Attribution, HolderTable
from portd.adapters.kernel.inspection import DIRECT, Inspection
from portd.adapters.kernel.owners import OwnerWatch
from portd.adapters.kernel.succession import Succession
from portd.core.model import Elsewhere, Event, Lease, Listener, Owner
from portd.core.ownership import Holder, Judgement, ProcessKey, Seen, judge, key_of, kin_of
from portd.leasing.seams import ObserveExit, ReportOwner, ReportState

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 0.25
"""Between two polls: a state is true within this time, and the time that one attribution costs."""
EAGER_S: Final = (0.03, 0.07)
"""Between polls after a grant: somebody is about to listen, and `bound` should feel immediate."""
COST_FACTOR: Final = 10
"""The pause after a poll is at least this much longer than reading the table: a tenth of the loop at most."""
ELSEWHERE_PAUSE_S: Final = 1.0
"""Between two attributions of sockets that are on no leased port: where the kernel hides them, each walks /proc."""

LeasesOn = Callable[[int], Sequence[Lease]]
State = Literal["held", "bound", "conflict"]
NOTHING: Final = Seen()


class StateWatch:
    """Compares listeners with leases, and reports each lease whose state is not what the kernel shows."""

    def __init__(
        self,
        sockets: HolderTable,
        leases_on: LeasesOn,
        live_count: Callable[[], int],
        report: ReportState,
        observe_exit: ObserveExit = lambda lease, successor: None,
        report_owner: ReportOwner = lambda process, owner: None,
        *,
        cooldown_s: float = 0.0,
        interval_s: float = INTERVAL_S,
        inspection: Inspection = DIRECT,
    ) -> None:
        self._sockets = sockets
        self._leases_on = leases_on
        self._live_count = live_count
        self._report = report
        self._interval_s = interval_s
        self._attribution = Attribution(sockets)
        self.succession = Succession(sockets, self._attribution, leases_on, observe_exit, cooldown_s)
        self.owners = OwnerWatch(report_owner, inspection)
        self._occupied: dict[str, int] = {}
        self._settled: dict[int, tuple[tuple[int, ...], list[Lease]]] = {}
        self._waiting: dict[ProcessKey, dict[str, int]] = {}
        self._waiting_for: dict[str, ProcessKey] = {}
        self._elsewhere_at = 0.0
        self._eager: list[float] = []
        self._due = 0.0
        self._woken = asyncio.Event()
        self._cost_s = 0.0
        self.problem: str | None = None
        """Why states are not updated, None while they are."""

    def restore(self, leases: Iterable[Lease]) -> None:
        """Start from the leases of the last run: who listened may have stopped meanwhile."""
        for lease in leases:
            if lease.state != "held" or lease.listening or lease.elsewhere:
                self._occupied[lease.id] = lease.port
            self._await(lease)
            self.owners.follow(lease)

    def apply(self, event: Event) -> None:
        """Follow an event: which owners have yet to listen, and which have exited before they did."""
        self._await(event.lease)
        self.owners.follow(event.lease)
        self.succession.apply(event)
        if event.type in ("granted", "declined", "passed") or self.succession.is_expected_on(event.lease.port):
            self.wake()

    def wake(self) -> None:
        """Poll soon: somebody was granted a port and will listen on it. Cheap, however often it is called."""
        if len(self._eager) == len(EAGER_S) - 1:
            return  # woken since the last poll: the next one comes no later for it
        self._eager = list(EAGER_S[1:])
        due = asyncio.get_running_loop().time() + max(EAGER_S[0], COST_FACTOR * self._cost_s)
        if due < self._due:
            self._due = due
            self._woken.set()

    async def run(self) -> None:
        """Poll for ever; asleep while there is no lease."""
        loop = asyncio.get_running_loop()
        while True:
            await self.poll()
            self.owners.check_due()
            pause_s = self._eager.pop(0) if self._eager else self._interval_s
            is_busy = self._live_count() or self.succession.is_waiting()
            pause_s = max(pause_s, COST_FACTOR * self._cost_s) if is_busy else math.inf
            self._due = loop.time() + pause_s
            while (left_s := self._due - loop.time()) > 0:
                self._woken.clear()
                try:
                    async with asyncio.timeout(left_s if left_s < math.inf else None):
                        await self._woken.wait()
                except TimeoutError:
                    break

    async def poll(self) -> None:
        """Poll once, and once more when new sockets had to be attributed. A failure is logged once and stands in
        `problem`; the next poll tries again."""
        try:
            for _ in range(2):
                fresh, likely = self._judge(self._read())
                if not fresh:
                    break
                await self._attribution.refresh(fresh, likely)
        except OSError as error:
            if self.problem is None:
                logger.error("the kernel's socket table can't be read, the states of leases are not updated: %s", error)
            self.problem = f"the kernel's socket table can't be read: {error}"
        else:
            self.problem = None

    def _read(self) -> list[Listener]:
        began = time.monotonic()
        listeners = self._sockets.listeners()
        self._cost_s = time.monotonic() - began
        return listeners

    # --- judging ---

    def _judge(self, listeners: list[Listener]) -> tuple[list[int], set[int]]:
        """Report what has changed; returns the sockets to attribute first, and the pids that may have them."""
        self._attribution.keep({listener.inode for listener in listeners})
        now = asyncio.get_running_loop().time()
        by_port: dict[int, list[Listener]] = {}
        elsewhere: list[Listener] = []
        for listener in listeners:
            if self._leases_on(listener.port) or self.succession.is_expected_on(listener.port):
                by_port.setdefault(listener.port, []).append(listener)
            elif self._waiting:
                elsewhere.append(listener)
        fresh: dict[int, None] = {}
        likely: set[int] = set()
        occupied: dict[str, int] = {}
        for port, on_port in by_port.items():
            self._judge_port(port, on_port, now, fresh, likely, occupied)
            fresh.update(dict.fromkeys(self.succession.judge_port(port, on_port)))
        for port in self._settled.keys() - by_port.keys():
            del self._settled[port]
        self._judge_elsewhere(elsewhere, now, fresh, likely, occupied)
        self._leave(occupied)
        return list(fresh), likely

    def _judge_port(
        self,
        port: int,
        listeners: list[Listener],
        now: float,
        fresh: dict[int, None],
        likely: set[int],
        occupied: dict[str, int],
    ) -> None:
        """Judge the leases of a port that somebody listens on; a port that is as it was costs one comparison."""
        leases = list(self._leases_on(port))
        inodes = tuple(listener.inode for listener in listeners)
        if self._settled.get(port) == (inodes, leases):
            occupied.update({lease.id: port for lease in leases})
            return
        is_settled = True
        for lease in leases:
            judgement = judge(lease, listeners, self._attribution.holders, others=leases)
            verdict = _verdict(judgement)
            if not judgement.inodes:
                continue  # nobody listens where this lease is
            if judgement.own or judgement.foreign or not judgement.is_complete:
                occupied[lease.id] = port
            if verdict != "bound" or not judgement.is_complete:
                is_settled = False
                due = [inode for inode in judgement.inodes if self._attribution.is_due(inode, now)]
                fresh.update(dict.fromkeys(due))
                likely.update(() if lease.process is None or not due else (lease.process.pid,))
            if verdict is not None:
                self._report_change(lease, verdict, judgement)
        if is_settled:
            self._settled[port] = inodes, list(self._leases_on(port))
        else:
            self._settled.pop(port, None)

    def _report_change(self, lease: Lease, state: State, judgement: Judgement) -> None:
        """Report a lease whose state, addresses, rule or foreign process has changed."""
        vouched_by = judgement.own[0].vouched_by if judgement.own else None
        kin = lease.kin
        known = set(kin) if lease.process is None else {*kin, key_of(lease.process)}
        if any(own.holder.ancestors and own.holder.ancestors[0] not in known for own in judgement.own):
            kin = kin_of(lease, judgement.own)
        seen = Seen(judgement.listening, vouched_by, (), kin)
        who = _describe(*judgement.foreign[0]) if state == "conflict" else _owner_among(lease, judgement)
        is_foreign_same = state != "conflict" or _pid(who) == _pid(lease.foreign)
        if state != lease.state or seen != seen_of(lease) or not is_foreign_same:
            self._report(lease.id, state, who, seen)

    def _judge_elsewhere(
        self,
        listeners: list[Listener],
        now: float,
        fresh: dict[int, None],
        likely: set[int],
        occupied: dict[str, int],
    ) -> None:
        """Find the ports that owners listen on while they do not listen on the leased one."""
        if not self._waiting:
            return
        holders = self._attribution.holders
        unknown = [listener.inode for listener in listeners if listener.inode not in holders]
        if unknown and now >= self._elsewhere_at:
            self._elsewhere_at = now + ELSEWHERE_PAUSE_S
            fresh.update(dict.fromkeys(unknown))
            likely.update(pid for pid, _ in self._waiting)
        found: dict[str, set[Elsewhere]] = {}
        for listener in listeners:
            holder = holders.get(listener.inode)
            for key in () if holder is None or holder.is_portd else holder.ancestors:
                for lease_id in self._waiting.get(key, ()):
                    found.setdefault(lease_id, set()).add(Elsewhere(listener.address, listener.port))
        for lease_id, places in found.items():
            port = self._waiting[self._waiting_for[lease_id]][lease_id]
            lease = self._live(lease_id, port)
            if lease is None or lease.state != "held" or lease_id in occupied:
                continue
            occupied[lease_id] = port
            seen = NOTHING._replace(kin=lease.kin, elsewhere=_sorted(places))
            if seen != seen_of(lease):
                self._report(lease_id, "held", None, seen)

    def _leave(self, occupied: dict[str, int]) -> None:
        """Report the leases that nobody listens on any more; keeps those whose report has not been applied yet."""
        for lease_id, port in self._occupied.items():
            if lease_id not in occupied:
                lease = self._live(lease_id, port)
                if lease is not None and (lease.state != "held" or seen_of(lease) != NOTHING._replace(kin=lease.kin)):
                    occupied[lease_id] = port
                    self._report(lease_id, "held", None, NOTHING._replace(kin=lease.kin))
        self._occupied = occupied

    # --- parts ---

    def _live(self, lease_id: str, port: int) -> Lease | None:
        return next((lease for lease in self._leases_on(port) if lease.id == lease_id), None)

    def _await(self, lease: Lease) -> None:
        """Keep track of the owners that have a lease and do not listen on it (yet)."""
        key = self._waiting_for.pop(lease.id, None)
        if key is not None:
            self._waiting[key].pop(lease.id, None)
            if not self._waiting[key]:
                del self._waiting[key]
        if lease.state == "held" and lease.process is not None:
            key = self._waiting_for[lease.id] = key_of(lease.process)
            self._waiting.setdefault(key, {})[lease.id] = lease.port


def seen_of(lease: Lease) -> Seen:
    """Return what was last reported of a lease."""
    return Seen(lease.listening, lease.vouched_by, lease.elsewhere, lease.kin)


def _verdict(judgement: Judgement) -> State | None:
    """Return the state that a judgement means; None where it takes another attribution to know."""
    if judgement.own:
        return "conflict" if judgement.foreign else "bound"
    if not judgement.is_complete:
        return None
    return "conflict" if judgement.foreign else "held"


def _owner_among(lease: Lease, judgement: Judgement) -> Owner | None:
    """Describe the lease's owner where it listens itself, else another process of its own."""
    owners = [own.holder.owner for own in judgement.own if own.holder.owner is not None]
    return next((owner for owner in owners if owner.pid == lease.owner.pid), owners[0] if owners else None)


def _describe(listener: Listener, holder: Holder) -> Owner:
    """Describe a foreign listener; of one whose process is hidden from portd only the uid is known."""
    if holder.owner is not None:
        return holder.owner
    return Owner(uid=listener.uid, user=procfs.user_name(listener.uid), known_by="socket")


def _pid(owner: Owner | None) -> tuple[int | None, int | None] | None:
    return None if owner is None else (owner.pid, owner.uid)


def _sorted(places: Iterable[Elsewhere]) -> tuple[Elsewhere, ...]:
    return tuple(sorted(places, key=lambda each: (each.port, each.address)))
