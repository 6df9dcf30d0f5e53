"""The entries that hosts share: their keys, their values, and how a lease becomes one and is made of one again.

    portd/v1/h/HOST                              a host
    portd/v1/f/HOST                              its fence: written with every change that the host makes
    portd/v1/s/SERVICE/HOST/INSTANCE/ENDPOINT    an endpoint of an instance, as a look-up shows it

By service first: look-ups are by service. An entry holds nothing secret. This module must not know what keeps them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta, Struct

from portd.core.bindings import ANY, ANY_V4
from portd.core.model import LABEL_PATTERN, Check, Health, Lease, Owner, PortNumber, Protocol
from portd.core.views import view_check
from portd.core.visibility import is_loopback

HOSTS: Final = "portd/v1/h/"
SERVICES: Final = "portd/v1/s/"
FENCES: Final = "portd/v1/f/"
VALUE_MAX_BYTES: Final = 64 << 10
"""The largest value that is read: tags and metadata have 16 KiB. Larger ones are not portd's."""


class Change(NamedTuple):
    """A key's new value; None deletes it."""

    key: str
    value: bytes | None


class HostEntry(Struct, frozen=True, omit_defaults=True):
    """A host. `machine` identifies the daemon's database, which distinguishes two hosts of one name; `services` are
    the numbers of published instances by service."""

    machine: str
    boot: str = ""
    address: str = ""
    version: str = ""
    services: dict[str, int] = {}


class EndpointEntry(Struct, frozen=True, omit_defaults=True):
    """An endpoint of an instance. `addresses` are those that other hosts reach, the best one first."""

    id: str
    addresses: Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)]
    port: PortNumber
    protocol: Protocol = "tcp"
    health: Health = "unknown"
    health_since: float | None = None
    drain: bool = False
    tags: tuple[str, ...] = ()
    metadata: dict[str, str] = {}
    weight: int = 1
    priority: int = 0
    check: Check | None = None
    created_at: float = 0.0


class EndpointKey(NamedTuple):
    """What an endpoint's key says."""

    service: str
    host: str
    instance: str
    endpoint: str


def host_key(host: str) -> str:
    """Return the key of a host."""
    return HOSTS + host


def fence_key(host: str) -> str:
    """Return the key of a host's fence, which nobody watches."""
    return FENCES + host


def endpoint_key(lease: Lease, host: str) -> str:
    """Return the key of a lease of `host`."""
    return f"{SERVICES}{lease.service}/{host}/{lease.instance}/{lease.endpoint}"


def service_prefix(service: str) -> str:
    """Return what the keys of a service begin with."""
    return f"{SERVICES}{service}/"


def split_key(key: str) -> EndpointKey | None:
    """Return what an endpoint's key says, None for any other key."""
    parts = key.removeprefix(SERVICES).split("/") if key.startswith(SERVICES) else []
    return EndpointKey(*parts) if len(parts) == 4 and all(map(_is_label, parts)) else None


def encode_host(entry: HostEntry) -> bytes:
    """Encode a host's value."""
    return msgspec.json.encode(entry)


def decode_host(value: bytes) -> HostEntry | None:
    """Decode a host's value; None for what is not one."""
    try:
        return _decode_host(value) if len(value) <= VALUE_MAX_BYTES * 16 else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def encode_lease(lease: Lease, advertise: Sequence[str]) -> bytes | None:
    """Encode what other hosts may know of a lease; None where they can't reach it.

    `advertise` are this host's addresses that others reach, in place of wildcard ones. A lease that nobody listens for
    is not published; one that drains or is critical is, and the reader decides.
    """
    if lease.state != "bound":
        return None
    addresses = _reachable(lease.listening or (lease.address,), advertise)
    if not addresses:
        return None
    return msgspec.json.encode(
        EndpointEntry(
            id=lease.id,
            addresses=addresses,
            port=lease.port,
            protocol=lease.protocol,
            health=lease.health,
            health_since=lease.health_since,
            drain=lease.drain,
            tags=lease.tags,
            metadata=lease.metadata,
            weight=lease.weight,
            priority=lease.priority,
            check=view_check(lease.check, whole=False),
            created_at=lease.created_at,
        )
    )


def decode_lease(key: EndpointKey, value: bytes) -> Lease | None:
    """Make the lease of another host from its entry, as look-ups read leases; None for what is not an entry."""
    if len(value) > VALUE_MAX_BYTES:
        return None
    try:
        entry = _decode_endpoint(value)
        if any(is_loopback(address) or ipaddress.ip_address(address).is_unspecified for address in entry.addresses):
            return None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return None
    return Lease(
        id=entry.id,
        service=key.service,
        instance=key.instance,
        endpoint=key.endpoint,
        protocol=entry.protocol,
        address=entry.addresses[0],
        port=entry.port,
        listening=entry.addresses,
        pool="",
        hold="none",
        state="bound",
        health=entry.health,
        health_since=entry.health_since,
        drain=entry.drain,
        lifetime="ttl",
        owner=Owner(known_by="token"),
        tags=entry.tags,
        metadata=entry.metadata,
        weight=entry.weight,
        priority=entry.priority,
        check=entry.check,
        host=key.host,
        created_at=entry.created_at,
    )


def _reachable(listening: Sequence[str], advertise: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for address in listening:
        if address == ANY:
            found += advertise
        elif address == ANY_V4:
            found += [one for one in advertise if ":" not in one]
        elif not is_loopback(address) and not ipaddress.ip_address(address).is_link_local:
            found.append(address)
    return tuple(dict.fromkeys(found))


def _is_label(text: str) -> bool:
    return _label(text) is not None


_label = re.compile(LABEL_PATTERN).match
_decode_host = msgspec.json.Decoder(HostEntry).decode
_decode_endpoint = msgspec.json.Decoder(EndpointEntry).decode
