"""Who is given to callers, and at which address: one rule for HTTP, DNS, mDNS, Prometheus, the gateway and the cluster.

An instance, a name on one host, counts for itself: nothing that another one does or lacks takes it out. Its endpoints
are one thing: a drained one, or a critical check of `main`, takes all of them out. This module must not know the
protocols of callers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, Literal

from portd.core.bindings import ANY, ANY_V4
from portd.core.model import MAIN_ENDPOINT, Lease

WhenAllCritical = Literal["none", "all"]
"""What is given when no instance of a service serves and some are critical: nothing, or the critical ones (Envoy's
panic routing): a wrong check then costs no outage."""

SERVING_HEALTH: Final = frozenset({"passing", "warning"})
LOCALHOST: Final = "localhost"
LOOPBACK_V4, LOOPBACK_V6 = "127.0.0.1", "::1"
_LOCAL: Final[dict[str, tuple[str, ...]]] = {
    ANY_V4: (LOOPBACK_V4,),
    ANY: (LOOPBACK_V6, LOOPBACK_V4),
    LOCALHOST: (LOOPBACK_V4, LOOPBACK_V6),
}


def serving(leases: Iterable[Lease], when_all_critical: WhenAllCritical = "none") -> list[Lease]:
    """Pick, from all leases of one service, those that callers are given.

    A lease is given if it is bound, none of its instance's endpoints drains, and its check, if it has one, is
    `passing` or `warning`; a critical check of `main` counts for all endpoints of its instance. `when_all_critical`
    applies to each endpoint name for itself.
    """
    present = [lease for lease in leases if lease.state == "bound"]
    draining: set[tuple[str, str]] = set()
    critical: set[tuple[str, str]] = set()
    for lease in present:
        if lease.drain:
            draining.add((lease.host, lease.instance))
        if lease.endpoint == MAIN_ENDPOINT and _is_critical(lease):
            critical.add((lease.host, lease.instance))
    undrained = [one for one in present if (one.host, one.instance) not in draining] if draining else present
    found = [one for one in undrained if is_healthy(one) and not (critical and (one.host, one.instance) in critical)]
    if when_all_critical == "all" and len(found) < len(undrained):
        served = {lease.endpoint for lease in found}
        found += [
            lease
            for lease in undrained
            if lease.endpoint not in served and ((lease.host, lease.instance) in critical or _is_critical(lease))
        ]
    return found


def is_healthy(lease: Lease) -> bool:
    """Return whether the lease's own check, if it has one, lets callers in. A check without a result yet does not."""
    return lease.check is None or lease.health in SERVING_HEALTH


def _is_critical(lease: Lease) -> bool:
    return lease.check is not None and lease.health == "critical"


def reachable_at(lease: Lease, asked_at: str | None = None) -> tuple[str, ...]:
    """Return the addresses at which a caller reaches the lease, the best one first; none where it can't be reached.

    `asked_at` None is a caller on this host; else it is the address of the interface at which a caller on another host
    asked: where the lease listens on all addresses, that one is certain to be reachable. Loopback addresses are never
    given to another host.
    """
    found: list[str] = []
    for address in lease.listening or (lease.address,):
        if asked_at is None:
            found += _LOCAL.get(address, (address,))
        elif address == ANY or (address == ANY_V4 and ":" not in asked_at):
            found.append(asked_at)
        elif address != ANY_V4 and not is_loopback(address):
            found.append(address)
    best = lease.address if asked_at is None else asked_at
    return tuple(sorted(dict.fromkeys(found), key=lambda address: address != best))


@lru_cache(maxsize=1024)
def is_loopback(address: str) -> bool:
    """Return whether an address (or `localhost`) is reached from this host alone."""
    if address == LOCALHOST:
        return True
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback
