"""The sequencer: changes become events here, one after the other, and nowhere else.

There are two kinds of change. A *request* (`submit`) is true only once it is durable, and then it is answered. An
*observation* (`observe`: a process is gone, a port is listened on) is true already: it is applied at once and written
with the next commit, so a full disk does not keep a dead instance in the look-ups.

Revisions are given at the moment of sequencing. While a commit is on its way to the disk nothing else is applied, so
the order of revisions, of application and of the log is one and the same. Batches form by themselves: whatever comes
in while the disk works goes with the next one. Requests are settled after the observations that waited behind them, so
an answer shows what is, not what was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from portd.core.errors import Busy, LeaseEnded, Refusal, StoreLost, StoreUnavailable
from portd.core.failpoints import armed, failpoint
from portd.core.model import EndedBecause, Event, Lease
from portd.core.table import LeaseTable
from portd.core.transitions import Change, advance, is_legal
from portd.leasing.pending import Pending
from portd.leasing.seams import REVISION_GAP, ApplyEvent, Clock, LeaseStore

logger = logging.getLogger(__name__)

UNWRITTEN_MAX: Final = REVISION_GAP // 10
"""Events that may wait for the disk (about 100 MB). Past it the daemon stops, rather than forget one, or come near the
revisions of the next start."""
PENDING_MAX: Final = 2_048
"""Requests that may wait for the disk; the next one is refused as `busy`."""
BATCH_MAX: Final = 512
"""Requests in one transaction: larger ones win no throughput and cost latency."""
PATIENCE_S: Final = 5.0
"""Seconds that requests wait for one commit. A disk that hangs is answered as one that fails; grants that it writes
late are revoked."""
RETRY_S: Final = 0.5
"""Seconds between two attempts to write while the store is unavailable."""


class Journal:
    """The sequencer between decisions and truth. `run` is its task; it ends with StoreLost when the disk can't be
    trusted any more, and then the daemon must stop."""

    def __init__(self, table: LeaseTable, store: LeaseStore, clock: Clock) -> None:
        self._table = table
        self._store = store
        self._clock = clock
        self._revision = table.revision
        self._watchers: list[ApplyEvent] = []
        self._durable_watchers: list[Callable[[int], None]] = []
        self._requests: list[Pending] = []
        self._observed: deque[Change | str] = deque()  # or a service that has changed on another host
        self._touch_watchers: list[Callable[[str, int], None]] = []
        self._unwritten: list[Event] = []
        self._is_committing = False
        self._is_hanging = False
        self._is_applying = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.problem: str | None = None
        self.patience_s = PATIENCE_S

    @property
    def waiting_count(self) -> int:
        """Return how many requests wait for the disk."""
        return len(self._requests)

    def unwritten(self, lease_id: str) -> Lease | None:
        """Return a lease as an observation that the disk does not have yet left it, or None."""
        return next((event.lease for event in reversed(self._unwritten) if event.lease.id == lease_id), None)

    def unwritten_ends(self) -> list[Lease]:
        """Return the leases whose end the disk does not have yet, newest end first."""
        return [event.lease for event in reversed(self._unwritten) if event.type == "ended"]

    def start_after(self, revision: int) -> None:
        """Give the next event the revision after this one, at the least."""
        self._revision = revision

    def subscribe(self, watcher: ApplyEvent) -> None:
        """Have `watcher` called with every event, after it is true and in order. Watchers can't undo anything."""
        self._watchers.append(watcher)

    def subscribe_durable(self, watcher: Callable[[int], None]) -> None:
        """Have `watcher` called with the revision up to which every event is durable, whenever it grows.

        While the store takes no writes it is called for every event at once: nobody knows how long that will last, and
        a dead instance must not be shown till then.
        """
        self._durable_watchers.append(watcher)

    def submit(self, pending: Pending, *, is_internal: bool = False) -> None:
        """Queue a request. It is committed and settled once its changes are durable and applied.

        Or it is rolled back and settled with a refusal: StoreUnavailable, or that of a change that is no longer
        possible (where the disk hangs, it is settled at once and rolled back when the disk has answered). Raises Busy
        when too many wait already (`is_internal`: the engine's own are never too many), StoreUnavailable while a commit
        hangs; then it is rolled back too.
        """
        if self._is_hanging and self.problem is not None:
            pending.rollback()
            raise StoreUnavailable(self.problem)  # nobody waits behind a commit that hangs
        if len(self._requests) >= PENDING_MAX and not is_internal:
            pending.rollback()
            raise Busy("too many requests wait for the disk: try again in a second")
        self._requests.append(pending)
        self._idle.clear()
        self._wake.set()

    def observe(self, change: Change) -> None:
        """Apply a change that has happened already. One that is not legal when its turn comes is dropped."""
        self._observed.append(change)
        self._apply_observations()

    def touch(self, service: str) -> None:
        """Give a change of a service on another host a revision of this daemon's; it has no event and is not stored."""
        self._observed.append(service)
        self._apply_observations()

    def subscribe_touched(self, watcher: Callable[[str, int], None]) -> None:
        """Have `watcher` called with a service that has changed on another host, and the revision of that change."""
        self._touch_watchers.append(watcher)

    def mark_unwritable(self, problem: str) -> None:
        """Treat the store as read-only, for this reason, until a write succeeds."""
        self._set_problem(problem)
        self._wake.set()

    async def run(self) -> None:
        """Write batches for ever; raises StoreLost when an outcome is unknown."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._requests or self._unwritten or self.problem:
                if len(self._unwritten) > UNWRITTEN_MAX:
                    raise StoreLost(f"{len(self._unwritten)} events wait for a disk that does not take them")
                await self._write_batch()
                if not self._requests and not self._unwritten:
                    self._idle.set()
                if self.problem and not self._requests:
                    await self._wait_for_request(RETRY_S)

    async def drain(self, timeout_s: float) -> None:
        """Wait until everything that came in is on the disk, for at most `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d events did not reach the disk before the stop", len(self._unwritten))

    async def _wait_for_request(self, timeout_s: float) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    async def _write_batch(self) -> None:
        batch, self._requests = self._requests[:BATCH_MAX], self._requests[BATCH_MAX:]
        observed_count = len(self._unwritten)
        sequenced = self._sequence(batch)
        events = self._unwritten + [event for _, made in sequenced for event in made]
        if not events and self.problem is None:
            return  # else an empty batch probes the store: nobody may be asking for anything, and the problem is over
        # From here until the batch is applied or given up nothing else is applied: `observe` queues.
        self._is_committing = bool(sequenced)
        loop = asyncio.get_running_loop()
        impatience = loop.call_later(self.patience_s, self._abandon, [pending for pending, _ in sequenced])
        refusal: Refusal | None = None
        try:
            if armed:
                failpoint("journal.sequenced")
            await self._store.commit(events)
            if armed:
                failpoint("journal.durable")
        except StoreUnavailable as error:
            refusal = error
            self._give_up(sequenced, error)
        except asyncio.CancelledError:
            refusal = StoreUnavailable("portd is stopping")
            raise  # what the disk has is found at the next start
        except BaseException as error:
            lost = error if isinstance(error, StoreLost) else StoreLost(f"the journal failed: {error!r}")
            refusal = StoreUnavailable("the store failed; portd is starting over from the disk")
            self._set_problem(refusal.detail)
            raise lost from error
        else:
            self._apply_batch(sequenced, observed_count)
            if events:
                for watcher in self._durable_watchers:
                    watcher(events[-1].revision)
            if armed:
                failpoint("journal.applied")
        finally:
            impatience.cancel()
            self._is_committing = self._is_hanging = False
            self._apply_observations()
            for pending, _ in sequenced:  # last: an answer shows what happened meanwhile too
                pending.settle(refusal)

    def _apply_batch(self, sequenced: list[tuple[Pending, list[Event]]], observed_count: int) -> None:
        """Apply what is durable now: requests with their effects; `observed_count` events were applied before."""
        if self.problem is not None:
            logger.info("the store works again")
        self.problem = None
        del self._unwritten[:observed_count]
        for pending, made in sequenced:
            if pending.is_abandoned:
                self._apply_late(pending)
            else:
                for event in made:
                    self._publish(event)
            if pending.effects:
                pending.commit()

    def _abandon(self, under_way: list[Pending]) -> None:
        """Refuse the requests that wait for a disk that hangs, and roll back those behind them, which it has not seen.

        Observations are applied again from here on, with later revisions: an exit is true whatever the disk does.
        """
        problem = StoreUnavailable(f"the disk has not answered for {self.patience_s:g} s: nothing is granted till then")
        self._set_problem(problem.detail)
        logger.error("%s", problem.detail)
        for pending in under_way:
            pending.is_abandoned = True
            pending.settle(problem)
        waiting, self._requests = self._requests, []
        for pending in waiting:
            pending.rollback()
            pending.settle(problem)
        self._is_hanging, self._is_committing = True, False
        self._apply_observations()

    def _apply_late(self, pending: Pending) -> None:
        """Apply what the disk wrote after its request was refused: other events have come since, so the changes come
        again, behind them, and grants end at once (nobody knows of them, so nobody owns them)."""
        for change in pending.changes:
            self._observed.append(change)
            if change.type == "granted":
                self._observed.append(end(change.lease_id, "revoked", self._clock.now().at))

    def _sequence(self, batch: Iterable[Pending]) -> list[tuple[Pending, list[Event]]]:
        """Make events of requests, with the next revisions; each change sees the ones before it."""
        staged: dict[str, Lease] = {}
        sequenced = []
        for pending in batch:
            made: list[Event] = []
            before = dict(staged) if len(pending.changes) > 1 else staged
            try:
                for change in pending.changes:
                    event = self._event(change, staged.get(change.lease_id), pending.now.at)
                    staged[change.lease_id] = event.lease
                    made.append(event)
            except Refusal as refusal:
                staged = before
                pending.rollback()
                pending.settle(refusal)
            else:
                sequenced.append((pending, made))
        return sequenced

    def _event(self, change: Change, staged: Lease | None, at: float) -> Event:
        lease = change.lease or staged or self._table.get(change.lease_id)
        if lease is None:
            raise LeaseEnded(f"lease {change.lease_id} has ended; ask for a new one")
        self._revision += 1
        return Event(self._revision, change.type, at, advance(lease, change, self._revision))

    def _apply_observations(self) -> None:
        """Apply what was observed, unless a commit is on its way (then when it has landed, or failed), or a watcher
        observes while it is being notified: each watcher sees events in order."""
        if self._is_committing or self._is_applying:
            return
        self._is_applying = True
        try:
            while self._observed:
                change = self._observed.popleft()
                if isinstance(change, str):
                    self._revision += 1
                    self._table.skip_to(self._revision)
                    for touched in self._touch_watchers:
                        touched(change, self._revision)
                    continue
                lease = change.lease or self._table.get(change.lease_id)
                if lease is None or not is_legal(lease, change.type):
                    continue
                event = self._event(change, None, self._clock.now().at)
                self._publish(event)
                self._unwritten.append(event)
        finally:
            self._is_applying = False
        if self._unwritten:
            if self.problem is not None:
                self._confirm_all()
            self._idle.clear()
            self._wake.set()

    def _publish(self, event: Event) -> None:
        self._table.apply(event)
        for watcher in self._watchers:
            watcher(event)

    def _give_up(self, sequenced: Iterable[tuple[Pending, list[Event]]], error: StoreUnavailable) -> None:
        if self.problem is None:
            logger.error("the store does not take writes: %s", error.detail)
        self._set_problem(error.detail)
        for pending, _ in sequenced:
            pending.rollback()

    def _set_problem(self, problem: str) -> None:
        self.problem = problem
        self._confirm_all()

    def _confirm_all(self) -> None:
        for watcher in self._durable_watchers:
            watcher(self._table.revision)


def end(lease_id: str, because: EndedBecause, at: float) -> Change:
    """Make the change that ends a lease."""
    return Change(lease_id, "ended", {"ended_at": at, "ended_because": because})
