"""What a caller may ask for: the types that validate a request, and from which the OpenAPI document is made.

Bounds stand here once; what depends on the configuration or on other leases is judged by the service.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from portd.core.model import Check, HoldKind, Label, PortNumber, Protocol

Tag = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
Tags = Annotated[tuple[Tag, ...], Meta(max_length=64)]
MetadataKey = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
MetadataValue = Annotated[str, Meta(max_length=512, pattern=r"^[^\x00]*\Z")]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=64)]
Ttl = Annotated[float, Meta(ge=0.1, le=31_536_000, description="seconds; a year at most, less if configured")]


class AnnounceRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A DNS-SD service to publish: without `type` and `name` they follow from the lease. RFC 6763 rules its values."""

    type: Annotated[str, Meta(max_length=255)] | None = None
    name: Annotated[str, Meta(min_length=1, max_length=63)] | None = None
    txt: Annotated[
        dict[Annotated[str, Meta(max_length=255)], Annotated[str, Meta(max_length=255)]], Meta(max_length=64)
    ] = {}


class LeaseRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A wish for one lease; only `service` is required."""

    service: Label
    instance: Label | None = None
    endpoint: Label = "main"
    protocol: Protocol = "tcp"
    address: Annotated[str, Meta(min_length=1, max_length=64)] = "127.0.0.1"
    port: PortNumber | None = None
    exact: bool = False
    adopt: bool = False
    pool: Annotated[str, Meta(min_length=1, max_length=63)] = "default"
    hold: HoldKind | None = None
    pid: Annotated[int, Meta(ge=1, le=4_194_304)] | None = None
    ttl: Ttl | None = None
    tags: Tags = ()
    metadata: Metadata = {}
    check: Check | None = None
    announce: bool | AnnounceRequest | None = None


class RenewRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`seconds` is the new period, from now on; without it the old one starts again."""

    seconds: Ttl | None = None


class TransferRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The process that a lease goes to."""

    pid: Annotated[int, Meta(ge=1, le=4_194_304)]


class DrainRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`{"drain": false}` takes a drain back."""

    drain: bool = True


class PatchRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """What is given is replaced whole; null takes a check or an announcement away."""

    tags: Tags | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET
    check: Check | UnsetType | None = UNSET
    announce: bool | AnnounceRequest | UnsetType | None = UNSET


class HealthReport(Struct, frozen=True, forbid_unknown_fields=True):
    """The result of a `report` check."""

    status: Literal["passing", "warning", "critical"]
    note: Annotated[str, Meta(max_length=4096)] = ""
