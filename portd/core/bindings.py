"""Bindings, and which of them exclude each other by the kernel's rules (tried against it in the tests)."""

from __future__ import annotations

from typing import Final, NamedTuple

from portd.core.model import Lease, Protocol

ANY_V4: Final = "0.0.0.0"
ANY: Final = "::"
"""Dual-stack, as servers bind it: it excludes every address of both families."""


class Binding(NamedTuple):
    """A protocol, address and port: what a lease is for, and what a socket binds."""

    protocol: Protocol
    address: str
    port: int


def overlaps(a: str, b: str, *, v6only: bool = False) -> bool:
    """Tell whether two bound addresses exclude each other on the same port.

    `v6only` says that `a` was bound with IPV6_V6ONLY: as `::` it then leaves IPv4 alone (RFC 3493 section 5.3).
    """
    if a == ANY and v6only:
        return ":" in b
    if a == b or ANY in (a, b):
        return True
    return ANY_V4 in (a, b) and ":" not in a + b


def binding_of(lease: Lease) -> Binding:
    """Return the place that a lease is on."""
    return Binding(lease.protocol, lease.address, lease.port)


def conflicts(a: Binding, b: Binding) -> bool:
    """Tell whether two places exclude each other in the kernel."""
    protocols_meet = "both" in (a.protocol, b.protocol) or a.protocol == b.protocol
    return a.port == b.port and protocols_meet and overlaps(a.address, b.address)
