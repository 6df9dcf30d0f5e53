"""Which of several instances gets the next request: the least loaded one of the best priority.

Pure bookkeeping: this module must not know how requests travel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple


class Target(NamedTuple):
    """An instance that serves: where it is reached, and its share (as in DNS SRV, RFC 2782)."""

    instance: str
    scheme: str
    address: str
    port: int
    weight: int = 1
    priority: int = 0

    @property
    def origin(self) -> str:
        """Return the origin of the target's URLs."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.scheme}://{host}:{self.port}"


class Loads:
    """Requests under way at each target."""

    def __init__(self) -> None:
        self._active: Counter[Target] = Counter()
        self._last_used: dict[Target, int] = {}
        self._turns = count(1)

    def pick(self, targets: Sequence[Target]) -> Target:
        """Return the target with the fewest requests by weight; among equals the one that waited longest."""
        best = min(target.priority for target in targets)
        return min((target for target in targets if target.priority == best), key=self._rank)

    @contextmanager
    def use(self, target: Target) -> Iterator[None]:
        """Count a request at a target while it is under way."""
        self._active[target] += 1
        self._last_used[target] = next(self._turns)
        try:
            yield
        finally:
            self._active[target] -= 1
            if not self._active[target]:
                del self._active[target]

    def forget_unused(self, limit: int = 10_000) -> None:
        """Drop the turns of targets without requests once there are more than `limit`."""
        if len(self._last_used) > limit:
            self._last_used = {target: turn for target, turn in self._last_used.items() if target in self._active}

    def _rank(self, target: Target) -> tuple[float, int]:
        requests = self._active[target] + 1
        return (requests / target.weight if target.weight else float("inf"), self._last_used.get(target, 0))
