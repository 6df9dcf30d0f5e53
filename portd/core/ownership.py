"""Whose listener it is: the rules by which a listening socket counts as a lease's own.

Pure functions of facts that the kernel adapter reads. Nothing here reads /proc, asks a clock or knows how a socket was
attributed to its process.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from portd.core.bindings import addresses_of, conflicts_at, is_loopback
from portd.core.model import Elsewhere, Lease, Listener, Owner, ProcessId, VouchedBy

START_TOLERANCE_S: Final = 0.05
"""Start times of processes come in ticks of 10 ms and are converted by the wall clock: allow for both."""
KIN_MAX: Final = 16
"""Processes that a lease remembers as its own: the listeners' and those between them and the owner."""

ANCESTORS_MAX: Final = 64
"""Ancestors of all processes that have had one socket."""

ProcessKey = tuple[int, int]
"""Pid and start ticks: distinguishes the processes of one boot, but for two that started within one tick."""


class Credential(NamedTuple):
    """A lease id and the hash of its token, from the environment that a process was started with."""

    lease_id: str
    token_hash: bytes


class Holder(NamedTuple):
    """The process that has a listening socket open, as far as the kernel shows it.

    `owner` is None where the process is hidden from portd: then the uid of the socket is all there is.
    `ancestors` are the process itself and those that it comes from, nearest first. `is_portd`: only portd has the
    socket open; it is on its way to its owner (handoff) and nobody listens yet.
    """

    owner: Owner | None
    ancestors: tuple[ProcessKey, ...] = ()
    credentials: tuple[Credential, ...] = ()
    is_portd: bool = False


class Own(NamedTuple):
    """A listener that is the lease's own, with its process and the rule that made it so."""

    listener: Listener
    holder: Holder
    vouched_by: VouchedBy


class Judgement(NamedTuple):
    """The listeners of a lease: its own, and those of foreign processes.

    `inodes` are all sockets that were judged, those that only portd has and those not attributed yet included.
    """

    own: tuple[Own, ...]
    foreign: tuple[tuple[Listener, Holder], ...]
    is_complete: bool
    inodes: tuple[int, ...]

    @property
    def listening(self) -> tuple[str, ...]:
        """Return the addresses of the lease's own listeners."""
        return tuple(sorted({own.listener.address for own in self.own}))


def key_of(process: ProcessId) -> ProcessKey:
    """Return the part of a process' identity that /proc shows."""
    return process.pid, process.start_ticks


def judge(
    lease: Lease, listeners: Sequence[Listener], holders: Mapping[int, Holder], *, others: Collection[Lease] = ()
) -> Judgement:
    """Judge a lease by the sockets that listen on its number.

    `holders` maps the inodes of attributed sockets; `others` are the other leases on that number. A listener at another
    address than the lease's counts where `may_stand_in` says so, and is nobody's business otherwise.
    """
    own: list[Own] = []
    by_uid: list[Own] = []
    foreign: list[tuple[Listener, Holder]] = []
    is_complete = True
    inodes: list[int] = []
    for listener in listeners:
        at_lease = conflicts_at(listener, lease)
        if not at_lease and not may_stand_in(listener, lease, others):
            continue
        inodes.append(listener.inode)
        holder = holders.get(listener.inode)
        if holder is None:
            is_complete = False
        elif not holder.is_portd:
            rule = vouch(lease, listener, holder)
            if rule == "uid":
                by_uid.append(Own(listener, holder, rule))
            elif rule is not None:
                own.append(Own(listener, holder, rule))
            elif at_lease:
                foreign.append((listener, holder))
    if own:  # the user's other processes count only while nobody closer listens
        foreign += [(each.listener, each.holder) for each in by_uid if conflicts_at(each.listener, lease)]
    else:
        own = by_uid
    return Judgement(tuple(own), tuple(foreign), is_complete, tuple(inodes))


