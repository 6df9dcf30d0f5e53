"""Which instances a caller is given: the ones that work."""

from __future__ import annotations

from collections.abc import Iterable

from portd.core.model import Lease


def serving(leases: Iterable[Lease]) -> list[Lease]:
    """Pick the leases of one endpoint that callers may be sent to.

    Undrained and passing; where none of them has a check nobody can tell, and all undrained ones serve, but never one
    whose port a foreign process holds.
    """
    candidates = [lease for lease in leases if not lease.drain and lease.state not in ("ended", "conflict")]
    if any(lease.check is not None for lease in candidates):
        return [lease for lease in candidates if lease.health == "passing"]
    return candidates
