"""Bindings, and which of them exclude each other by the kernel's rules (tried against it in the tests)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import ip_address
from typing import Final, NamedTuple

from portd.core.model import Lease, Listener, Protocol

LOCALHOST: Final = "localhost"
"""The address of a lease on both loopback addresses: programs resolve the name to either."""
LOCALHOST_ADDRESSES: Final = ("127.0.0.1", "::1")
ANY_V4: Final = "0.0.0.0"
ANY: Final = "::"
"""Dual-stack, as servers bind it: it excludes every address of both families."""


class Binding(NamedTuple):
    """A protocol, address and port: what a lease is for, and what a socket binds."""

    protocol: Protocol
    address: str
    port: int


def overlaps(a: str, b: str, *, v6only: bool = False) -> bool:
    """Return whether two bound addresses exclude each other on the same port.

    `v6only` says that `a` was bound with IPV6_V6ONLY: as `::` it then leaves IPv4 alone (RFC 3493 section 5.3).
    """
    if LOCALHOST in (a, b):
        return any(overlaps(one, other, v6only=v6only) for one in addresses_of(a) for other in addresses_of(b))
    if a == ANY and v6only:
        return ":" in b
    if a == b or ANY in (a, b):
        return True
    return ANY_V4 in (a, b) and ":" not in a + b


def ranges_of(ports: Iterable[int]) -> tuple[str, ...]:
    """Write ascending ports as ranges: `20000-29999`, or `80` for one alone."""
    runs: list[list[int]] = []
    for port in ports:
        if runs and runs[-1][1] == port - 1:
            runs[-1][1] = port
        else:
            runs.append([port, port])
    return tuple(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def addresses_of(address: str) -> tuple[str, ...]:
    """Return the addresses that a lease's address stands for: two for `localhost`, else itself."""
    return LOCALHOST_ADDRESSES if address == LOCALHOST else (address,)


@lru_cache(maxsize=4096)
def is_loopback(address: str) -> bool:
    """Return whether an address is one of this host's loopback addresses, or `localhost`."""
    return address == LOCALHOST or ip_address(address).is_loopback


def conflicts_at(listener: Listener, lease: Lease) -> bool:
    """Return whether a listener is at the lease's own protocol and address; both are on the same number."""
    return listener.protocol in lease.protocols and overlaps(listener.address, lease.address, v6only=listener.v6only)


def binding_of(lease: Lease) -> Binding:
    """Return the binding of a lease."""
    return Binding(lease.protocol, lease.address, lease.port)


def conflicts(a: Binding, b: Binding) -> bool:
    """Return whether two bindings exclude each other in the kernel."""
    same_protocol = "both" in (a.protocol, b.protocol) or a.protocol == b.protocol
    return a.port == b.port and same_protocol and overlaps(a.address, b.address)
