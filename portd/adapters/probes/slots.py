"""Slots: which of the checks that are due may start, so that those that hang delay no others.

A check occupies an *active* slot while it is young; one that has not answered after LINGER_S lingers: it waits at the
cost of a descriptor, and gives its slot up. Checks that lingered last time, or never ran, are *slow*: each user may
have a bounded number of them under way, so their waiting is paid for by their user's other slow ones alone. Users
have turns. Pure: no clock, no tasks; the prober says what starts, lingers and ends.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

LINGER_S: Final = 0.25
"""Seconds after which a check lingers: far longer than a service of this host takes, far shorter than an interval."""


class Candidate(Protocol):
    """A check: whose it is, and whether it lingered last time or never ran."""

    @property
    def user(self) -> Hashable: ...
    @property
    def is_slow(self) -> bool: ...


Item = TypeVar("Item", bound=Candidate)


class Shares(NamedTuple):
    """Bounds on checks under way: active in all and for each user, slow for each user and in all."""

    active: int
    active_of_user: int
    slow_of_user: int
    slow: int


def shares(concurrency: int) -> Shares:
    """Return the bounds for checks that connect: one that lingers costs a descriptor and 50 KB."""
    return Shares(concurrency, max(1, concurrency // 2), 4 * concurrency, 16 * concurrency)


def program_shares(concurrency: int) -> Shares:
    """Return the bounds for checks that run a program: it costs a process for as long as it runs."""
    of_user = max(2, concurrency // 4)
    active = max(2 * of_user, concurrency // 2)
    return Shares(active, of_user, of_user // 2, active // 2)


class _Running:
    __slots__ = ("is_active", "is_slow", "user")

    def __init__(self, user: Hashable, *, is_slow: bool) -> None:
        self.user = user
        self.is_slow = is_slow
        self.is_active = True


class Slots(Generic[Item]):
    """The checks that wait and those under way."""

    def __init__(self, bounds: Shares) -> None:
        self.bounds = bounds
        self._waiting: OrderedDict[Hashable, tuple[deque[Item], deque[Item]]] = OrderedDict()  # fast and slow, by user
        self._running: dict[Item, _Running] = {}
        self._active_of: Counter[Hashable] = Counter()
        self._slow_of: Counter[Hashable] = Counter()
        self._waiting_count = 0

    @property
    def waiting_count(self) -> int:
        """Return how many checks wait."""
        return self._waiting_count

    @property
    def running_count(self) -> int:
        """Return how many checks are under way, lingering ones too."""
        return len(self._running)

    def add(self, item: Item) -> None:
        """Have a check wait for its start."""
        queues = self._waiting.get(item.user)
        if queues is None:
            queues = self._waiting[item.user] = (deque(), deque())
        queues[item.is_slow].append(item)
        self._waiting_count += 1

    def next(self) -> Item | None:
        """Take out the next check that may start, and count it as under way; None when none may."""
        if self._active_of.total() >= self.bounds.active:
            return None
        for user in list(self._waiting):
            fast, slow = self._waiting[user]
            if self._active_of[user] >= self.bounds.active_of_user:
                continue
            queue = fast or (slow if self._may_start_slow(user) else None)
            if not queue:
                continue
            item = queue.popleft()
            self._waiting_count -= 1
            if fast or slow:
                self._waiting.move_to_end(user)
            else:
                del self._waiting[user]
            self._running[item] = running = _Running(user, is_slow=item.is_slow)
            self._active_of[user] += 1
            if running.is_slow:
                self._slow_of[user] += 1
            return item
        return None

    def linger(self, item: Item) -> None:
        """Count a check that has not answered within LINGER_S as slow, and free its active slot."""
        running = self._running.get(item)
        if running is not None and running.is_active:
            running.is_active = False
            _subtract(self._active_of, running.user)
            if not running.is_slow:
                running.is_slow = True
                self._slow_of[running.user] += 1

    def end(self, item: Item) -> None:
        """Count a check as no longer under way."""
        running = self._running.pop(item)
        if running.is_active:
            _subtract(self._active_of, running.user)
        if running.is_slow:
            _subtract(self._slow_of, running.user)

    def clear(self) -> None:
        """Forget those that wait."""
        self._waiting.clear()
        self._waiting_count = 0

    def _may_start_slow(self, user: Hashable) -> bool:
        return self._slow_of[user] < self.bounds.slow_of_user and self._slow_of.total() < self.bounds.slow


def _subtract(counts: Counter[Hashable], user: Hashable) -> None:
    counts[user] -= 1
    if not counts[user]:
        del counts[user]
