"""What should be on the LAN: the services of leases, the leases that serve together, and the damping of flapping ones.

Whether a lease serves is `core.visibility`'s rule; how it is published, a responder's duty.
"""

from __future__ import annotations

import asyncio

from portd.adapters.mdns.zone import Service
from portd.core.model import Lease

CALM_S = 60.0
"""Withdrawals further apart than this are not flapping."""
DAMPED_S = 2.0
"""Delay of the announcement after a second withdrawal; doubled for each further one, up to DAMPED_MOST_S."""
DAMPED_MOST_S = 60.0


class Instances:
    """The live leases by service and instance: one that drains, or a critical `main`, takes all of its instance out."""

    def __init__(self) -> None:
        self._leases: dict[tuple[str, str], dict[str, Lease]] = {}

    def apply(self, lease: Lease) -> list[Lease]:
        """Replace or remove a lease; returns all of its instance, itself too if it has just ended."""
        key = lease.service, lease.instance
        leases = self._leases.setdefault(key, {})
        leases[lease.id] = lease
        current = list(leases.values())
        if lease.state == "ended":
            del leases[lease.id]
            if not leases:
                del self._leases[key]
        return current


class Damping:
    """How long a service that comes and goes waits before it is announced again (seconds of the loop's clock)."""

    def __init__(self) -> None:
        self.flap_count = 0
        self.until = 0.0
        self._last_withdrawal = -CALM_S

    def note_withdrawal(self, now: float) -> None:
        """Count a withdrawal: the first one costs nothing, each further one doubles the next announcement's delay."""
        self.flap_count = self.flap_count + 1 if now - self._last_withdrawal < CALM_S else 1
        self._last_withdrawal = now
        delay_s = min(DAMPED_S * 2 ** (self.flap_count - 2), DAMPED_MOST_S)
        self.until = now + delay_s if self.flap_count > 1 else 0.0


class Desired:
    """A service of a live lease: the name to try first, whether it should be published now, and what became of it."""

    def __init__(self, service: Service, name: str) -> None:
        self.service = service
        self.name = name
        self.is_due = False
        self.published_as: str | None = None
        self.problem: str | None = None
        self.damping = Damping()
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """Stop waiting for the end of the damping."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def announced_service(lease: Lease, name: str | None = None) -> Service:
    """Return the service that a lease announces, under its own name or another."""
    announcement = lease.announce
    assert announcement is not None
    return Service(
        id=lease.id,
        type=announcement.type,
        name=name or announcement.name,
        port=lease.port,
        txt=tuple(announcement.txt.items()),
        address=lease.address,
    )
