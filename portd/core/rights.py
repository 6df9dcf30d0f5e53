"""Who may do what. The caller is known by the kernel or by a token; nothing here asks anybody."""

from __future__ import annotations

import hmac

from msgspec import Struct

from portd.core.errors import NotOwner, Unauthenticated
from portd.core.model import KnownBy, Lease


class Caller(Struct, frozen=True, gc=False, kw_only=True):
    """Who asks. `uid` and `pid` are None where the kernel can't tell (another host, another pid namespace).

    `admin`: root, a member of the admin group, or a bearer of an admin token. `token_hash` is what the caller showed,
    hashed, or None. `other_network`: the caller's process is in another network namespace, or that is not known: it
    gets no port and no socket of this host.
    """

    uid: int | None = None
    pid: int | None = None
    known_by: KnownBy = "token"
    admin: bool = False
    token_hash: bytes | None = None
    other_network: bool = False


def check_change(caller: Caller, lease: Lease) -> None:
    """Let pass who may change the lease: the lease's uid, whoever shows its token, and admins.

    Raises Unauthenticated when nothing is known of the caller, NotOwner when too much is.
    """
    if caller.admin or (caller.uid is not None and caller.uid == lease.uid):
        return
    if caller.token_hash is not None and hmac.compare_digest(caller.token_hash, lease.token_hash):
        return
    if caller.uid is None and caller.token_hash is None:
        raise Unauthenticated("who calls is not known here: send the lease's token as 'Authorization: Bearer TOKEN'")
    raise NotOwner(
        f"lease {lease.id} ({lease.instance}, port {lease.port}) belongs to "
        f"{lease.uid if lease.uid is not None else 'a token'}; show its token to change it"
    )


def sees_cmdline(caller: Caller, lease_uid: int | None) -> bool:
    """Tell whether the caller may read the command line of a process of this uid: it may hold secrets."""
    return caller.admin or (caller.uid is not None and caller.uid == lease_uid)
