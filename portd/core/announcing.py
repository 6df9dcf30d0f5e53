"""Validates announcements: DNS-SD types, names and TXT records (RFC 6335, RFC 6763), once, at the grant.

Whether a lease is announced now is `visibility`'s rule. Multicast DNS must not be known here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

from msgspec import Struct

from portd.core.bindings import LOCALHOST
from portd.core.errors import AnnounceUnreachable, InvalidRequest
from portd.core.model import MAIN_ENDPOINT, OWN_ADDRESS, Announcement, Check, HttpCheck, Protocol
from portd.core.requests import AnnounceRequest

NAME_BYTES = 63
"""An instance name is one DNS label (RFC 6763 section 4.1.1)."""
TXT_STRING_BYTES = 255
TXT_BYTES = 1300
"""The whole TXT record; more would not fit one packet of an Ethernet (RFC 6763 section 6.2)."""

_SERVICE_NAME = re.compile(r"(?!.*--)(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?\Z")
"""RFC 6335 section 5.1: 1 to 15 letters, digits and single inner hyphens, with at least one letter."""
_LAN_TYPE = re.compile(r"([^.]{1,63}\._sub\.)?_[^.]{1,62}\._(tcp|udp)\Z")
"""Types to browse for: real LANs have some that RFC 6335 forbids."""
_TXT_KEY = re.compile(r"[\x20-\x3c\x3e-\x7e]+\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters, C1 and the two separators too: not Net-Unicode (RFC 5198 section 2)."""


class LanService(Struct, frozen=True, kw_only=True):
    """A DNS-SD service on the LAN. `ours`: it is a lease of this daemon."""

    type: str
    name: str
    host: str
    addresses: tuple[str, ...]
    port: int
    txt: dict[str, str] = {}
    ours: bool = False


class ServiceType(NamedTuple):
    """A parsed DNS-SD type: `base` is `_http._tcp`, `subtype` is `_printer` or None (RFC 6763 section 7.1)."""

    base: str
    subtype: str | None


def default_type(service: str, protocol: Protocol, check: Check | None) -> str:
    """Return the DNS-SD type of a lease that names none: `_http._tcp` with an http check, else `_SERVICE._tcp|_udp`.

    Raises InvalidRequest if the service's name is not valid by RFC 6335: then the request must name a type.
    """
    if isinstance(check, HttpCheck):
        return "_http._tcp"
    if not _SERVICE_NAME.match(service):
        raise InvalidRequest(
            f"{service!r} is not valid as a DNS-SD type (RFC 6335: at most 15 characters, at least one letter, no "
            f"double hyphen): set announce.type, for example _http._tcp",
            pointer="/announce/type",
        )
    return f"_{service}._{'udp' if protocol == 'udp' else 'tcp'}"


def parse_type(value: str) -> ServiceType:
    """Parse a type: `_http._tcp`, or `_printer._sub._http._tcp`; a trailing `.local.` is ignored.

    Raises InvalidRequest.
    """
    labels = value.lower().removesuffix(".").removesuffix(".local").split(".")
    subtype = None
    if len(labels) == 4 and labels[1] == "_sub":
        subtype, labels = labels[0], labels[2:]
        if not 1 < len(subtype.encode(errors="replace")) <= NAME_BYTES or _CONTROL.search(subtype):
            raise InvalidRequest(f"the subtype in {value!r} is not a DNS label", pointer="/announce/type")
    service, protocol = labels[0], labels[-1]
    if len(labels) != 2 or protocol not in ("_tcp", "_udp") or not service.startswith("_"):
        raise InvalidRequest(
            f"{value!r} is not a DNS-SD type: write it like _http._tcp or _printer._sub._http._tcp",
            pointer="/announce/type",
        )
    if not _SERVICE_NAME.match(service[1:]):
        raise InvalidRequest(
            f"{service!r} is not a service name (RFC 6335: at most 15 letters, digits and single hyphens, with at "
            f"least one letter)",
            pointer="/announce/type",
        )
    return ServiceType(f"{service}.{protocol}", subtype)


def check_type(value: str) -> str:
    """Return the type in its canonical form (lower case, without `.local.`); raises InvalidRequest."""
    base, subtype = parse_type(value)
    return f"{subtype}._sub.{base}" if subtype else base


