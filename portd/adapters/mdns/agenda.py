"""When the timers of claims fire. Pure: the caller has the clock."""

from __future__ import annotations

from portd.adapters.mdns.zone import Claim


class Agenda:
    """Claims by when their timers fire; those that fire together share a bucket, so there are few buckets."""

    def __init__(self) -> None:
        self._buckets: dict[float, dict[Claim, None]] = {}

    @property
    def first(self) -> float | None:
        """Return the earliest time, None when nothing is scheduled."""
        return min(self._buckets, default=None)

    def set(self, claim: Claim, due: float | None) -> None:
        """Schedule a claim, at this time alone; None: not at all."""
        if claim.due is not None:
            bucket = self._buckets[claim.due]
            del bucket[claim]
            if not bucket:
                del self._buckets[claim.due]
        claim.due = due
        if due is not None:
            self._buckets.setdefault(due, {})[claim] = None

    def pop(self, now: float, limit: int) -> list[Claim]:
        """Unschedule and return at most `limit` claims that are due, earliest first."""
        due: list[Claim] = []
        for at in sorted(at for at in self._buckets if at <= now):
            due += list(self._buckets[at])[: limit - len(due)]
        for claim in due:
            self.set(claim, None)
        return due
