"""Deciding a call for leases: from requests to reservations on a Pending, in one go.

Everything here is synchronous: no other grant comes in between. Whatever is refused on the way is raised; the caller of
`decide` then rolls the Pending back, and nothing has changed. What a lease is like is decided in `drafting`, on which
port it is in `placing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from msgspec import UNSET
from msgspec.structs import replace

from portd.core.errors import InvalidRequest, PoolExhausted, PortReserved, PortTaken, QuotaExceeded, Refusal
from portd.core.model import OWN_ADDRESS, Lease
from portd.core.requests import LeaseRequest, given
from portd.core.rights import Caller
from portd.core.table import LeaseTable
from portd.core.transitions import Change
from portd.core.updating import check_same, replaced_fields
from portd.leasing.adopting import Adopted
from portd.leasing.drafting import Drafter, normal_address
from portd.leasing.owners import Owners, describe_owner
from portd.leasing.pending import Grant, Pending
from portd.leasing.placing import Placer
from portd.leasing.policy import Policy
from portd.leasing.seams import Process
from portd.leasing.timers import LeaseClocks

NOTHING_ADOPTED: Final[Mapping[int, Adopted]] = {}


class Decider:
    """Decides calls for leases."""

    def __init__(
        self, table: LeaseTable, owners: Owners, clocks: LeaseClocks, drafter: Drafter, placer: Placer
    ) -> None:
        self._table = table
        self._owners = owners
        self._clocks = clocks
        self._drafter = drafter
        self._placer = placer
        self.validate_check = drafter.validate_check
        self.move = placer.move

    @property
    def policy(self) -> Policy:
        """Return what the configuration says about grants."""
        return self._drafter.policy

    def reconfigure(self, policy: Policy) -> None:
        """Decide by this policy from now on."""
        self._drafter.policy = self._placer.policy = policy

    # --- calls ---

    def decide(
        self,
        pending: Pending,
        requests: Sequence[LeaseRequest],
        caller: Caller,
        adopted: Mapping[int, Adopted] = NOTHING_ADOPTED,
    ) -> None:
        """Decide all requests of a call, and record the leases in `pending.grants`; raises the first refusal.

        `adopted` are the processes of requests to adopt one, by index. Requests with an `offset` are placed together
        with the first one, the others one after the other.
        """
        if len(requests) == 1 and requests[0].offset is None:  # nearly every call
            pending.grants = [self._grant(requests[0], caller, pending, (), adopted.get(0))]
            return
        grants: dict[int, Grant] = {}
        relative = [index for index, request in enumerate(requests) if request.offset is not None]
        if relative:
            self._grant_together(pending, requests, relative, caller, grants)
        for index, request in enumerate(requests):
            if index not in grants:
                with _pointing_to(index, len(requests)):
                    grants[index] = self._grant(request, caller, pending, _leases(grants), adopted.get(index))
        pending.grants = [grants[index] for index in range(len(requests))]

    # --- requests ---

    def _grant(
        self,
        request: LeaseRequest,
        caller: Caller,
        pending: Pending,
        made: Sequence[Lease],
        adopted: Adopted | None = None,
    ) -> Grant:
        """Grant one request. `made` are the leases of the call so far: endpoints of a service share their instance."""
        if adopted is None:
            process = self._owners.acquire(request.pid, caller, pending, is_lifetime=request.ttl is None)
        else:
            process = adopted.process
            if request.ttl is None:
                self._owners.keep(process.id, pending)
        if request.instance is not None:
            existing = self._table.named(request.service, request.instance, request.endpoint)
            if existing is not None:
                return self._again(existing, request, caller, process, pending)
        draft = self._drafter.draft(request, caller, process, pending, made)
        if adopted is not None:
            return self._placer.adopt(draft, adopted, pending)
        return self._placer.place(draft, pending)

    def _grant_together(
        self,
        pending: Pending,
        requests: Sequence[LeaseRequest],
        relative: Sequence[int],
        caller: Caller,
        grants: dict[int, Grant],
    ) -> None:
        """Grant the first request, and those with an offset at ports counted from its own. Where one of them can't be
        had, the first one's next candidate is tried with all of them."""
        with _pointing_to(0, len(requests)):
            first = requests[0]
            if first.offset is not None:
                raise InvalidRequest("'offset' counts from the first request of an array", pointer="/offset")
            process = self._owners.acquire(first.pid, caller, pending, is_lifetime=first.ttl is None)
            existing = None
            if first.instance is not None:
                existing = self._table.named(first.service, first.instance, first.endpoint)
            if existing is not None:
                grants[0] = self._again(existing, first, caller, process, pending)
            else:
                draft = self._drafter.draft(first, caller, process, pending, ())
        if existing is not None:
            self._grant_relative(pending, requests, relative, caller, grants)
            return
        last: Refusal | None = None
        ports = self._placer.held_ports(draft, pending)
        while True:
            try:
                with _pointing_to(0, len(requests)):
                    port = next(ports)
            except (PortTaken, PortReserved, PoolExhausted, QuotaExceeded) as refusal:
                raise last or refusal from None
            savepoint = pending.savepoint()
            grants[0] = self._placer.reserve(draft, port, pending)
            try:
                self._grant_relative(pending, requests, relative, caller, grants)
            except (PortTaken, PortReserved) as refusal:
                if (refusal.pointer or "").endswith("/instance"):
                    raise
                last = refusal
                grants.clear()
                pending.rollback_to(savepoint)
            else:
                return

    def _grant_relative(
        self,
        pending: Pending,
        requests: Sequence[LeaseRequest],
        relative: Sequence[int],
        caller: Caller,
        grants: dict[int, Grant],
    ) -> None:
        first_port = grants[0].lease.port
        for index in relative:
            with _pointing_to(index, len(requests)):
                request = _at_offset(requests[index], first_port)
                grants[index] = self._grant(request, caller, pending, _leases(grants))

    def _again(
        self, lease: Lease, request: LeaseRequest, caller: Caller, process: Process | None, pending: Pending
    ) -> Grant:
        """Answer a request for a name that is leased: the same owner has it already; a user's new process gets the ttl
        lease of one that died; anybody else is refused."""
        identity = None if process is None else process.id
        fields: dict[str, Any] = {}
        if lease.process is None or identity != lease.process:
            is_orphaned = lease.lifetime == "ttl" and not self._owners.is_alive(lease.process)
            is_authorized = (
                (caller.uid is not None and caller.uid == lease.uid)
                or (caller.token_hash is not None and caller.token_hash == lease.token_hash)
                or (lease.token_name is not None and caller.token_name == lease.token_name)
            )
            if request.ttl is None or not is_orphaned or not is_authorized:
                raise PortTaken(
                    f"instance {lease.instance!r} (endpoint {lease.endpoint}) is already leased by "
                    f"{describe_owner(lease.owner)} on port {lease.port}: choose another instance name or omit it",
                    pointer="/instance",
                )
            if process is not None:
                fields = {"owner": process.owner, "process": process.id}
        else:
            address = given(request.address, None)
            if address is not None and address != OWN_ADDRESS:
                address = normal_address(address)
            check_same(lease, request, address)
        if request.check is not UNSET:
            self.validate_check(request.check, lease.protocol, lease.uid)
        fields |= replaced_fields(lease, request, pending.now.at)
        if fields:
            pending.changes.append(Change(lease.id, "updated", fields))
        if lease.lifetime == "ttl":
            pending.reserve(self._clocks.resume, lease.id)
            self._clocks.pause(lease.id)
            pending.on_commit(partial(self._clocks.renew_paused, lease))
        return Grant(lease, None)


def _leases(grants: dict[int, Grant]) -> Sequence[Lease]:
    return [grant.lease for grant in grants.values()] if grants else ()


def _at_offset(request: LeaseRequest, first_port: int) -> LeaseRequest:
    """Return the request with the port that its offset means."""
    assert request.offset is not None
    if request.port is not None:
        raise InvalidRequest("'port' and 'offset' exclude each other", pointer="/port")
    port = first_port + request.offset
    if not 1 <= port <= 65_535:
        raise PortTaken(f"port {first_port} {request.offset:+d} is not within 1-65535", pointer="/offset")
    return replace(request, port=port, exact=True)


@contextmanager
def _pointing_to(index: int, count: int) -> Iterator[None]:
    """Let the pointer of a refusal start at the request's index in the array of the call."""
    try:
        yield
    except Refusal as refusal:
        if count > 1:
            refusal.pointer = f"/{index}{refusal.pointer or ''}"
        raise
