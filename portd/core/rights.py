"""Who may do what, as pure functions of a caller that has been identified already."""

from __future__ import annotations

import hmac
from hashlib import sha256

from msgspec import Struct

from portd.core.errors import NotOwner, Unauthenticated
from portd.core.model import KnownBy, Lease


class Caller(Struct, frozen=True, gc=False, kw_only=True):
    """Who makes a request.

    `uid` and `pid` are None where the kernel does not know them (another host, another pid namespace). `admin`: root, a
    member of the admin group, or a bearer of an admin token. `token_hash` is the hash of the token that the caller
    showed, or None; `token_name` is the name of that token where it is one of the configuration. `is_known` is False
    for a caller whom neither the kernel nor a token of the configuration identifies. `other_network`: the caller's
    process is in another network namespace, or that is not known: it gets no port and no socket of this host.
    """

    uid: int | None = None
    pid: int | None = None
    known_by: KnownBy = "token"
    admin: bool = False
    token_hash: bytes | None = None
    token_name: str | None = None
    other_network: bool = False
    is_known: bool = True

    @property
    def user(self) -> int | str | None:
        """Return the user for names and quotas: a uid, or `token:NAME` for a token of the configuration."""
        return self.uid if self.token_name is None or self.uid is not None else f"token:{self.token_name}"


def hash_token(token: str) -> bytes:
    """Hash a token for storing and comparing; it is long and random, so a fast hash is a safe one."""
    return sha256(token.encode("utf-8", "surrogateescape")).digest()


def check_change(caller: Caller, lease: Lease) -> None:
    """Let pass who may change the lease: the lease's uid, whoever shows its token, and admins.

    Raises Unauthenticated for an anonymous caller, NotOwner for any other user.
    """
    if caller.admin or (caller.uid is not None and caller.uid == lease.uid):
        return
    if caller.token_hash is not None and hmac.compare_digest(caller.token_hash, lease.token_hash):
        return
    if caller.uid is None and caller.token_hash is None:
        raise Unauthenticated(
            "the caller can't be identified over this connection: "
            "send the lease's token as 'Authorization: Bearer TOKEN'"
        )
    user = f"{lease.owner.user} " if lease.owner.user is not None and lease.owner.uid == lease.uid else ""
    holder = f"{user}(uid {lease.uid})" if lease.uid is not None else "a token"
    raise NotOwner(
        f"lease {lease.id} ({lease.instance}, port {lease.port}) belongs to {holder}: send its token to change it"
    )


def sees_process(caller: Caller, uid: int | None) -> bool:
    """Return whether the caller may see the executable and the command line of a process of this uid.

    As for the kernel, they are its user's and root's: a path may be private, and a command line may hold secrets.
    """
    return caller.admin or (caller.uid is not None and caller.uid == uid)


def sees_check(caller: Caller, lease: Lease) -> bool:
    """Return whether the caller may see what may hold secrets in a lease's check: whoever may change the lease."""
    if caller.token_hash is not None and hmac.compare_digest(caller.token_hash, lease.token_hash):
        return True
    return caller.admin or (caller.uid is not None and caller.uid == lease.uid)


def can_run_as(daemon_uid: int, uid: int | None) -> bool:
    """Return whether the daemon can run a program with exactly the rights of a lease's user; root can always."""
    return uid is not None and daemon_uid in (0, uid)
