"""Who calls, and whether a browser page of somebody else's could be behind it.

Over the unix socket the kernel's peer credentials say who it is; over loopback TCP the kernel's socket table does;
elsewhere a bearer token. What is found out about a connection holds for its life.
"""

from __future__ import annotations

import grp
import ipaddress
import pwd
import socket
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from portd.core.errors import ForbiddenOrigin, Unauthenticated
from portd.core.model import KnownBy
from portd.core.rights import Caller
from portd.leasing.seams import Peer, Peers

LOCAL_NAMES: Final = frozenset({"localhost", "ip6-localhost", "ip6-loopback"})


class Guest:
    """What is known of one connection's other end."""

    __slots__ = ("is_local", "is_unix", "peer", "pid_asked")

    def __init__(self, peer: Peer | None, *, is_local: bool, is_unix: bool) -> None:
        self.peer = peer
        self.is_local = is_local
        self.is_unix = is_unix
        self.pid_asked = False


class Gate:
    """Lets calls in. `tokens` maps hashes of the configuration's tokens to whether they are an admin's."""

    def __init__(self, peers: Peers, admin_group: str, tokens: Mapping[bytes, bool], names: Iterable[str]) -> None:
        self._peers = peers
        self._admin_gid = _gid(admin_group)
        self._admins = _members(admin_group)
        self._tokens = tokens
        self._names = LOCAL_NAMES | {name.lower() for name in names}

    def allow_host(self, name: str) -> None:
        """Accept one more name of this host in `Host` headers."""
        self._names |= {name.lower()}

    def identify(self, transport: Any) -> Guest:
        """Find out who opened a connection; called once for each."""
        connection: socket.socket = transport.get_extra_info("socket")
        if connection.family == socket.AF_UNIX:
            return Guest(self._peers.of_unix(connection), is_local=True, is_unix=True)
        local, remote = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
        if not remote or not ipaddress.ip_address(remote[0].partition("%")[0]).is_loopback:
            return Guest(None, is_local=False, is_unix=False)
        return Guest(self._peers.of_tcp(local[:2], remote[:2]), is_local=True, is_unix=False)

    def unix_caller(self, connection: socket.socket) -> Caller:
        """Return who connected over a unix socket."""
        guest = Guest(self._peers.of_unix(connection), is_local=True, is_unix=True)
        return self.caller(guest, {}, None)[0]

    async def with_pid(self, guest: Guest) -> None:
        """Find the process behind a loopback TCP connection, once: milliseconds."""
        if guest.peer is not None and guest.peer.inode and guest.peer.pid is None and not guest.pid_asked:
            guest.pid_asked = True
            guest.peer = await self._peers.with_pid(guest.peer)

    def caller(self, guest: Guest, headers: Mapping[str, str], hash_token: Any) -> tuple[Caller, bool]:
        """Return who calls, and whether that is enough to read: a local caller's word is the kernel's."""
        token_hash = None
        authorization = headers.get("Authorization")
        if authorization is not None:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer" or not token.strip():
                raise Unauthenticated("send the token as 'Authorization: Bearer TOKEN'")
            token_hash = hash_token(token.strip())
        admin_token = self._tokens.get(token_hash) if token_hash is not None else None
        peer = guest.peer
        if peer is None:
            known_by: KnownBy = "socket" if guest.is_local else "token"
            caller = Caller(known_by=known_by, admin=bool(admin_token), token_hash=token_hash)
            return caller, guest.is_local or admin_token is not None
        is_root = peer.uid == 0 and not peer.other_users
        admin = is_root or bool(admin_token) or self._admin_gid in peer.groups or peer.uid in self._admins
        caller = Caller(
            uid=peer.uid,
            pid=peer.pid,
            known_by=peer.known_by,
            admin=admin,
            token_hash=token_hash,
            other_network=peer.other_network,
        )
        return caller, True

    def check_origin(self, guest: Guest, headers: Mapping[str, str]) -> None:
        """Refuse what a page of another origin could have sent (Fetch standard), and names that are not this daemon's
        (DNS rebinding). Over a unix socket no browser speaks, and the Host header means nothing."""
        host = headers.get("Host", "")
        if not guest.is_unix and not self._is_own(host):
            raise ForbiddenOrigin(f"{host!r} is no name of this daemon: use 127.0.0.1 or localhost")
        origin = headers.get("Origin")
        if origin is not None and (guest.is_unix or _host_of(origin) != host.lower()):
            raise ForbiddenOrigin(f"a page of {origin} may not call this daemon")
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise ForbiddenOrigin("a page of another site may not call this daemon")

    def _is_own(self, host: str) -> bool:
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        if name.rstrip(".") in self._names:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _host_of(origin: str) -> str | None:
    """Return the host and port of an origin, or None for what is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _gid(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid if name else -1
    except KeyError:
        return -1  # no such group: nobody is in it


def _members(name: str) -> frozenset[int]:
    """Return the uids of a group's listed members; their processes may not carry the group yet."""
    try:
        members = grp.getgrnam(name).gr_mem if name else []
    except KeyError:
        return frozenset()
    uids = set()
    for member in members:
        try:
            uids.add(pwd.getpwnam(member).pw_uid)
        except KeyError:
            continue
    return frozenset(uids)


def user_name(uid: int) -> str | None:
    """Return a user's name, or None."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
