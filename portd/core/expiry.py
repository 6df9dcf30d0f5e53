"""Deadlines: which key is due next, on the lease clock.

A deadline that moves (a renewal) costs a dictionary write and no search: the heap keeps the stale entry until it
comes up. Ticks come from outside; this module knows no clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Deadlines(Generic[Key]):
    """A set of keys, each with one deadline in ticks (seconds on the lease clock)."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._order = 0  # breaks ties, so that keys are never compared

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, key: Key) -> bool:
        return key in self._due

    def set(self, key: Key, tick: float) -> None:
        """Give the key this deadline, later or earlier than the one that it had."""
        before = self._due.get(key)
        self._due[key] = tick
        if before is None or tick < before:  # a later deadline is found out when the old entry comes up
            self._push(tick, key)

    def discard(self, key: Key) -> None:
        """Forget the key; nothing happens when it has no deadline."""
        self._due.pop(key, None)
        if not self._due:
            self._heap.clear()

    def at(self, key: Key) -> float | None:
        """Return the key's deadline, or None when it has none."""
        return self._due.get(key)

    def next_tick(self) -> float | None:
        """Return the earliest deadline, or None when there is none."""
        while self._heap:
            tick, _, key = self._heap[0]
            due = self._due.get(key)
            if due == tick:
                return tick
            heapq.heappop(self._heap)
            if due is not None and due > tick:
                self._push(due, key)
        return None

    def pop_due(self, tick: float) -> list[Key]:
        """Take out every key whose deadline is at or before `tick`, earliest first."""
        due = []
        while (first := self.next_tick()) is not None and first <= tick:
            key = heapq.heappop(self._heap)[2]
            del self._due[key]
            due.append(key)
        return due

    def _push(self, tick: float, key: Key) -> None:
        self._order += 1
        heapq.heappush(self._heap, (tick, self._order, key))
