"""The framing of netlink messages (netlink(7)): pure functions over bytes.

Two adapters read netlink, sockets by sock_diag and interfaces by rtnetlink. They may not import each other, so what
they share is here. A library would be pyroute2: far more code than these 60 lines, for routes and firewalls too,
in every start. Which sockets and messages there are must not be known here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
"""Flags: a request; for all objects; the objects changed during the dump."""

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port id
_ATTRIBUTE: Final = struct.Struct("=HH")  # nlattr: length, type
_TYPE_MASK: Final = 0x3FFF
"""NLA_TYPE_MASK: without the flags for nested attributes and byte order."""


def encode(kind: int, flags: int, body: bytes) -> bytes:
    """Encode a request; sequence and port id are 0, for a socket that has one request in flight."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (type, flags, body) of every message of a datagram; one with an invalid length ends it."""
    at = 0
    while at + _HEADER.size <= len(data):
        size, kind, flags, _, _ = _HEADER.unpack_from(data, at)
        if size < _HEADER.size:
            return
        yield kind, flags, data[at + _HEADER.size : at + size]
        at += _aligned(size)


def error_code(body: bytes) -> int:
    """Return the errno in the body of an NLMSG_ERROR, 0 for an acknowledgement."""
    return -int(struct.unpack_from("=i", body)[0])


def attribute(kind: int, value: bytes) -> bytes:
    """Encode an attribute whose value has a multiple of 4 bytes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value


def attributes(body: bytes, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the type and value of every attribute from offset `at`; one with an invalid length ends them."""
    while at + _ATTRIBUTE.size <= len(body):
        size, kind = _ATTRIBUTE.unpack_from(body, at)
        if size < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, body[at + _ATTRIBUTE.size : at + size]
        at += _aligned(size)


def _aligned(size_bytes: int) -> int:
    return (size_bytes + 3) & ~3
