"""Deciding a call for leases: from requests to reservations on a Pending, in one go.

Everything here is synchronous. Between reading the table and reserving in it there is no await, so no other grant can
come in between: that, and not a lock, is why a port is never granted twice. Whatever is refused on the way is raised;
the caller of `decide` then rolls the Pending back, and nothing has changed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple

from msgspec import UNSET
from msgspec.structs import replace

from portd.core import announcing
from portd.core.allocator import Allocator, PortRequest
from portd.core.bindings import LOCALHOST, Binding
from portd.core.errors import FILE_LIMIT, Busy, InvalidRequest, PortReserved, PortTaken, QuotaExceeded, Refusal
from portd.core.health import CheckPolicy, validate_check
from portd.core.model import OWN_ADDRESS, Check, HoldKind, Lease, Lifetime, Owner, Protocol
from portd.core.names import Holder, ServiceNames, check_name
from portd.core.own_addresses import Instance, User
from portd.core.requests import LeaseRequest, check_details, check_timing, port_numbers
from portd.core.rights import Caller, hash_token
from portd.core.table import LeaseTable
from portd.core.transitions import Change
from portd.core.updating import check_same, replaced_fields
from portd.leasing.adopting import Adopted
from portd.leasing.owners import Owners, describe_owner
from portd.leasing.pending import Grant, Pending
from portd.leasing.policy import Policy, new_id, new_token
from portd.leasing.refusing import Search, no_port
from portd.leasing.seams import Holds, Process
from portd.leasing.static_holds import StaticHolds
from portd.leasing.timers import HoldKeeper, LeaseClocks

TRIES_MAX: Final = 512
"""Candidates that one grant tries: each costs a bind (10 µs), so a pool full of foreign processes blocks the loop for
5 ms at the most. Their ports go on probation, so the next grant goes on where this one stopped."""
DEFAULT_ADDRESS: Final = "127.0.0.1"
DEFAULT_PROTOCOL: Final = "tcp"
"""What a request binds that says nothing else; a static port's own address and protocol take their place."""


NOTHING_ADOPTED: Final[Mapping[int, Adopted]] = {}
Reserve = Callable[..., Any]
"""`reserve(release, *args)`: registers a compensation, at the Pending or at one attempt of it."""


class Draft(NamedTuple):
    """A lease that lacks nothing but its port. `fields` are those of the Lease, `token` is shown once;
    `is_whole`: the number must be free at every address of this host."""

    id: str
    token: str
    ports: PortRequest
    hold: HoldKind
    is_privileged: bool
    is_whole: bool
    fields: dict[str, Any]