def check_lan_type(value: str) -> str:
    """Return a type to browse for in its canonical form; raises InvalidRequest if it can't be one."""
    type_ = value.lower().removesuffix(".").removesuffix(".local")
    if not _LAN_TYPE.match(type_) or not _encodable(type_):
        raise InvalidRequest(f"{value!r} is not a DNS-SD type: write it like _http._tcp", pointer="/type")
    return type_


def check_name(value: str) -> str:
    """Return an instance name in NFC; raises InvalidRequest unless it is 1 to 63 bytes without control characters."""
    name = unicodedata.normalize("NFC", value)
    size_bytes = len(name.encode("utf-8", "replace"))
    if not 0 < size_bytes <= NAME_BYTES:
        raise InvalidRequest(
            f"an instance name is 1 to {NAME_BYTES} bytes of UTF-8, not {size_bytes}", pointer="/announce/name"
        )
    if has_control_characters(name) or not _encodable(name):
        raise InvalidRequest(
            "an instance name must not contain control characters (RFC 6763 section 4.1.1)", pointer="/announce/name"
        )
    return name


def has_control_characters(text: str) -> bool:
    """Return whether a name has characters that Net-Unicode excludes (RFC 5198 section 2): C0, C1, separators."""
    return _CONTROL.search(text) is not None


def check_txt(value: Mapping[str, str], *, service: str, instance: str) -> dict[str, str]:
    """Return the TXT pairs with `service` and `instance` in front (RFC 6763 section 6); raises InvalidRequest.

    A request may repeat these two, as when it sends back what it read, but not change them.
    """
    pairs = {"service": service, "instance": instance}
    seen = set(pairs)
    for key, text in value.items():
        pointer = f"/announce/txt/{key.replace('~', '~0').replace('/', '~1')}"
        if not _TXT_KEY.match(key):
            raise InvalidRequest("a TXT key must be printable ASCII without '='", pointer=pointer)
        if not _encodable(text) or len(f"{key}={text}".encode()) > TXT_STRING_BYTES:
            raise InvalidRequest(f"'key=value' is at most {TXT_STRING_BYTES} bytes of UTF-8", pointer=pointer)
        if pairs.get(key) == text:
            continue
        if key.lower() in seen:
            raise InvalidRequest(
                "TXT keys must differ by more than case, and 'service' and 'instance' are set by portd", pointer=pointer
            )
        seen.add(key.lower())
        pairs[key] = text
    size_bytes = sum(1 + len(f"{key}={text}".encode()) for key, text in pairs.items())
    if size_bytes > TXT_BYTES:
        raise InvalidRequest(f"a TXT record is at most {TXT_BYTES} bytes, not {size_bytes}", pointer="/announce/txt")
    return pairs


def resolve(
    request: bool | AnnounceRequest | None,
    *,
    service: str,
    instance: str,
    endpoint: str,
    protocol: Protocol,
    address: str,
    check: Check | None,
) -> Announcement | None:
    """Return the announcement of a lease from its request; None if the request has none.

    Raises InvalidRequest for an invalid field, AnnounceUnreachable for an address that other hosts can't reach.
    """
    if request is None or request is False:
        return None
    if not reachable(address):
        raise AnnounceUnreachable(
            f"{address} can be reached from this host only: to announce the lease, set 'address' to an address of "
            f"the LAN, 0.0.0.0 or ::",
            pointer="/address",
        )
    given = AnnounceRequest() if request is True else request
    default_name = instance if endpoint == MAIN_ENDPOINT else f"{instance} {endpoint}"[:NAME_BYTES].rstrip()
    return Announcement(
        type=check_type(given.type) if given.type is not None else default_type(service, protocol, check),
        name=check_name(given.name if given.name is not None else default_name),
        txt=check_txt(given.txt, service=service, instance=instance),
    )


def is_same(one: Announcement | None, other: Announcement | None) -> bool:
    """Return whether two announcements request the same, whatever became of them on the LAN."""
    if one is None or other is None:
        return one is other
    return (one.type, one.name, one.txt) == (other.type, other.name, other.txt)


def reachable(address: str) -> bool:
    """Return whether other hosts can reach the address: not a loopback one, and not `own`."""
    if address in (OWN_ADDRESS, LOCALHOST):
        return False
    parsed = ip_address(address)
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return not parsed.is_loopback


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return False
    return True
