"""The recent events, for followers and long polls.

A follower sees only events that a crash cannot take back: `apply` receives an event as soon as it is true, `confirm`
releases it when it is durable (or when the store is known to be unavailable, and nobody can say when it will be). What
a crash took back all the same is answered RevisionGone: the follower lists again. So a replay of what was followed
always equals the listing.

Bounded on both sides: events beyond the kept ones are gone, and a waiter is woken by a change of the service that it
waits for, by nothing else. This module must not know how events travel to followers.
"""

from __future__ import annotations

import asyncio
import bisect
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Final

from portd.core.errors import RevisionGone
from portd.core.model import Event
from portd.leasing.seams import REVISION_GAP, Loaded

EVENTS_KEPT: Final = 10_000
"""Events that a follower can resume over; the store keeps as many. About 5 MB when full."""
EVENTS_BYTES: Final = 32 << 20
"""Bytes of the kept events, by estimate: large metadata is kept for a shorter time, not in more memory."""
EVENT_BYTES: Final = 1_000
"""What an event takes beside the texts that its user chose."""
SERVICES_KEPT: Final = 100_000
"""Services whose last change is remembered; a watcher of a forgotten one is answered at once, not left to wait."""

Follower = Callable[[Event], None]
_NOBODY: dict[object, Follower] = {}


