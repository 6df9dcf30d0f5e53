"""Caller authentication, and protection from CSRF and DNS rebinding.

Over a unix socket the kernel's peer credentials identify the caller; over loopback TCP the kernel's socket table does;
elsewhere a bearer token of the configuration. What the kernel says of a connection holds for that connection's life;
membership of the admin group is read for each new connection.
"""

from __future__ import annotations

import grp
import ipaddress
import logging
import pwd
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from portd.core.errors import ForbiddenOrigin, Unauthenticated
from portd.core.rights import Caller
from portd.leasing.seams import Peer, Peers

logger = logging.getLogger(__name__)

LOCAL_NAMES: Final = frozenset({"localhost", "ip6-localhost", "ip6-loopback"})
WRONG_TOKEN_DELAY_S: Final = 1.0
"""Seconds that the answer to a wrong token is delayed: one connection tries one token a second."""
WRONG_TOKEN_LOG_S: Final = 10.0
"""Seconds between two log lines about wrong tokens; the line says how many there were."""


class Token(NamedTuple):
    """A bearer token of the configuration. `name` is its user for names and quotas, None where it has no name."""

    admin: bool = False
    name: str | None = None


class ConnectionPeer:
    """The other end of one connection.

    `peer` is None where the kernel does not know it: another host, or a loopback connection whose opener has closed
    it. `is_member` of the admin group is settled when the connection is made. `user` is whose share of connections and
    answers it uses: a uid, or the address of another host.
    """

    __slots__ = ("address", "is_local", "is_member", "is_unix", "local_address", "peer", "pid_requested")

    def __init__(
        self,
        peer: Peer | None,
        *,
        is_local: bool,
        is_unix: bool,
        is_member: bool = False,
        address: str = "",
        local_address: str = "",
    ) -> None:
        self.peer = peer
        self.is_local = is_local
        self.is_unix = is_unix
        self.is_member = is_member
        self.address = address
        self.local_address = local_address
        self.pid_requested = False

    @property
    def user(self) -> int | str:
        """Return whose share of the daemon this connection uses."""
        return self.peer.uid if self.peer is not None else self.address

    @property
    def needs_process(self) -> bool:
        """Return whether the process behind the connection is still to be found."""
        return self.peer is not None and bool(self.peer.inode) and self.peer.pid is None and not self.pid_requested


