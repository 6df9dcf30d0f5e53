"""What a request changes about a live lease: the fields that a caller may replace, and the rules that they obey."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from portd.core import announcing, health
from portd.core.errors import LeaseDiffers
from portd.core.model import OWN_ADDRESS, Lease
from portd.core.requests import (
    DEFAULT_ADDRESS,
    DEFAULT_PROTOCOL,
    LeaseRequest,
    PatchRequest,
    check_details,
    check_timing,
    port_numbers,
)


def replaced_fields(lease: Lease, request: PatchRequest | LeaseRequest, at: float) -> dict[str, Any]:
    """Return the fields of the lease that the request gives and that change by it; raises the Refusal of a bad one.

    `at` is the time of the change, in epoch seconds.
    """
    fields: dict[str, Any] = {}
    if request.tags is not UNSET:
        fields["tags"] = request.tags
    if request.metadata is not UNSET:
        fields["metadata"] = request.metadata
    check_details(fields.get("tags", lease.tags), fields.get("metadata", lease.metadata))
    if isinstance(request, LeaseRequest) and request.weight is not UNSET:
        fields["weight"] = request.weight
    if request.check is not UNSET:
        check = fields["check"] = None if request.check is None else check_timing(request.check)
        if check != lease.check:
            fields |= health.when_check_changes(lease, check, at)
    if request.announce is not UNSET:
        announce = announcing.resolve(
            request.announce,
            service=lease.service,
            instance=lease.instance,
            endpoint=lease.endpoint,
            protocol=lease.protocol,
            address=lease.address,
            check=fields.get("check", lease.check),
        )
        if not announcing.is_same(announce, lease.announce):
            fields["announce"] = announce
    return {name: value for name, value in fields.items() if getattr(lease, name) != value}


def check_same(lease: Lease, request: LeaseRequest, address: str | None) -> None:
    """Raise LeaseDiffers where the request gives something else than the lease has, beyond what may be replaced.

    `address` is the requested one in its normal form, None where the request has none. What is not given does not
    differ; nor does a port that is not `exact`: another one was granted for it. A static port has its own protocol and
    address where a request gives the defaults.
    """
    is_static = lease.lifetime == "static"
    ports = port_numbers(request.port)
    differing = {
        "protocol": request.protocol not in (UNSET, lease.protocol)
        and not (is_static and request.protocol == DEFAULT_PROTOCOL),
        "address": not _has_address(lease, request, address),
        "port": request.exact and lease.port not in ports,
        "pool": request.pool not in (UNSET, lease.pool),
        "hold": request.hold not in (None, lease.hold),
        "ttl": request.ttl is not None and request.ttl != lease.ttl,
        "priority": request.priority not in (UNSET, lease.priority),
    }
    for field, differs in differing.items():
        if differs:
            raise LeaseDiffers(
                f"instance {lease.instance!r} (endpoint {lease.endpoint}) is leased with another {field}: release the "
                f"lease {lease.id} first, or request what it has",
                pointer=f"/{field}",
            )


def _has_address(lease: Lease, request: LeaseRequest, address: str | None) -> bool:
    if address is None or request.adopt:  # an adopted lease has its listener's address
        return True
    if address == OWN_ADDRESS:
        return lease.own_address
    return address == lease.address or (lease.lifetime == "static" and address == DEFAULT_ADDRESS)
