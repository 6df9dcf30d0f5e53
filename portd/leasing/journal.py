"""The order of everything that happens: changes become events here, one after the other, and nowhere else.

Two kinds of change come in. A *commit* is somebody's request: it is true only once the disk has it, and then it is
answered. An *observation* (a process is gone, a clock ran out, a port is listened on) is true already: it is applied
at once and written with the next commit; a disk that is full must not keep a dead instance in the look-ups.

Revisions are given at the moment of sequencing. While a commit is on its way to the disk nothing else is applied, so
the order of revisions, of application and of the log is one and the same. The batch forms by itself: whatever comes
in while the disk works goes with the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from portd.core.errors import Busy, LeaseEnded, Refusal, StoreLost, StoreUnavailable
from portd.core.failpoints import failpoint
from portd.core.model import EndedBecause, Event, Lease
from portd.core.table import LeaseTable
from portd.core.transitions import Change, advance, is_legal
from portd.leasing.seams import REVISION_GAP, ApplyEvent, Clock, LeaseStore

logger = logging.getLogger(__name__)

UNWRITTEN_MAX: Final = REVISION_GAP // 10
"""Events that may wait for the disk (about 100 MB). Past it the daemon stops, rather than forget one, or come near the
revisions of the next start."""
PENDING_MAX: Final = 2_048
"""Requests that may wait for the disk; the next one is told to come back (`busy`)."""
BATCH_MAX: Final = 512
"""Requests in one transaction: larger ones win no throughput and cost latency."""
PATIENCE_S: Final = 5.0
"""Seconds that requests wait for one commit. A disk that hangs is answered as one that fails, and what it writes late
is taken back."""
RETRY_S: Final = 0.5
"""Seconds between two tries to write while the store is unavailable."""

Undo = Callable[[], None]
Tell = Callable[[], None]


class Entry:
    """A request on its way: its changes are applied all or none. `undo` runs when nothing came of it.

    It is settled once, when its leases are durable and applied, or when it is refused. No future: one for each grant
    would cost a turn of the loop for each, where a whole batch is settled in one.
    """

    __slots__ = ("_outcome", "_waiting", "abandoned", "changes", "undo")

    def __init__(self, changes: Sequence[Change], undo: Undo) -> None:
        self.changes = changes
        self.undo = undo
        self.abandoned = False
        self._outcome: list[Lease] | Refusal | None = None
        self._waiting: list[Tell] = []

    def settle(self, outcome: list[Lease] | Refusal) -> None:
        """Tell who waits; nothing happens when it was settled before."""
        if self._outcome is None:
            self._outcome = outcome
            for tell in self._waiting:
                tell()
            self._waiting.clear()  # who waits mostly refers to the entry: a circle of garbage for each grant

    def then(self, tell: Tell) -> None:
        """Have `tell` called as soon as it is settled, at once if it is; it must not raise or wait."""
        if self._outcome is None:
            self._waiting.append(tell)
        else:
            tell()

    async def wait(self) -> None:
        """Wait until it is settled; whoever is cancelled meanwhile gives up the waiting, and the work goes on."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.then(lambda: None if waiter.done() else waiter.set_result(None))
        await waiter

    def result(self) -> list[Lease]:
        """Return the changed leases of a settled entry; raises the Refusal that it ended with."""
        assert self._outcome is not None, "not settled yet"
        if isinstance(self._outcome, Refusal):
            raise self._outcome
        return self._outcome


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
        self._entries: list[Entry] = []
        self._observed: deque[Change] = deque()
        self._unwritten: list[Event] = []
        self._committing = False
        self._hanging = False
        self._applying = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.problem: str | None = None
        self.patience_s = PATIENCE_S

    @property
    def waiting_count(self) -> int:
        """Return how many requests wait for the disk."""
        return len(self._entries)

    def unwritten(self, lease_id: str) -> Lease | None:
        """Return a lease as an observation that the disk does not have yet left it, or None."""
        return next((event.lease for event in reversed(self._unwritten) if event.lease.id == lease_id), None)

    def unwritten_ends(self) -> list[Lease]:
        """Return the leases whose end the disk does not have yet, newest end first."""
        return [event.lease for event in reversed(self._unwritten) if event.type == "ended"]

    def start_after(self, revision: int) -> None:
        """Take revisions up after this one."""
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

    def commit(self, changes: Sequence[Change], undo: Undo = lambda: None) -> Entry:
        """Queue a request; the entry is settled once its leases are durable and applied.

        Or it is refused, with StoreUnavailable or a Refusal of the change itself, after `undo` ran (where the disk
        hangs, it is taken back when the disk has answered). Raises Busy when too many wait already, StoreUnavailable
        while a commit hangs.
        """
        if self._hanging and self.problem is not None:
            raise StoreUnavailable(self.problem)  # nobody waits behind a commit that hangs
        if len(self._entries) >= PENDING_MAX:
            raise Busy("too many requests wait for the disk: try again in a second")
        entry = Entry(changes, undo)
        self._entries.append(entry)
        self._idle.clear()
        self._wake.set()
        return entry

    def observe(self, change: Change) -> None:
        """Make something true that is so already. A change that is no longer legal when its turn comes is dropped."""
        self._observed.append(change)
        self._apply_observations()

    def mark_unwritable(self, problem: str) -> None:
        """Take the store for one that takes no writes, for this reason, until a write shows otherwise."""
        self._set_problem(problem)
        self._wake.set()

    async def run(self) -> None:
        """Write batches for ever; raises StoreLost when an outcome is unknown."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._entries or self._unwritten or self.problem:
                if len(self._unwritten) > UNWRITTEN_MAX:
                    raise StoreLost(f"{len(self._unwritten)} events wait for a disk that does not take them")
                await self._write_batch()
                if not self._entries and not self._unwritten:
                    self._idle.set()
                if self.problem and not self._entries:
                    await self._wait_for_entry(RETRY_S)

    async def drain(self, timeout_s: float) -> None:
        """Wait until everything that came in is on the disk, for at most `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d events did not reach the disk before the stop", len(self._unwritten))

    async def _wait_for_entry(self, timeout_s: float) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    async def _write_batch(self) -> None:
        batch, self._entries = self._entries[:BATCH_MAX], self._entries[BATCH_MAX:]
        observed = len(self._unwritten)
        sequenced = self._sequence(batch)
        events = self._unwritten + [event for _, made in sequenced for event in made]
        if not events and self.problem is None:
            return  # else an empty batch tries the store: nobody may be asking for anything, and the problem is over
        # From here until the batch is applied or given up nothing else is applied: `observe` queues.
        self._committing = bool(sequenced)
        loop = asyncio.get_running_loop()
        impatience = loop.call_later(self.patience_s, self._abandon, [entry for entry, _ in sequenced])
        try:
            failpoint("journal.sequenced")
            await self._store.commit(events)
            failpoint("journal.durable")
        except StoreUnavailable as error:
            self._give_up(sequenced, error)
        except asyncio.CancelledError:
            raise  # the daemon stops; what the disk has is found at the next start
        except BaseException as error:
            lost = error if isinstance(error, StoreLost) else StoreLost(f"the journal failed: {error!r}")
            self._give_up(
                sequenced, StoreUnavailable("the store failed; portd is starting over from the disk"), undo=False
            )
            raise lost from error
        else:
            if self.problem is not None:
                logger.info("the store works again")
            self.problem = None
            del self._unwritten[:observed]
            for entry, made in sequenced:
                if entry.abandoned:
                    self._revoke(entry)
                else:
                    self._finish(entry, made)
            if events:
                self._confirm(events[-1].revision)
            failpoint("journal.applied")
        finally:
            impatience.cancel()
            self._committing = self._hanging = False
            self._apply_observations()

    def _abandon(self, under_way: list[Entry]) -> None:
        """Answer the requests that wait for a disk that hangs, and those behind them.

        Observations are applied again from here on, with later revisions: an exit is true whatever the disk does.
        """
        problem = StoreUnavailable(f"the disk has not answered for {self.patience_s:g} s: nothing is granted till then")
        self._set_problem(problem.detail)
        logger.error("%s", problem.detail)
        for entry in under_way:
            entry.abandoned = True
            entry.settle(problem)
        waiting, self._entries = self._entries, []
        for entry in waiting:
            self._refuse(entry, problem)
        self._hanging, self._committing = True, False
        self._apply_observations()

    def _revoke(self, entry: Entry) -> None:
        """Take back what the disk wrote after its requests were refused: others have happened since, so the changes
        come again, behind them, and grants end at once (nobody knows of them, so nobody owns them)."""
        for change in entry.changes:
            self._observed.append(change)
            if change.type == "granted":
                self._observed.append(end(change.lease_id, "revoked", self._clock.now().at))

    def _sequence(self, batch: Iterable[Entry]) -> list[tuple[Entry, list[Event]]]:
        """Turn requests into events with the next revisions; each change sees the ones before it."""
        staged: dict[str, Lease] = {}
        sequenced = []
        at = self._clock.now().at
        for entry in batch:
            made: list[Event] = []
            before_entry = dict(staged) if len(entry.changes) > 1 else staged
            try:
                for change in entry.changes:
                    event = self._event(change, staged.get(change.lease_id), at)
                    staged[change.lease_id] = event.lease
                    made.append(event)
            except Refusal as refusal:
                staged = before_entry
                self._refuse(entry, refusal)
            else:
                sequenced.append((entry, made))
        return sequenced

    def _event(self, change: Change, staged: Lease | None, at: float) -> Event:
        lease = change.lease or staged or self._table.get(change.lease_id)
        if lease is None:
            raise LeaseEnded(f"lease {change.lease_id} has ended; ask for a new one")
        self._revision += 1
        return Event(self._revision, change.type, at, advance(lease, change, self._revision))

    def _apply_observations(self) -> None:
        """Apply what was observed, unless a commit is on its way (then it does so when it has landed, or failed), or a
        watcher observes while it is being told something: each watcher sees events in order."""
        if self._committing or self._applying:
            return
        self._applying = True
        try:
            while self._observed:
                change = self._observed.popleft()
                lease = change.lease or self._table.get(change.lease_id)
                if lease is None or not is_legal(lease, change.type):
                    continue
                event = self._event(change, None, self._clock.now().at)
                self._publish(event)
                self._unwritten.append(event)
        finally:
            self._applying = False
        if self._unwritten:
            if self.problem is not None:
                self._confirm(self._revision)
            self._idle.clear()
            self._wake.set()

    def _set_problem(self, problem: str) -> None:
        self.problem = problem
        self._confirm(self._table.revision)

    def _confirm(self, revision: int) -> None:
        for watcher in self._durable_watchers:
            watcher(revision)

    def _publish(self, event: Event) -> None:
        self._table.apply(event)
        for watcher in self._watchers:
            watcher(event)

    def _finish(self, entry: Entry, made: list[Event]) -> None:
        for event in made:
            self._publish(event)
        entry.settle([event.lease for event in made])

    def _give_up(
        self, sequenced: Iterable[tuple[Entry, list[Event]]], error: StoreUnavailable, *, undo: bool = True
    ) -> None:
        if self.problem is None:
            logger.error("the store does not take writes: %s", error.detail)
        self._set_problem(error.detail)
        for entry, _ in sequenced:
            self._refuse(entry, error, undo=undo)

    def _refuse(self, entry: Entry, refusal: Refusal, *, undo: bool = True) -> None:
        if undo:
            entry.undo()
        entry.settle(refusal)


def end(lease_id: str, because: EndedBecause, at: float) -> Change:
    """Make the change that ends a lease."""
    return Change(lease_id, "ended", {"ended_at": at, "ended_because": because})
