"""The recent past, for those who follow: the newest events, and who waits for the next one.

Bounded on both sides: events beyond the kept ones are gone (a follower lists again), and a waiter is woken by a change
of the service that it waits for, by nothing else. This module must not know how events travel to followers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from portd.core.errors import RevisionGone
from portd.core.model import Event, Lease

EVENTS_KEPT: Final = 10_000
"""Events that a follower can resume over; the store keeps as many. About 5 MB when full."""
SERVICES_KEPT: Final = 100_000
"""Services whose last change is remembered; a watcher of a forgotten one is answered at once, not left to wait."""

Follower = Callable[[Event], None]
_NOBODY: dict[object, Follower] = {}


class Feed:
    """A watcher of the journal that others can watch at their own pace."""

    def __init__(self) -> None:
        self.revision = 0
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._gone = 0  # the newest revision that is no longer kept
        self._changed: OrderedDict[str, int] = OrderedDict()
        self._forgotten = 0  # the newest last change among the services that are no longer remembered
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._followers: dict[str | None, dict[object, Follower]] = {}
        self.wakeup_count = 0

    def restore(self, events: Iterable[Event], leases: Iterable[Lease], revision: int) -> None:
        """Take the past up at start; what is older than `events` is gone."""
        self._events.extend(events)
        first = self._events[0].revision if self._events else revision + 1
        self._gone = first - 1
        for lease in leases:
            self._changed[lease.service] = max(lease.revision, self._changed.get(lease.service, 0))
        for event in self._events:
            self._changed[event.lease.service] = max(event.revision, self._changed.get(event.lease.service, 0))
        self.revision = self._forgotten = revision

    def apply(self, event: Event) -> None:
        """Take the next event; tell followers, and wake those who wait for its service."""
        if len(self._events) == EVENTS_KEPT:
            self._gone = self._events[0].revision
        self._events.append(event)
        self.revision = event.revision
        service = event.lease.service
        self._changed[service] = event.revision
        self._changed.move_to_end(service)
        if len(self._changed) > SERVICES_KEPT:
            self._forgotten = max(self._forgotten, self._changed.popitem(last=False)[1])
        for waiter in self._waiters.pop(service, ()):
            if not waiter.done():
                self.wakeup_count += 1
                waiter.set_result(None)
        if self._followers:
            for wanted in (None, service):
                for follower in tuple(self._followers.get(wanted, _NOBODY).values()):
                    follower(event)

    def since(self, revision: int, service: str | None = None) -> Iterator[Event]:
        """Yield the events after a revision, oldest first.

        Raises RevisionGone at once when some of them are no longer kept, or the revision is from the future (another
        or a wiped store): list again, then follow from the revision of that answer.
        """
        if revision < self._gone or revision > self.revision:
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
        """Tell whether the service changed after the revision; True as well when that can't be known."""
        if revision > self.revision:
            return True
        changed = self._changed.get(service)
        return changed > revision if changed is not None else revision < self._forgotten

    def close(self) -> None:
        """Wake everybody who waits: the daemon stops, and they are answered with what there is."""
        for waiter in [waiter for waiting in self._waiters.values() for waiter in waiting]:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, service: str, revision: int, timeout_s: float) -> bool:
        """Wait until the service has changed after the revision, `timeout_s` seconds at most; tell whether it has."""
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