def may_stand_in(listener: Listener, lease: Lease, others: Iterable[Lease]) -> bool:
    """Return whether a listener at another address than the lease's may be the lease's own.

    A program that was given 127.0.0.1 may listen on ::1 or another loopback address: "localhost" is what the resolver
    says. Own addresses are exempt: many instances have one number there. So is a listener on another lease's address.
    """
    return (
        listener.protocol in lease.protocols
        and not lease.own_address
        and all(is_loopback(address) for address in addresses_of(lease.address))
        and is_loopback(listener.address)
        and not any(other.id != lease.id and conflicts_at(listener, other) for other in others)
    )


def vouch(lease: Lease, listener: Listener, holder: Holder) -> VouchedBy | None:
    """Return the rule by which a listener is the lease's own, or None for a foreign process.

    In this order: the owner or a descendant of it, its unit, the lease's id and token in the environment, the lease's
    uid with a start after the grant. A lease of a token has no uid and no process: only its credential counts.
    """
    owner = holder.owner
    kinship = None if lease.process is None else _kinship(lease, lease.process, holder)
    if kinship is not None:
        return kinship
    if owner is not None and is_one_service(lease.owner) and owner.unit_path == lease.owner.unit_path:
        return "unit"
    if any(shows(credential, lease) for credential in holder.credentials):
        return "token"
    if lease.uid is None:
        return None
    if owner is None or owner.uid is None:
        return "uid" if listener.uid == lease.uid else None
    return "uid" if owner.uid == lease.uid and started_after_grant(owner, lease) else None


def _kinship(lease: Lease, process: ProcessId, holder: Holder) -> VouchedBy | None:
    if not holder.ancestors:
        return None
    if holder.ancestors[0] == key_of(process):
        return "owner"
    known = {key_of(process), *lease.kin}
    return "descendant" if any(ancestor in known for ancestor in holder.ancestors) else None


def kin_of(lease: Lease, own: Iterable[Own]) -> tuple[ProcessKey, ...]:
    """Return the processes to remember as the lease's own: its listeners' and those between them and the owner.

    A listener stays a descendant by them when a process in between has exited, and after a restart of the daemon.
    """
    known = {*lease.kin} | (set() if lease.process is None else {key_of(lease.process)})
    kin: dict[ProcessKey, None] = {}
    for each in own:
        line = each.holder.ancestors
        related = next((index for index in reversed(range(len(line))) if line[index] in known), 0)
        kin.update(dict.fromkeys(line[: related + 1]))
    return tuple(kin)[:KIN_MAX]


def inherit(holder: Holder, before: Holder | None) -> Holder:
    """Return a holder with the ancestors of the process that had the same socket before.

    Whoever has a socket open got it from there: by fork, or passed over a unix socket. portd passes them on too, and
    is nobody's ancestor.
    """
    if before is None or before.is_portd or not holder.ancestors:
        return holder
    return holder._replace(ancestors=tuple(dict.fromkeys((*holder.ancestors, *before.ancestors)))[:ANCESTORS_MAX])


class Seen(NamedTuple):
    """What the kernel shows of a lease beside its state; the fields are those of the lease."""

    listening: tuple[str, ...] = ()
    vouched_by: VouchedBy | None = None
    elsewhere: tuple[Elsewhere, ...] = ()
    kin: tuple[ProcessKey, ...] = ()


def is_one_service(owner: Owner) -> bool:
    """Return whether all processes of the owner's systemd unit are one service.

    A scope is not: it is a login session, a terminal or a container, with whatever was started there. Nor is the
    manager of a user's units.
    """
    unit = owner.unit
    return unit is not None and owner.unit_path is not None and unit.endswith(".service") and unit[:5] != "user@"


def shows(credential: Credential, lease: Lease) -> bool:
    """Return whether a credential is the lease's id with its token."""
    return credential.lease_id == lease.id and hmac.compare_digest(credential.token_hash, lease.token_hash)


def started_after_grant(owner: Owner, lease: Lease) -> bool:
    """Return whether a process was started after the lease was granted."""
    return owner.started_at is not None and owner.started_at >= lease.created_at - START_TOLERANCE_S
