"""Authentication of the daemon: root, the user `portd`, or this process' own user; every other user is refused.

A socket below the temporary directory, or port 7783 of a host without a daemon, can be anybody's. The kernel names the
user: SO_PEERCRED for unix sockets (unix(7)), /proc/net/tcp for listeners on loopback. Another host is authenticated by
its TLS certificate. This module decides; connecting is the callers' business.
"""

from __future__ import annotations

import _socket
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .endpoints import Endpoint

DAEMON_USER = "portd"
"""The user that the packaged system daemon runs as."""
LISTEN = "0A"
"""TCP_LISTEN in /proc/net/tcp, whose listeners come before all connections (net/ipv4/tcp_ipv4.c)."""


class UntrustedPeer(OSError):
    """Somebody else than portd listens there: nothing was sent, and nothing that it says counts."""

    def __str__(self) -> str:
        return str(self.args[0])


def is_trusted(uid: int) -> bool:
    """Return whether a user may be the daemon: root, this process' own user, or `portd`."""
    if uid in {0, os.geteuid()}:
        return True
    import pwd

    try:
        return pwd.getpwnam(DAEMON_USER).pw_uid == uid
    except KeyError:
        return False


def check_directory(endpoint: Endpoint) -> None:
    """Raise UntrustedPeer when others may have put a socket into the user's runtime directory.

    A directory that is missing is no fault: connecting reports it.
    """
    directory = endpoint.runtime_directory
    if directory and not is_private(directory, os.geteuid()):
        raise UntrustedPeer(f"{directory} is not a directory that only the user {os.geteuid()} can write")


def is_private(directory: str, uid: int) -> bool:
    """Return whether a directory is the user's, and writable by nobody else; True where it is missing."""
    try:
        found = os.lstat(directory)
    except OSError:
        return True
    return found.st_mode & 0o170022 == 0o040000 and found.st_uid == uid  # S_IFDIR, without write bits of others


def check_unix(connection: Any) -> None:
    """Raise UntrustedPeer unless a trusted user listens at the other end of a connected unix socket."""
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)  # struct ucred: pid, uid, gid
    _check(int.from_bytes(credentials[4:8], sys.byteorder))


class LoopbackCheck:
    """Checks the listener of one loopback address before and after connecting.

    Only a listener that is there at both moments can have accepted the connection; every listener of the address must
    be trusted. Other addresses are not checked: their listener is another host's.
    """

    def __init__(self, host: str, port: int) -> None:
        """Raise UntrustedPeer when somebody else listens there; OSError when /proc/net/tcp can't be read."""
        self._address = (host, port) if is_loopback(host) else None
        self._before = listeners(*self._address) if self._address else {}
        for uid in self._before.values():
            _check(uid)

    def check(self, connection: object = None) -> None:
        """Raise UntrustedPeer unless the same listeners are still there, now that the connection is made."""
        if self._address and (not self._before or listeners(*self._address) != self._before):
            raise UntrustedPeer("the listener changed while connecting")


def is_loopback(host: str) -> bool:
    """Return whether a numeric address is this host's loopback."""
    return host == "::1" or host.removeprefix("::ffff:").startswith("127.")


def listeners(host: str, port: int) -> dict[str, int]:
    """Return the uid of every TCP listener that may accept connections to a loopback address, by its inode."""
    if ":" in host and not host.startswith("::ffff:"):
        wanted = {"tcp6": {_hex(_socket.AF_INET6, host), _hex(_socket.AF_INET6, "::")}}
    else:
        plain = host.removeprefix("::ffff:")
        mapped = (f"::ffff:{plain}", "::", "::ffff:0.0.0.0")
        wanted = {
            "tcp": {_hex(_socket.AF_INET, plain), _hex(_socket.AF_INET, "0.0.0.0")},
            "tcp6": {_hex(_socket.AF_INET6, address) for address in mapped},
        }
    found: dict[str, int] = {}
    for table, addresses in wanted.items():
        try:
            with open(f"/proc/net/{table}", encoding="utf-8") as file:
                next(file)
                for line in file:
                    fields = line.split()
                    if fields[3] != LISTEN:
                        break
                    address, _, number = fields[1].partition(":")
                    if address in addresses and int(number, 16) == port:
                        found[fields[9]] = int(fields[7])
        except FileNotFoundError:
            pass  # a kernel without IPv6
    return found


def _hex(family: int, host: str) -> str:
    """Write an address as /proc/net/tcp does: 32-bit words in the host's byte order."""
    packed = _socket.inet_pton(family, host)
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)


def _check(uid: int) -> None:
    if not is_trusted(uid):
        raise UntrustedPeer(f"user {uid} listens there, not root, {DAEMON_USER} or this user")