class Authenticator:
    """Identifies callers. `tokens` maps the hash of each token of the configuration to what it gives.

    `names` are the host names and addresses that a Host header may have beside the loopback ones.
    """

    def __init__(
        self,
        peers: Peers,
        admin_group: str,
        tokens: Mapping[bytes, Token],
        names: Iterable[str],
        hash_token: Callable[[str], bytes],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers = peers
        self._admin_group = admin_group
        self._tokens = tokens
        self._names = LOCAL_NAMES | {name.lower() for name in names}
        self._hash_token = hash_token
        self._monotonic = monotonic
        self.wrong_token_count = 0
        self._logged_at = -WRONG_TOKEN_LOG_S
        self._logged_count = 0

    def allow_host(self, name: str) -> None:
        """Accept one more name of this host in `Host` headers."""
        self._names |= {name.lower()}

    def identify(self, transport: Any) -> ConnectionPeer:
        """Find out who opened a connection; called once for each.

        Raises OSError when the connection is gone already.
        """
        connection: socket.socket = transport.get_extra_info("socket")
        if connection.family == socket.AF_UNIX:
            return self._unix_peer(connection)
        local, remote = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
        local_address = local[0].partition("%")[0] if local else ""
        address = remote[0].partition("%")[0] if remote else ""
        if not address or not ipaddress.ip_address(address).is_loopback:
            return ConnectionPeer(None, is_local=False, is_unix=False, address=address, local_address=local_address)
        peer = self._peers.of_tcp(local[:2], remote[:2])
        return ConnectionPeer(
            peer,
            is_local=True,
            is_unix=False,
            is_member=_is_member(peer, self._admin_group),
            address=address,
            local_address=local_address,
        )

    def unix_caller(self, connection: socket.socket) -> Caller:
        """Return the caller at the other end of a unix socket."""
        return self.caller(self._unix_peer(connection), {})

    def tcp_caller(self, transport: Any, headers: Mapping[str, str]) -> Caller:
        """Return the caller at the other end of a loopback TCP connection.

        Raises ForbiddenOrigin for what a web page could have sent, OSError when the connection is gone already.
        """
        end = self.identify(transport)
        self.check_origin(end, headers)
        return self.caller(end, {})

    async def process_caller(self, transport: Any) -> Caller:
        """Return the caller at the other end of a loopback TCP connection with its process: milliseconds."""
        end = self.identify(transport)
        await self.find_process(end)
        return self.caller(end, {})

    async def find_process(self, end: ConnectionPeer) -> None:
        """Find the process behind a loopback TCP connection, once: milliseconds."""
        if end.peer is not None and end.needs_process:
            end.pid_requested = True
            with suppress(OSError):  # at the file limit: the process stays unknown
                end.peer = await self._peers.with_pid(end.peer)

    def caller(self, end: ConnectionPeer, headers: Mapping[str, str]) -> Caller:
        """Return the caller of a request, as far as the kernel and the Authorization header identify it.

        Raises Unauthenticated for an Authorization header of another form than `Bearer TOKEN` (RFC 6750).
        """
        token_hash = None
        authorization = headers.get("Authorization")
        if authorization is not None:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer" or not token.strip():
                raise Unauthenticated("the Authorization header must be 'Bearer TOKEN'")
            token_hash = self._hash_token(token.strip())
        token_rights = self._tokens.get(token_hash) if token_hash is not None else None
        by_token = token_rights is not None and token_rights.admin
        peer = end.peer
        if peer is None:
            name = token_rights.name if token_rights is not None else None
            return Caller(
                known_by="socket" if end.is_local else "token",
                admin=by_token,
                token_hash=token_hash,
                token_name=name,
                is_known=token_rights is not None,
            )
        return Caller(
            uid=peer.uid,
            pid=peer.pid,
            known_by=peer.known_by,
            admin=(peer.uid == 0 and not peer.other_users) or end.is_member or by_token,
            token_hash=token_hash,
            other_network=peer.other_network,
        )

    def check_origin(self, end: ConnectionPeer, headers: Mapping[str, str]) -> None:
        """Refuse what a page of another origin could have sent (Fetch standard), and a Host that is not this daemon's
        (DNS rebinding). No browser speaks over a unix socket, and the Host header means nothing there."""
        host = headers.get("Host", "")
        if not end.is_unix and not self._is_own(host, end.local_address):
            raise ForbiddenOrigin(f"Host {host[:200]!r} is not a name of this daemon: use 127.0.0.1 or localhost")
        origin = headers.get("Origin")
        if origin is not None and (end.is_unix or _host_of(origin) != host.lower()):
            raise ForbiddenOrigin(f"pages of the origin {origin[:200]!r} may not call this daemon")
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise ForbiddenOrigin("pages of another site may not call this daemon")

    def shows_unknown_token(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request shows a token that is none of the configuration's: a lease's, or a guess."""
        authorization = headers.get("Authorization")
        if authorization is None:
            return False
        return self._hash_token(authorization.partition(" ")[2].strip()) not in self._tokens

    def report_wrong_token(self, end: ConnectionPeer) -> None:
        """Count a token that gave no right, and log it at most once in WRONG_TOKEN_LOG_S seconds."""
        self.wrong_token_count += 1
        now = self._monotonic()
        if now - self._logged_at < WRONG_TOKEN_LOG_S:
            return
        who = f"uid {end.peer.uid}" if end.peer is not None else end.address or "an unknown address"
        count = self.wrong_token_count - self._logged_count
        logger.warning("rejected %d requests with a wrong token, the last one from %s", count, who)
        self._logged_at, self._logged_count = now, self.wrong_token_count

    def _unix_peer(self, connection: socket.socket) -> ConnectionPeer:
        peer = self._peers.of_unix(connection)
        return ConnectionPeer(peer, is_local=True, is_unix=True, is_member=_is_member(peer, self._admin_group))

    def _is_own(self, host: str, local_address: str) -> bool:
        name = _name_of(host.lower())
        if name is None:
            return False
        if name.rstrip(".") in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or str(address) == local_address


def _name_of(host: str) -> str | None:
    """Return the name or address in a Host header (RFC 9110, 7.2), None for what is not one."""
    if host.startswith("["):
        name, closed, rest = host[1:].partition("]")
        is_valid = bool(closed) and (not rest or (rest[0] == ":" and _is_port(rest[1:])))
        return name if is_valid and ":" in name else None
    name, colon, port = host.partition(":")
    return name if not colon or _is_port(port) else None


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5


def _host_of(origin: str) -> str | None:
    """Return the host and port of an origin, None for what is not one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _is_member(peer: Peer | None, group: str) -> bool:
    """Return whether a peer is in a group: its process has the group, or the group database lists its user now."""
    if peer is None or not group:
        return False
    try:
        entry = grp.getgrnam(group)
    except KeyError:
        return False  # no such group: it has no members
    if entry.gr_gid in peer.groups:
        return True
    try:
        return pwd.getpwuid(peer.uid).pw_name in entry.gr_mem
    except KeyError:
        return False


def user_name(uid: int) -> str | None:
    """Return a user's name, or None."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
