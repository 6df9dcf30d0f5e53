"""The host's network interfaces, as the kernel reports them by rtnetlink(7): which to use, and when they change.

A burst of changes (an interface that comes up sends five messages) becomes one call. DNS must not be known here.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from ipaddress import IPv4Interface, IPv6Interface

from msgspec import Struct

from portd.core.netlink import (
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    attributes,
    encode,
    error_code,
    messages,
)

SETTLE_S = 0.25
"""How long the kernel must be quiet before a change counts: shorter announces half-configured interfaces."""

_GETLINK, _NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _GETADDR = 18, 16, 17, 20, 21, 22
_GROUPS = 0x1 | 0x10 | 0x100
"""RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR."""
_UP, _LOOPBACK, _RUNNING, _MULTICAST = 0x1, 0x8, 0x40, 0x1000
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_SLAVE_KIND = 3, 18, 4
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_UNUSABLE_ADDRESS = 0x01 | 0x08 | 0x20 | 0x40
"""IFA_F_TEMPORARY, DADFAILED, DEPRECATED, TENTATIVE: not this host's for long, or not yet (IPv6)."""
_CONTAINERS = re.compile(r"(docker\d+|br-[0-9a-f]{12}|podman\d+|cni\d*|cni-podman\d+)\Z")
"""Bridges of container engines: their networks are not the LAN."""

_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")


class Interface(Struct, frozen=True):
    """An interface that mDNS runs on. IPv6 addresses are global ones, or link-local ones if there is no other."""

    index: int
    name: str
    ipv4: tuple[IPv4Interface, ...]
    ipv6: tuple[IPv6Interface, ...]

    @property
    def addresses(self) -> tuple[IPv4Interface | IPv6Interface, ...]:
        """Return all addresses, IPv4 first."""
        return (*self.ipv4, *self.ipv6)

    def has(self, address: str) -> bool:
        """Return whether a socket bound to `address` is reached here: a wildcard if its family has an address."""
        if address == "0.0.0.0":
            return bool(self.ipv4)
        return address == "::" or any(str(own.ip) == address for own in self.addresses)


Interfaces = dict[int, Interface]


def list_interfaces(wanted: Sequence[str] = ()) -> Interfaces:
    """List the interfaces to use: those that match `wanted` (shell patterns), by default those that lead to a LAN.

    The default excludes loopback, bridges of container engines and ports of bridges. Raises OSError.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(2.0)
        names = dict(_usable_links(kernel, wanted))
        addresses: dict[int, list[IPv4Interface | IPv6Interface]] = {index: [] for index in names}
        for index, address in _addresses(kernel):
            if index in addresses:
                addresses[index].append(address)
    return {index: _interface(index, names[index], found) for index, found in addresses.items() if found}


class InterfaceWatch:
    """Watches the interfaces. `on_change` gets all of them, and the indexes of those that were down in between."""

    def __init__(self, wanted: Sequence[str], on_change: Callable[[Interfaces, frozenset[int]], None]) -> None:
        self._wanted = wanted
        self._on_change = on_change
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._interrupted: set[int] = set()
        self.current: Interfaces = {}

    def start(self) -> None:
        """Subscribe, then list, so that no change in between is missed. Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        self._socket.bind((0, _GROUPS))
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        self.current = list_interfaces(self._wanted)

    def close(self) -> None:
        """Stop watching; may be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _read(self) -> None:
        assert self._socket is not None
        with suppress(BlockingIOError, OSError):  # ENOBUFS: messages were lost, but all interfaces are listed again
            for _ in range(64):
                for kind, _, body in messages(self._socket.recv(65536)):
                    if kind in (_NEWLINK, _DELLINK):
                        _, _, index, flags, _ = _LINK.unpack_from(body)
                        if kind == _DELLINK or not flags & _RUNNING:
                            self._interrupted.add(index)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SETTLE_S, self._settle)

    def _settle(self) -> None:
        self._timer = None
        try:
            now = list_interfaces(self._wanted)
        except OSError:
            self._timer = asyncio.get_running_loop().call_later(SETTLE_S * 4, self._settle)
            return
        interrupted, self._interrupted = frozenset(self._interrupted & now.keys()), set()
        if now != self.current or interrupted:
            self.current = now
            self._on_change(now, interrupted)


def _interface(index: int, name: str, found: list[IPv4Interface | IPv6Interface]) -> Interface:
    ipv6 = [address for address in found if isinstance(address, IPv6Interface)]
    wide = [address for address in ipv6 if not address.ip.is_link_local]
    return Interface(
        index, name, tuple(address for address in found if isinstance(address, IPv4Interface)), tuple(wide or ipv6)
    )


def _usable_links(kernel: socket.socket, wanted: Sequence[str]) -> Iterator[tuple[int, str]]:
    for body in _dump(kernel, _GETLINK, _LINK.pack(0, 0, 0, 0, 0)):
        _, _, index, flags, _ = _LINK.unpack_from(body)
        present = dict(attributes(body, _LINK.size))
        name = present[_IFLA_IFNAME].rstrip(b"\0").decode()
        if not flags & _UP or not flags & _RUNNING:
            continue
        if any(fnmatchcase(name, pattern) for pattern in wanted) if wanted else _leads_to_lan(name, flags, present):
            yield index, name


def _leads_to_lan(name: str, flags: int, present: dict[int, bytes]) -> bool:
    """Return whether to use an interface that the configuration does not name."""
    link = dict(attributes(present.get(_IFLA_LINKINFO, b"")))
    is_bridge_port = link.get(_IFLA_INFO_SLAVE_KIND, b"").rstrip(b"\0") == b"bridge"
    return bool(flags & _MULTICAST) and not flags & _LOOPBACK and not is_bridge_port and not _CONTAINERS.match(name)


def _addresses(kernel: socket.socket) -> Iterator[tuple[int, IPv4Interface | IPv6Interface]]:
    for body in _dump(kernel, _GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0)):
        family, prefix, flags, _, index = _ADDRESS.unpack_from(body)
        present = dict(attributes(body, _ADDRESS.size))
        if _IFA_FLAGS in present:
            flags = int.from_bytes(present[_IFA_FLAGS], sys.byteorder)
        packed = present.get(_IFA_LOCAL) or present.get(_IFA_ADDRESS)
        if packed is None:
            continue
        if family == socket.AF_INET:
            yield index, IPv4Interface((packed, prefix))
        elif family == socket.AF_INET6 and not flags & _UNUSABLE_ADDRESS:
            yield index, IPv6Interface((packed, prefix))


def _dump(kernel: socket.socket, kind: int, request: bytes) -> Iterator[bytes]:
    kernel.send(encode(kind, NLM_F_REQUEST | NLM_F_DUMP, request))
    while True:
        for answer, _, body in messages(kernel.recv(1 << 18)):
            if answer == NLMSG_DONE:
                return
            if answer == NLMSG_ERROR:
                raise OSError(error_code(body), "rtnetlink refused to list interfaces")
            yield body
