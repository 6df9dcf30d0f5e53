"""Header rules of the gateway: what passes, what is added, and when a request has gone round in a loop.

Pure functions of headers (RFC 9110 section 7.6, RFC 7239 for the idea of X-Forwarded-*).
"""

from __future__ import annotations

import ipaddress
from typing import Final

from multidict import CIMultiDict, CIMultiDictProxy

HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers of one connection alone."""
FORWARDED: Final = ("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "Forwarded")
PSEUDONYM: Final = "portd-gateway"
"""This gateway in `Via`."""
HOPS_MAX: Final = 5
"""Passages of one request through the gateway. Services that call each other by name need one each; a dev server that
proxies to its own name with the `Host` that it got loops, and stops here."""

Headers = CIMultiDict[str] | CIMultiDictProxy[str]


def is_loop(headers: Headers) -> bool:
    """Return whether a request has passed the gateway too often."""
    passed = ",".join(headers.getall("Via", ()))
    return sum(part.split()[-1:] == [PSEUDONYM] for part in passed.split(",")) >= HOPS_MAX


def end_to_end(headers: Headers) -> CIMultiDict[str]:
    """Return the headers that a proxy passes on, in their order: no hop-by-hop ones, none that `Connection` names."""
    named = {word.strip().lower() for line in headers.getall("Connection", ()) for word in line.split(",")}
    dropped = HOP_BY_HOP | named
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in dropped)


def to_service(headers: Headers, peer: str, host: str) -> CIMultiDict[str]:
    """Return the headers of the request to the service.

    `Host` stays as the client sent it. A peer on loopback may be a proxy in front (Caddy), so what it says of the
    client is kept; anybody else's X-Forwarded-* are dropped.
    """
    made = end_to_end(headers)
    made.popall("Expect", None)
    if not is_loopback(peer):
        for name in FORWARDED:
            made.popall(name, None)
    before = made.popall("X-Forwarded-For", [])
    made["X-Forwarded-For"] = ", ".join([*before, peer])
    made.setdefault("X-Forwarded-Host", host)
    made.setdefault("X-Forwarded-Proto", "http")
    made.add("Via", f"1.1 {PSEUDONYM}")
    return made


def is_websocket(method: str, headers: Headers) -> bool:
    """Return whether a request opens a websocket (RFC 6455 section 4.2.1)."""
    upgrades = ",".join(headers.getall("Upgrade", ())).lower().split(",")
    return method == "GET" and "websocket" in (word.strip() for word in upgrades)


def is_loopback(address: str) -> bool:
    """Return whether a peer's address is one of this host alone."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
