"""The types that validate a request, and from which the OpenAPI document is made.

Each bound is here once; what depends on the configuration or on other leases is decided by the engine.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from portd.core.errors import InvalidRequest
from portd.core.model import Check, CheckTiming, HoldKind, Label, PortNumber, Protocol

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


PortRange = Annotated[str, Meta(pattern=r"^[0-9]{1,5}(-[0-9]{1,5})?\Z", examples=["8000-8010"])]
Ports = PortNumber | PortRange | Annotated[tuple[PortNumber | PortRange, ...], Meta(min_length=1, max_length=64)]
Weight = Annotated[int, Meta(ge=0, le=65_535)]


Workspace = Annotated[str, Meta(pattern=r"^/[^\x00-\x1f\x7f]*\Z", max_length=1024)]
Branch = Annotated[str, Meta(pattern=r"^[^\x00-\x20\x7f]+\Z", max_length=255)]

DEFAULT_PROTOCOL: Final[Protocol] = "tcp"
DEFAULT_ADDRESS: Final = "127.0.0.1"
DEFAULT_POOL: Final = "default"
"""What a new lease has that its request leaves out. A static port's own address and protocol come before these."""

Value = TypeVar("Value")


def given(value: Value | UnsetType, default: Value) -> Value:
    """Return what a request gives, or the default where it leaves it out."""
    return default if isinstance(value, UnsetType) else value


class LeaseRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for one lease; only `service` is required.

    `port`: the first of these numbers that is free, else another one unless `exact`. `offset` (in an array, not in its
    first request): the port is that of the first lease plus this; all are found together. `adopt`: the lease is for the
    process that listens on the port already. `weight` and `priority` are
    those of SRV records (RFC 2782).
    """

    service: Label
    instance: Label | None = None
    endpoint: Label = "main"
    protocol: Protocol | UnsetType = UNSET
    address: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    port: Ports | None = None
    exact: bool = False
    adopt: bool = False
    offset: Annotated[int, Meta(ge=-65_534, le=65_534)] | None = None
    pool: Annotated[str, Meta(min_length=1, max_length=63)] | UnsetType = UNSET
    hold: HoldKind | None = None
    pid: Annotated[int, Meta(ge=1, le=4_194_304)] | None = None
    ttl: Ttl | None = None
    tags: Tags | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET
    weight: Weight | UnsetType = UNSET
    priority: Annotated[int, Meta(ge=0, le=65_535)] | UnsetType = UNSET
    check: Check | UnsetType | None = UNSET
    announce: bool | AnnounceRequest | UnsetType | None = UNSET
    workspace: Workspace | None = None
    branch: Branch | None = None


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


DETAILS_MAX_BYTES: Final = 16 * 1024
"""Tags and metadata of a lease together, as UTF-8: every look-up and every event carries them."""


def port_numbers(ports: Ports | None) -> tuple[int, ...]:
    """Return the requested port numbers, the preferred one first; raises InvalidRequest for a range that is none."""
    if ports is None:
        return ()
    if isinstance(ports, int):
        return (ports,)
    if isinstance(ports, str):
        first, _, last = ports.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or numbers[0] < 1 or numbers[-1] > 65_535:
            raise InvalidRequest(f"{ports!r} is not a range within 1-65535, lower bound first", pointer="/port")
        return tuple(numbers)
    return tuple(dict.fromkeys(number for each in ports for number in port_numbers(each)))


def check_details(tags: tuple[str, ...], metadata: dict[str, str]) -> None:
    """Raise InvalidRequest for tags and metadata that are too large together."""
    texts = (*tags, *metadata, *metadata.values())
    if sum(map(len, texts)) * 4 <= DETAILS_MAX_BYTES:  # at most four bytes a character
        return
    size_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size_bytes > DETAILS_MAX_BYTES:
        raise InvalidRequest(
            f"tags and metadata have {size_bytes} bytes together: at most {DETAILS_MAX_BYTES} are allowed",
            pointer="/metadata" if metadata else "/tags",
        )


def check_timing(check: Check) -> Check:
    """Return the check with a timeout within its interval; raises InvalidRequest for a longer one that was given."""
    if check.timeout <= check.interval:
        return check
    if check.timeout != CheckTiming().timeout:
        raise InvalidRequest(
            f"a check's timeout ({check.timeout:g} s) is at most its interval ({check.interval:g} s)",
            pointer="/check/timeout",
        )
    return replace(check, timeout=check.interval)
