"""Drafting: from a validated request and its owner to a lease that lacks nothing but its port.

It applies the rules that depend on the configuration and on other leases: pools, names, quotas, checks and lifetimes.
Everything here is synchronous, and whatever is refused is raised. This module must not know which ports are free.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from msgspec import UNSET, Struct

from portd.core import announcing, health
from portd.core.allocator import Allocator, PortRequest
from portd.core.bindings import LOCALHOST
from portd.core.errors import InvalidRequest, PortTaken, QuotaExceeded
from portd.core.model import OWN_ADDRESS, Check, HoldKind, Lease, Owner, Protocol
from portd.core.names import Holder, ServiceNames, check_name
from portd.core.own_addresses import User
from portd.core.requests import (
    DEFAULT_ADDRESS,
    DEFAULT_POOL,
    DEFAULT_PROTOCOL,
    LeaseRequest,
    check_details,
    check_timing,
    given,
    port_numbers,
)
from portd.core.rights import Caller, hash_token
from portd.core.table import LeaseTable
from portd.leasing.owners import describe_owner
from portd.leasing.pending import Pending
from portd.leasing.policy import Policy, new_id, new_token
from portd.leasing.seams import Process
from portd.leasing.static_holds import StaticHolds


class Draft(Struct, gc=False):
    """A lease that lacks nothing but its port. `fields` are those of the Lease, `token` is shown once;
    `is_whole`: the number must be free at every address of this host."""

    id: str
    token: str
    ports: PortRequest
    hold: HoldKind
    is_privileged: bool
    is_whole: bool
    fields: dict[str, Any]


class Drafter:
    """Drafts leases. `policy` may be replaced while the daemon runs."""

    def __init__(
        self,
        table: LeaseTable,
        allocator: Allocator,
        names: ServiceNames,
        statics: StaticHolds,
        policy: Policy,
        make_id: Callable[[float], str] = new_id,
        make_token: Callable[[], str] = new_token,
    ) -> None:
        self._table = table
        self._allocator = allocator
        self._pools = tuple(allocator.pools())
        self._names = names
        self._statics = statics
        self.policy = policy
        self._make_id = make_id
        self._make_token = make_token

    def draft(
        self,
        request: LeaseRequest,
        caller: Caller,
        process: Process | None,
        pending: Pending,
        made: Sequence[Lease],
    ) -> Draft:
        """Draft the lease of a request. `made` are the leases of the call so far: endpoints share their instance.

        Raises InvalidRequest, ServiceTaken, PortTaken (the instance) or QuotaExceeded; PoolExhausted where the block of
        own addresses is used up.
        """
        pool = self._check(request)
        policy, now = self.policy, pending.now
        service, endpoint, protocol = request.service, request.endpoint, given(request.protocol, DEFAULT_PROTOCOL)
        owner = Owner(uid=caller.uid, known_by=caller.known_by) if process is None else process.owner
        uid = owner.uid
        token_name = caller.token_name if uid is None else None
        user: User = uid if token_name is None else f"token:{token_name}"
        check = self.validate_check(request.check, protocol, uid) if request.check else None
        instance, of_instance = self._instance(request, made)
        if not caller.admin:
            self._check_names(service, instance, user, of_instance, now.tick)
        address, is_own = given(request.address, DEFAULT_ADDRESS), request.address == OWN_ADDRESS
        if is_own:  # endpoints share their instance's address
            address = self._own_address(service, instance, user if of_instance is None else of_instance.user, pending)
        elif address != DEFAULT_ADDRESS:
            address = normal_address(address)
        numbers, is_exact = () if request.port is None else port_numbers(request.port), request.exact
        static = self._allocator.statics.by_endpoint.get((service, endpoint))
        is_static = static is not None and (not numbers or static.port in numbers[:1])
        if static is not None and is_static:
            numbers, is_exact = (static.port,), True
            if request.protocol is UNSET or (static.protocol != "both" and protocol == DEFAULT_PROTOCOL):
                protocol = static.protocol
            address = static.address if address == DEFAULT_ADDRESS else address
        is_at_share = policy.quota_per_uid > 0 and self._is_at_share(user)
        hold = policy.hold if request.hold is None and protocol != "udp" else _hold_kind(request, protocol)
        token = self._make_token()
        fields: dict[str, Any] = {
            "service": service,
            "instance": instance,
            "endpoint": endpoint,
            "protocol": protocol,
            "address": address,
            "pool": pool,
            "hold": hold,
            "lifetime": "ttl" if request.ttl is not None else "static" if is_static else "process",
            "owner": owner,
            "uid": uid,
            "host": policy.host,
            "created_at": now.at,
            "process": None if process is None else process.id,
            "token_hash": hash_token(token),
        }
        # What has its default stays out: msgspec finds each keyword by a search through all fields (a microsecond).
        has_details = request.tags or request.metadata or request.weight is not UNSET or request.priority
        if has_details or request.workspace or request.branch:
            fields |= _details(request)
        if numbers or is_own:
            fields |= {"exact": is_exact, "port_requested": bool(numbers), "own_address": is_own}
        if request.ttl is not None:
            fields["ttl"] = request.ttl
        if token_name is not None:
            fields["token_name"] = token_name
        if check is not None:
            fields["check"] = check
        if request.announce is not UNSET:
            fields["announce"] = announcing.resolve(
                request.announce,
                service=service,
                instance=instance,
                endpoint=endpoint,
                protocol=protocol,
                address=address,
                check=check,
            )
        if is_static:
            self._statics.give_way(service, endpoint, pending.reserve)
        is_privileged = caller.admin or is_own or (is_static and bool(policy.is_listed(service, user)))
        name = (service, instance, endpoint)
        ports = PortRequest(name, user, protocol, address, numbers, pool, is_exact, is_at_share)
        return Draft(self._make_id(now.at), token, ports, hold, is_privileged, not (is_exact or is_own), fields)

    def validate_check(self, check: Check | None, protocol: Protocol, uid: int | None) -> Check | None:
        """Return the check as it will be made; raises InvalidRequest for one that can't be made for this user."""
        if check is None:
            return None
        health.validate_check(
            check, protocol, uid, health.CheckPolicy(self.policy.daemon_uid, self.policy.allow_commands)
        )
        return check_timing(check)

    # --- parts ---

    def _check(self, request: LeaseRequest) -> str:
        """Return the pool of a request; raises InvalidRequest for what can't be granted."""
        pool = given(request.pool, DEFAULT_POOL)
        if pool not in self._pools:
            raise InvalidRequest(
                f"there is no pool {pool!r}: the configuration has {', '.join(self._pools)}",
                pointer="/pool",
            )
        if request.ttl is not None and request.ttl > self.policy.max_ttl_s:
            raise InvalidRequest(
                f"a ttl of more than {self.policy.max_ttl_s:g} s (max_ttl) is not granted", pointer="/ttl"
            )
        if request.exact and request.port is None:
            raise InvalidRequest("'exact' needs a 'port'", pointer="/exact")
        if request.offset is not None and pool != DEFAULT_POOL and request.port is None:
            raise InvalidRequest("a port with 'offset' comes from no pool", pointer="/pool")
        if request.tags or request.metadata:
            check_details(request.tags or (), request.metadata or {})
        return pool

    def _instance(self, request: LeaseRequest, made: Sequence[Lease]) -> tuple[str, Lease | None]:
        """Return the instance's name, and the oldest of its leases."""
        table, service = self._table, request.service
        if request.instance is not None:
            return request.instance, table.oldest_of_instance(service, request.instance)
        if not made:
            return table.free_instance(service, request.endpoint), None
        shared = dict.fromkeys(lease.instance for lease in made if lease.service == service)
        instance = table.free_instance(service, request.endpoint, shared)
        return instance, table.oldest_of_instance(service, instance)

    def _check_names(self, service: str, instance: str, user: User, of_instance: Lease | None, tick: float) -> None:
        """Refuse a service name or an instance of another user: the lease would speak in its name."""
        if not self.policy.has_shared_names:
            oldest = self._table.oldest_of_service(service)
            holder = self._names.holder(service, tick) if oldest is None else Holder(oldest.user)
            check_name(service, user, holder, self.policy.is_listed(service, user))
        if of_instance is not None and of_instance.user != user:
            raise PortTaken(
                f"instance {instance!r} belongs to {describe_owner(of_instance.owner)}: choose another instance name "
                "or omit it",
                pointer="/instance",
            )

    def _is_at_share(self, user: User) -> bool:
        """Return whether the user's leases and quarantined ports reach the quota; raises QuotaExceeded where its
        leases alone do."""
        quota, lease_count = self.policy.quota_per_uid, self._table.count_of_user(user)
        if lease_count >= quota:
            raise QuotaExceeded(
                f"{lease_count} leases are granted already, the quota: release some, or raise quota_per_uid in the "
                "configuration"
            )
        return lease_count + self._allocator.quarantines.count_of(user) >= quota

    def _own_address(self, service: str, instance: str, user: User, pending: Pending) -> str:
        own = self._allocator.own
        address = own.pick((service, instance, user))
        pending.reserve(own.release, address)
        own.use(address, (service, instance, user))
        return address


def _details(request: LeaseRequest) -> dict[str, Any]:
    """Return the fields of the lease that the request gives, and that are not their defaults."""
    fields: dict[str, Any] = {}
    if request.tags:
        fields["tags"] = request.tags
    if request.metadata:
        fields["metadata"] = request.metadata
    if request.weight is not UNSET:
        fields["weight"] = request.weight
    if request.priority:
        fields["priority"] = request.priority
    if request.workspace is not None:
        fields["workspace"] = request.workspace
    if request.branch is not None:
        fields["branch"] = request.branch
    return fields


def _hold_kind(request: LeaseRequest, protocol: Protocol) -> HoldKind:
    """Return the requested hold, else that of UDP: none."""
    if request.hold == "shared" and protocol == "udp":
        raise InvalidRequest(
            "a udp port can't be held 'shared': the last to bind gets every datagram; use 'exclusive' (by handoff) or "
            "'none'",
            pointer="/hold",
        )
    return "none" if request.hold is None else request.hold


@lru_cache(maxsize=1024)
def normal_address(text: str) -> str:
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
