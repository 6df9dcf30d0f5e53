"""Shares: how many of a scarce thing all callers may use at once, and how many one user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from portd.core.errors import Busy


class Shares:
    """Counts who uses how many `things` (a plural noun, for messages) at the moment."""

    def __init__(self, things: str, *, total: int, per_user: int) -> None:
        self._things = things
        self._total = total
        self._per_user = per_user
        self._used: Counter[int | str | None] = Counter()

    def __len__(self) -> int:
        return self._used.total()

    @contextmanager
    def use(self, user: int | str | None) -> Iterator[None]:
        """Use one while the context is open; raises Busy where this user, or all together, have too many."""
        if self._used[user] >= self._per_user:
            raise Busy(f"this user has {self._per_user} {self._things} already: end one first")
        if len(self) >= self._total:
            raise Busy(f"there are {self._total} {self._things} already")
        self._used[user] += 1
        try:
            yield
        finally:
            self._used[user] -= 1
            if not self._used[user]:
                del self._used[user]
