"""What a caller sees of leases, processes and events: the contract's fields, and secrets only if they are its own."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from msgspec import UNSET, Struct, UnsetType, field
from msgspec.structs import replace

from portd.core.model import (
    Announcement,
    Check,
    CommandCheck,
    Elsewhere,
    EndedBecause,
    Event,
    Health,
    HoldKind,
    HttpCheck,
    KnownBy,
    Lease,
    Lifetime,
    Owner,
    Protocol,
    State,
    VouchedBy,
)
from portd.core.rights import Caller, sees_check, sees_process


class OwnerView(Struct, frozen=True, gc=False, kw_only=True):
    """The owner of a lease, or another process; what the kernel or the caller's rights hide is null."""

    pid: int | None
    uid: int | None
    user: str | None
    exe: str | None
    cmdline: tuple[str, ...] | None
    unit: str | None
    started_at: datetime | None
    known_by: KnownBy


class LeaseView(Struct, frozen=True, gc=False, kw_only=True):
    """A lease as the contract shows it. `token` is there in the answer to a grant alone."""

    id: str
    service: str
    instance: str
    endpoint: str
    protocol: Protocol
    address: str
    port: int
    pool: str
    hold: HoldKind
    listening: tuple[str, ...]
    vouched_by: VouchedBy | None
    elsewhere: tuple[Elsewhere, ...]
    state: State
    health: Health
    health_note: str
    health_since: datetime | None
    checked_at: datetime | None
    drain: bool
    lifetime: Lifetime
    owner: OwnerView
    uid: int | None
    tags: tuple[str, ...]
    metadata: dict[str, str]
    weight: int
    priority: int
    check: Check | None
    announce: Announcement | None
    host: str
    created_at: datetime
    renewed_at: datetime | None
    expires_at: datetime | None
    ended_at: datetime | None
    ended_because: EndedBecause | None
    revision: int
    workspace: str | UnsetType = UNSET
    branch: str | UnsetType = UNSET
    token: str | UnsetType = UNSET


class EventView(Struct, frozen=True, gc=False, kw_only=True):
    """An event as followers see it.

    `foreign` is the process that listens where a lease is in conflict. An event `passed` has the owner `from` which and
    the one `to` which the lease passed.
    """

    revision: int
    type: str
    at: datetime
    service: str
    note: str
    lease: LeaseView
    foreign: OwnerView | None
    previous: OwnerView | UnsetType = field(default=UNSET, name="from")
    to: OwnerView | UnsetType = UNSET


def moment(at: float | None) -> datetime | None:
    """Turn epoch seconds into a UTC time; None stays None."""
    return None if at is None else datetime.fromtimestamp(at, UTC)


@lru_cache(maxsize=1024)
def view_owner(owner: Owner, *, whole: bool) -> OwnerView:
    """Show a process; its executable and command line only if `whole`. One process often has many leases."""
    return OwnerView(
        pid=owner.pid,
        uid=owner.uid,
        user=owner.user,
        exe=owner.exe if whole else None,
        cmdline=owner.cmdline if whole else None,
        unit=owner.unit,
        started_at=moment(owner.started_at),
        known_by=owner.known_by,
    )


def view_process(owner: Owner, caller: Caller) -> OwnerView:
    """Show a process to a caller."""
    return view_owner(owner, whole=sees_process(caller, owner.uid))


def view_check(check: Check | None, *, whole: bool) -> Check | None:
    """Show a check; headers, the query of a path and the arguments of a command, which may hold secrets, only if
    `whole`."""
    if whole:
        return check
    if isinstance(check, HttpCheck):
        return replace(check, headers={}, path=check.path.partition("?")[0])
    if isinstance(check, CommandCheck):
        return replace(check, command=check.command[:1])
    return check


def view_lease(
    lease: Lease,
    caller: Caller,
    *,
    renewed_at: float | None = None,
    expires_at: float | None = None,
    health_note: str | None = None,
    checked_at: float | None = None,
    token: str | UnsetType = UNSET,
) -> LeaseView:
    """Show a lease to a caller.

    `renewed_at` and `expires_at` (epoch seconds) come from the running clock of a ttl lease, `health_note` and
    `checked_at` from the prober's last result, which is renewed without an event.
    """
    created_at: Any = moment(lease.created_at)
    return LeaseView(
        id=lease.id,
        service=lease.service,
        instance=lease.instance,
        endpoint=lease.endpoint,
        protocol=lease.protocol,
        address=lease.address,
        port=lease.port,
        pool=lease.pool,
        hold=lease.hold,
        listening=lease.listening,
        vouched_by=lease.vouched_by,
        elsewhere=lease.elsewhere,
        state=lease.state,
        health=lease.health,
        health_note=lease.health_note if health_note is None else health_note,
        health_since=moment(lease.health_since),
        checked_at=moment(checked_at),
        drain=lease.drain,
        lifetime=lease.lifetime,
        owner=view_process(lease.owner, caller),
        uid=lease.uid,
        tags=lease.tags,
        metadata=lease.metadata,
        weight=lease.weight,
        priority=lease.priority,
        check=lease.check if lease.check is None else view_check(lease.check, whole=sees_check(caller, lease)),
        announce=lease.announce,
        host=lease.host,
        created_at=created_at,
        renewed_at=moment(renewed_at if renewed_at is not None else lease.renewed_at),
        expires_at=moment(expires_at),
        ended_at=moment(lease.ended_at),
        ended_because=lease.ended_because,
        revision=lease.revision,
        workspace=_if_known(lease.workspace, caller, lease),
        branch=_if_known(lease.branch, caller, lease),
        token=token,
    )


def _if_known(text: str | None, caller: Caller, lease: Lease) -> str | UnsetType:
    """Show what a work tree says, to those who may see the process; a field that is not known is left out."""
    return text if text is not None and sees_process(caller, lease.uid) else UNSET


def view_event(event: Event, caller: Caller) -> EventView:
    """Show an event to a caller, with the lease as it was then."""
    lease = event.lease
    at: Any = moment(event.at)
    foreign = lease.foreign if lease.state == "conflict" else None
    is_passed = event.type == "passed" and lease.passed_from is not None
    return EventView(
        revision=event.revision,
        type=event.type,
        at=at,
        service=lease.service,
        note=lease.health_note,
        lease=view_lease(lease, caller),
        foreign=None if foreign is None else view_process(foreign, caller),
        previous=view_process(lease.passed_from, caller) if is_passed and lease.passed_from else UNSET,
        to=view_process(lease.owner, caller) if is_passed else UNSET,
    )