class Feed:
    """A watcher of the journal that others can watch at their own pace."""

    def __init__(self) -> None:
        self.revision = 0
        self._events: deque[Event] = deque()
        self._sizes: deque[int] = deque()  # of the events, in bytes
        self._bytes = 0
        self._unconfirmed: deque[Event] = deque()
        self._started_at = 0  # the revision of the start
        self._before_start: tuple[int, ...] = ()  # revisions of the events that were durable then, ascending
        self._gone = 0  # the newest revision that is no longer kept
        self._changed: OrderedDict[str, int] = OrderedDict()
        self._forgotten = 0  # the newest last change among the services that are no longer remembered
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._confirm_waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._followers: dict[str | None, dict[object, Follower]] = {}
        self.wakeup_count = 0

    def restore(self, loaded: Loaded) -> None:
        """Begin at the revision of the start, with the events that the store kept.

        Must come before anything is published: what the start itself observes follows these events.
        """
        assert self.revision == 0, "events were applied before the restore"
        self._gone = loaded.complete_after
        for event in loaded.events:
            self._keep(event)
        self._before_start = tuple(event.revision for event in self._events)
        for lease in (*loaded.live, *loaded.remembered):
            self._changed[lease.service] = max(lease.revision, self._changed.get(lease.service, 0))
        for event in self._events:
            self._changed[event.lease.service] = max(event.revision, self._changed.get(event.lease.service, 0))
        if len(self._changed) > SERVICES_KEPT:
            newest = sorted(self._changed.items(), key=lambda item: item[1])[-SERVICES_KEPT:]
            self._changed = OrderedDict(newest)
        self.revision = self._started_at = self._forgotten = loaded.revision

    def apply(self, event: Event) -> None:
        """Accept the next event, and wake the long polls of its service; followers see it once it is confirmed."""
        self._unconfirmed.append(event)
        self.touch(event.lease.service, event.revision)

    def touch(self, service: str, revision: int) -> None:
        """Wake the long polls of a service that has changed, here (with an event) or on another host (without)."""
        self.revision = revision
        self._changed[service] = revision
        self._changed.move_to_end(service)
        if len(self._changed) > SERVICES_KEPT:
            self._forgotten = max(self._forgotten, self._changed.popitem(last=False)[1])
        for waiter in self._waiters.pop(service, ()):
            if not waiter.done():
                self.wakeup_count += 1
                waiter.set_result(None)

    def confirm(self, revision: int) -> None:
        """Pass the events up to this revision on to the followers."""
        while self._unconfirmed and self._unconfirmed[0].revision <= revision:
            event = self._unconfirmed.popleft()
            self._keep(event)
            if self._followers:
                for wanted in (None, event.lease.service):
                    for follower in tuple(self._followers.get(wanted, _NOBODY).values()):
                        follower(event)
        if self._confirm_waiters:
            self._wake_confirmed()

    def _keep(self, event: Event) -> None:
        """Append an event, and drop the oldest beyond EVENTS_KEPT and EVENTS_BYTES; the newest always stays."""
        size = _size_bytes(event)
        self._events.append(event)
        self._sizes.append(size)
        self._bytes += size
        while len(self._events) > max(1, EVENTS_KEPT) or (self._bytes > EVENTS_BYTES and len(self._events) > 1):
            self._gone = self._events.popleft().revision
            self._bytes -= self._sizes.popleft()

    @property
    def confirmed(self) -> int:
        """Return the revision up to which followers have every event."""
        return self._unconfirmed[0].revision - 1 if self._unconfirmed else self.revision

    def unconfirmed(self) -> tuple[Event, ...]:
        """Return the events that are true and not passed on yet, oldest first."""
        return tuple(self._unconfirmed)

    async def wait_confirmed(self, revision: int) -> None:
        """Wait until events up to this revision are confirmed: for as long as a commit takes at most."""
        if self.confirmed < min(revision, self.revision):
            waiter = asyncio.get_running_loop().create_future()
            self._confirm_waiters.append((min(revision, self.revision), waiter))
            await waiter

    def since(self, revision: int, service: str | None = None) -> Iterator[Event]:
        """Yield the confirmed events after a revision, oldest first.

        Raises RevisionGone at once when some of them are no longer kept, when the revision is from the future (another
        or a wiped store), or when it was given to an event that a crash took back: list again, then follow from the
        revision of that answer.
        """
        if revision < self._gone or revision > self.revision or self._was_lost(revision):
            raise RevisionGone(
                f"events after revision {revision} are not kept (kept: after {self._gone}, up to "
                f"{self.revision}); list again, then follow from the X-Portd-Revision of that answer"
            )
        return (
            event
            for event in tuple(self._events)
            if event.revision > revision and service in (None, event.lease.service)
        )

    def follow(self, follower: Follower, key: object, service: str | None = None) -> None:
        """Call `follower` with every event of a service (None: of all) until `unfollow`.

        It must neither wait nor raise. Followers of other services cost an event nothing.
        """
        self._followers.setdefault(service, {})[key] = follower

    def unfollow(self, key: object, service: str | None = None) -> None:
        """Call this follower no longer."""
        followers = self._followers[service]
        del followers[key]
        if not followers:
            del self._followers[service]

    def changed_since(self, service: str, revision: int) -> bool:
        """Return whether the service changed after the revision; True as well when that can't be known."""
        if revision > self.revision or self._was_lost(revision):
            return True
        changed = self._changed.get(service)
        return changed > revision if changed is not None else revision < self._forgotten

    def close(self) -> None:
        """Wake everybody who waits: the daemon stops, and they are answered with what there is."""
        for waiter in [waiter for waiting in self._waiters.values() for waiter in waiting]:
            if not waiter.done():
                waiter.set_result(None)
        self.confirm(self.revision)

    async def wait(self, service: str, revision: int, timeout_s: float) -> bool:
        """Wait until the service has changed after the revision, `timeout_s` seconds at most; return whether it has."""
        if self.changed_since(service, revision):
            return True
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(service, set()).add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
            return True
        except TimeoutError:
            return False
        finally:
            waiting = self._waiters.get(service)
            if waiting is not None:
                waiting.discard(waiter)
                if not waiting:
                    del self._waiters[service]

    def _was_lost(self, revision: int) -> bool:
        """Return whether no durable state has this revision: an observation had it, and a crash came before the disk.

        A start begins REVISION_GAP beyond the newest event (or the start before, where there was none since), so the
        revisions that states of earlier runs had are those of events, and whole gaps beyond one.
        """
        if not self._gone < revision < self._started_at:
            return False
        at = bisect.bisect_right(self._before_start, revision)
        newest = self._before_start[at - 1] if at else self._gone
        return (revision - newest) % REVISION_GAP != 0

    def _wake_confirmed(self) -> None:
        waiting, self._confirm_waiters = self._confirm_waiters, []
        for revision, waiter in waiting:
            if self.confirmed < revision:
                self._confirm_waiters.append((revision, waiter))
            elif not waiter.done():
                waiter.set_result(None)


def _size_bytes(event: Event) -> int:
    """Estimate the memory of an event: what is large are the texts that users choose."""
    lease = event.lease
    size = EVENT_BYTES + len(lease.health_note)
    if lease.metadata:
        size += sum(len(key) + len(value) for key, value in lease.metadata.items())
    if lease.tags:
        size += sum(map(len, lease.tags))
    return size