class Decider:
    """Decides calls for leases, and moves to another port."""

    def __init__(
        self,
        table: LeaseTable,
        allocator: Allocator,
        names: ServiceNames,
        holds: Holds,
        keeper: HoldKeeper,
        statics: StaticHolds,
        owners: Owners,
        clocks: LeaseClocks,
        policy: Policy,
        make_id: Callable[[float], str] = new_id,
        make_token: Callable[[], str] = new_token,
    ) -> None:
        self._table = table
        self._allocator = allocator
        self._pools = tuple(allocator.pools())
        self._names = names
        self._holds = holds
        self._keeper = keeper
        self._statics = statics
        self._owners = owners
        self._clocks = clocks
        self.policy = policy
        self._make_id = make_id
        self._make_token = make_token

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
            pending.grants = [self._grant(requests[0], caller, pending, (), pending.reserve, adopted.get(0))]
            return
        grants: dict[int, Grant] = {}
        relative = [index for index, request in enumerate(requests) if request.offset is not None]
        if relative:
            self._grant_together(pending, requests, relative, caller, grants)
        for index, request in enumerate(requests):
            if index not in grants:
                with _pointing_to(index, len(requests)):
                    grants[index] = self._grant(
                        request, caller, pending, _leases(grants), pending.reserve, adopted.get(index)
                    )
        pending.grants = [grants[index] for index in range(len(requests))]

    def move(self, lease: Lease, pending: Pending, *, is_privileged: bool) -> Lease:
        """Reserve another port for a live lease whose port a foreign process has; the old one goes on probation.

        The new hold replaces the old one under the same lease. Raises PoolExhausted when there is none, QuotaExceeded
        when the user has declined its share.
        """
        quota = self.policy.quota_per_uid
        if quota and self._table.count_of_user(lease.user) + self._allocator.quarantines.count_of(lease.user) >= quota:
            raise QuotaExceeded(
                "leases, declined and cooling ports together have reached the quota: find out who has the ports "
                "('portd who'), or raise quota_per_uid in the configuration",
                retry_after_s=self._allocator.quarantines.next_left_s(lease.user, pending.now.tick),
            )
        self._allocator.decline(Binding(lease.protocol, lease.address, lease.port), pending.now.tick, lease.user)
        ports = PortRequest(lease.name, lease.user, lease.protocol, lease.address, (), lease.pool)
        draft = Draft(lease.id, "", ports, lease.hold, is_privileged, not lease.own_address, {})
        self._holds.drop(lease.id)
        pending.reserve(self._hold_again, lease)
        search = Search()
        for binding in self._allocator.candidates(ports):
            if self._hold(draft, binding, pending, search):
                moved = replace(lease, port=binding.port, state="held")
                pending.reserve(self._withdraw_move, moved)
                self._table.reserve_move(moved, pending)
                return moved
        raise no_port(self._allocator, self._table, draft.ports, search, pending.now.tick, self.policy)

    def validate_check(self, check: Check | None, protocol: Protocol, uid: int | None) -> Check | None:
        """Return the check as it will be made; raises InvalidRequest for one that can't be made for this user."""
        if check is None:
            return None
        validate_check(check, protocol, uid, CheckPolicy(self.policy.daemon_uid, self.policy.allow_commands))
        return check_timing(check)

    # --- one request ---

    def _grant(
        self,
        request: LeaseRequest,
        caller: Caller,
        pending: Pending,
        made: Sequence[Lease],
        reserve: Reserve,
        adopted: Adopted | None = None,
    ) -> Grant:
        """Grant one request. `made` are the leases of the call so far: endpoints of a service share their instance."""
        if adopted is None:
            process = self._owners.acquire(request.pid, caller, pending, is_lifetime=request.ttl is None)
        else:
            process = adopted.process
            if request.ttl is None:
                self._owners.keep(process.id, pending)
        existing = self._existing(request)
        if existing is not None:
            return self._again(existing, request, caller, process, pending)
        draft = self._draft(request, caller, process, pending, made, reserve)
        if adopted is not None:
            return self._adopt(draft, adopted, pending, reserve)
        search = Search()
        for binding in self._allocator.candidates(draft.ports):
            if self._hold(draft, binding, pending, search):
                return self._reserve(draft, binding.port, pending, reserve)
        raise no_port(self._allocator, self._table, draft.ports, search, pending.now.tick, self.policy)

    def _adopt(self, draft: Draft, adopted: Adopted, pending: Pending, reserve: Reserve) -> Grant:
        """Reserve the port that the process listens on. Nothing is held while its socket conflicts."""
        request = draft.ports._replace(address=adopted.address, is_exact=True)
        (port,) = request.ports
        name, binding = request.name, request.on(port)
        is_reserved = self._allocator.statics.belongs_to_other(name[0], name[2], binding) is not None
        if is_reserved or self._table.conflicting(binding) is not None:
            raise no_port(self._allocator, self._table, request, Search(), pending.now.tick, self.policy)
        draft.fields["address"] = adopted.address
        grant = self._reserve(draft, port, pending, reserve)
        pending.changes.append(Change(grant.lease.id, "bound", adopted.seen._asdict()))
        pending.on_commit(partial(self._keeper.restore, grant.lease))  # once its owner's socket no longer conflicts
        return grant

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
            existing = self._existing(first)
            if existing is not None:
                grants[0] = self._again(existing, first, caller, process, pending)
                self._grant_relative(pending, requests, relative, caller, grants, pending.reserve)
                return
            draft = self._draft(first, caller, process, pending, (), pending.reserve)
        search = Search()
        last: Refusal | None = None
        for binding in self._allocator.candidates(draft.ports):
            if not self._hold(draft, binding, pending, search):
                continue
            before = len(pending.changes), len(pending.effects)
            with ExitStack() as attempt:
                grants[0] = self._reserve(draft, binding.port, pending, attempt.callback)
                try:
                    self._grant_relative(pending, requests, relative, caller, grants, attempt.callback)
                except (PortTaken, PortReserved) as refusal:
                    if (refusal.pointer or "").endswith("/instance"):
                        raise
                    last = refusal
                    grants.clear()
                    del pending.changes[before[0] :], pending.effects[before[1] :]
                    continue
                pending.reserve(attempt.pop_all().close)
                return
        with _pointing_to(0, len(requests)):
            raise last or no_port(self._allocator, self._table, draft.ports, search, pending.now.tick, self.policy)

    def _grant_relative(
        self,
        pending: Pending,
        requests: Sequence[LeaseRequest],
        relative: Sequence[int],
        caller: Caller,
        grants: dict[int, Grant],
        reserve: Reserve,
    ) -> None:
        first_port = grants[0].lease.port
        for index in relative:
            with _pointing_to(index, len(requests)):
                request = _at_offset(requests[index], first_port)
                grants[index] = self._grant(request, caller, pending, _leases(grants), reserve)

    def _existing(self, request: LeaseRequest) -> Lease | None:
        if request.instance is None:
            return None
        return self._table.named(request.service, request.instance, request.endpoint)

    def _draft(
        self,
        request: LeaseRequest,
        caller: Caller,
        process: Process | None,
        pending: Pending,
        made: Sequence[Lease],
        reserve: Reserve,
    ) -> Draft:
        self._check(request)
        owner = Owner(uid=caller.uid, known_by=caller.known_by) if process is None else process.owner
        token_name = caller.token_name if owner.uid is None else None
        user: User = owner.uid if token_name is None else f"token:{token_name}"
        check = None if request.check is UNSET else self.validate_check(request.check, request.protocol, owner.uid)
        table, service, endpoint = self._table, request.service, request.endpoint
        shared = dict.fromkeys(lease.instance for lease in made if lease.service == service) if made else ()
        instance = request.instance or table.free_instance(service, endpoint, shared)
        oldest, of_instance = table.oldest_of_service(service), table.oldest_of_instance(service, instance)
        lease_count = table.count_of_user(user)
        if not caller.admin:
            self._check_names(service, instance, user, oldest, of_instance, pending)
        static = self._allocator.statics.by_endpoint.get((service, endpoint))
        address_user = user if of_instance is None else of_instance.user  # endpoints share their instance's address
        address, is_own = self._address(request, (service, instance, address_user), reserve)
        protocol, is_exact = request.protocol, request.exact
        numbers: tuple[int, ...] = ()
        if request.port is not None:
            numbers = port_numbers(request.port)
        is_static = static is not None and (not numbers or static.port in numbers[:1])
        if static is not None and is_static:
            numbers, is_exact = (static.port,), True
            if static.protocol != "both" and protocol == DEFAULT_PROTOCOL:
                protocol = static.protocol
            address = address if is_own or request.address != DEFAULT_ADDRESS else static.address
        quota = self.policy.quota_per_uid
        is_at_share = bool(quota) and lease_count + self._allocator.quarantines.count_of(user) >= quota
        if is_at_share and lease_count >= quota:
            raise QuotaExceeded(
                f"{lease_count} leases are granted already, the quota: release some, or raise quota_per_uid in the "
                "configuration"
            )
        hold = self._hold_kind(request, protocol)
        announce = None
        if request.announce is not UNSET:
            announce = announcing.resolve(
                request.announce,
                service=service,
                instance=instance,
                endpoint=endpoint,
                protocol=protocol,
                address=address,
                check=check,
            )
        lifetime: Lifetime = "ttl" if request.ttl is not None else "static" if is_static else "process"
        token = self._make_token()
        fields = {
            "service": service,
            "instance": instance,
            "endpoint": endpoint,
            "protocol": protocol,
            "address": address,
            "pool": request.pool,
            "hold": hold,
            "lifetime": lifetime,
            "owner": owner,
            "uid": owner.uid,
            "tags": () if request.tags is UNSET else request.tags,
            "metadata": {} if request.metadata is UNSET else request.metadata,
            "weight": 1 if request.weight is UNSET else request.weight,
            "priority": request.priority,
            "check": check,
            "announce": announce,
            "host": self.policy.host,
            "created_at": pending.now.at,
            "process": None if process is None else process.id,
            "token_hash": hash_token(token),
            "token_name": token_name,
            "ttl": request.ttl,
            "exact": is_exact,
            "port_requested": bool(numbers),
            "own_address": is_own,
        }
        if is_static:
            self._statics.give_way(service, endpoint, reserve)
        is_privileged = caller.admin or is_own or (is_static and bool(self.policy.is_listed(service, user)))
        ports = PortRequest(
            (service, instance, endpoint), user, protocol, address, numbers, request.pool, is_exact, is_at_share
        )
        return Draft(self._make_id(pending.now.at), token, ports, hold, is_privileged, not (is_exact or is_own), fields)

    def _reserve(self, draft: Draft, port: int, pending: Pending, reserve: Reserve) -> Grant:
        """Reserve the lease's name and binding on a port that is held for it; no await since the candidate."""
        lease = Lease(id=draft.id, port=port, **draft.fields)
        if not lease.port_requested and not self._allocator.is_pooled(port):  # the instance's last port, requested once
            lease = replace(lease, port_requested=True)
        reserve(self._withdraw, lease)
        self._table.reserve(lease, pending)
        pending.changes.append(Change(lease.id, "granted", lease=lease))
        if lease.ttl is not None:
            pending.on_commit(partial(self._clocks.start, lease))
        return Grant(lease, draft.token)

    def _hold(self, draft: Draft, binding: Binding, pending: Pending, search: Search) -> bool:
        """Hold the binding for the lease, unless somebody has it; the search records why not."""
        port = binding.port
        if port < self.policy.unprivileged_from and not draft.is_privileged:
            search[port] = "privileged"
            return False
        if self._table.conflicting(binding) is not None:
            search[port] = "leased"
            return False
        search.tries += 1
        if search.tries > TRIES_MAX:
            raise Busy(f"{TRIES_MAX} ports in a row are used by foreign processes; try again")
        taken = self._holds.take(draft.id, binding.protocol, binding.address, port, draft.hold, whole=draft.is_whole)
        if taken == "taken":
            return True
        if taken == "no_address":
            raise InvalidRequest(f"{binding.address} is not an address of this host", pointer="/address")
        if taken == "no_descriptors":
            raise Busy(FILE_LIMIT)
        search[port] = taken
        if taken == "busy" and self._allocator.pool_of(port) is not None and not self._table.on_port(port):
            self._allocator.decline(binding, pending.now.tick)
        return False

    # --- the same name again ---

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
            address = request.address if request.address == OWN_ADDRESS else _normal_address(request.address)
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

    # --- parts of a decision ---

    def _check(self, request: LeaseRequest) -> None:
        if request.pool not in self._pools:
            raise InvalidRequest(
                f"there is no pool {request.pool!r}: the configuration has {', '.join(self._pools)}",
                pointer="/pool",
            )
        if request.ttl is not None and request.ttl > self.policy.max_ttl_s:
            raise InvalidRequest(
                f"a ttl of more than {self.policy.max_ttl_s:g} s (max_ttl) is not granted", pointer="/ttl"
            )
        if request.exact and request.port is None:
            raise InvalidRequest("'exact' needs a 'port'", pointer="/exact")
        if request.offset is not None and request.pool != "default" and request.port is None:
            raise InvalidRequest("a port with 'offset' comes from no pool", pointer="/pool")
        if request.tags is not UNSET or request.metadata is not UNSET:
            check_details(
                () if request.tags is UNSET else request.tags, {} if request.metadata is UNSET else request.metadata
            )

    def _check_names(
        self,
        service: str,
        instance: str,
        user: User,
        oldest: Lease | None,
        of_instance: Lease | None,
        pending: Pending,
    ) -> None:
        """Refuse a service name or an instance of another user: the lease would speak in its name."""
        if not self.policy.has_shared_names:
            holder = self._names.holder(service, pending.now.tick) if oldest is None else Holder(oldest.user)
            check_name(service, user, holder, self.policy.is_listed(service, user))
        if of_instance is not None and of_instance.user != user:
            raise PortTaken(
                f"instance {instance!r} belongs to {describe_owner(of_instance.owner)}: choose another instance name "
                "or omit it",
                pointer="/instance",
            )

    def _hold_kind(self, request: LeaseRequest, protocol: Protocol) -> HoldKind:
        if request.hold == "shared" and protocol == "udp":
            raise InvalidRequest(
                "a udp port can't be held 'shared': the last to bind gets every datagram; use 'exclusive' (by handoff) "
                "or 'none'",
                pointer="/hold",
            )
        if request.hold is not None:
            return request.hold
        return "none" if protocol == "udp" else self.policy.hold

    def _address(self, request: LeaseRequest, instance: Instance, reserve: Reserve) -> tuple[str, bool]:
        if request.address != OWN_ADDRESS:
            return _normal_address(request.address), False
        address = self._allocator.own.pick(instance)
        reserve(self._allocator.own.release, address)
        self._allocator.own.use(address, instance)
        return address, True

    # --- compensations ---

    def _withdraw(self, lease: Lease) -> None:
        """Undo the reservation of a grant that does not happen."""
        self._holds.drop(lease.id)
        self._table.release(lease)
        self._allocator.put_back(lease.port)

    def _withdraw_move(self, moved: Lease) -> None:
        self._holds.drop(moved.id)
        self._table.release_move(moved.id)
        self._allocator.put_back(moved.port)

    def _hold_again(self, lease: Lease) -> None:
        if self._table.get(lease.id) is not None:
            self._keeper.restore(lease)


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
    """Let the pointer of a refusal start at the request's place in the array of the call."""
    try:
        yield
    except Refusal as refusal:
        if count > 1:
            refusal.pointer = f"/{index}{refusal.pointer or ''}"
        raise


@lru_cache(maxsize=1024)
def _normal_address(text: str) -> str:
    """Return an address in its one spelling; raises InvalidRequest for what no service binds."""
    if text == LOCALHOST:
        return text
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise InvalidRequest(f"{text!r} is not an IP address, 'localhost' or 'own'", pointer="/address") from error
    if address.is_multicast or (address.version == 6 and (address.ipv4_mapped or address.scope_id)):
        raise InvalidRequest(f"{text} is not an address that a service listens on", pointer="/address")
    return str(address)
