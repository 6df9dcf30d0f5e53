"""Deciding a grant: from a request to a lease that is claimed and held, in one go.

Everything here is synchronous. Between reading the table and claiming the place there is no await, so no other grant
can come in between: that, and not a lock, is why a port is never granted twice.
"""

from __future__ import annotations

import ipaddress
import os
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec

from portd.core import announcing
from portd.core.allocator import Allocator, Ask
from portd.core.bindings import LOCALHOST, Binding
from portd.core.errors import (
    FILE_LIMIT,
    Busy,
    InvalidRequest,
    NotOwner,
    OtherNetwork,
    PortReserved,
    PortTaken,
    QuotaExceeded,
    Unauthenticated,
)
from portd.core.health import CheckPolicy, validate_check
from portd.core.model import (
    OWN_ADDRESS,
    Check,
    HoldKind,
    Lease,
    Lifetime,
    Now,
    Owner,
    ProcessId,
    Protocol,
)
from portd.core.requests import LeaseRequest
from portd.core.rights import Caller, hash_token
from portd.core.table import LeaseTable
from portd.leasing.adopting import Adopted
from portd.leasing.seams import ForeignNetwork, Holds, Process, Processes, ProcessGone

TRIES_MAX: Final = 512
"""Candidates that one grant tries: each costs a bind (10 µs), so a pool full of foreign processes blocks the loop for
5 ms at the most. Strangers' ports go on probation, so the next try goes on where this one stopped."""
DEFAULT_ADDRESS: Final = "127.0.0.1"
DEFAULT_PROTOCOL: Final = "tcp"
"""What a request binds that says nothing else; a static port's own address and protocol take their place."""
PRIVILEGED_BELOW: Final = 1024
"""Ports that only root may bind by the kernel's rule: a lease on one is a privilege too, except on an own address."""

DRAWN_BYTES: Final = 4096


class Policy(NamedTuple):
    """What the configuration says about grants. `quota_per_uid` counts leases; `max_ttl_s` is in seconds;
    `daemon_uid` is the user that the daemon runs as."""

    max_ttl_s: float
    quota_per_uid: int
    hold: HoldKind
    allow_commands: frozenset[str]
    host: str
    daemon_uid: int = 0


class Grant(NamedTuple):
    """A decided grant, with the secret that is shown once."""

    lease: Lease
    token: str


class _Chance:
    """The kernel's random bytes, drawn by the page: a system call for each token costs as much as the rest of it."""

    def __init__(self) -> None:
        self._drawn = b""
        self._at = 0

    def take(self, count: int) -> bytes:
        """Return so many bytes, none of them twice."""
        at = self._at
        if at + count > len(self._drawn):
            at, self._drawn = 0, os.urandom(DRAWN_BYTES)
        self._at = at + count
        return self._drawn[at : self._at]


_chance = _Chance()


def new_id(at: float) -> str:
    """Make a lease id: milliseconds since the epoch, then 48 bits of chance, in hex digits.

    Ids that grow with time lie together in the store: a quarter of a commit's time at 64 grants. No secret is in them.
    """
    return f"{int(at * 1000) & 0xFFFFFFFFFFFF:012x}{_chance.take(6).hex()}"


def new_token() -> str:
    """Make a token: 192 bits of chance."""
    return urlsafe_b64encode(_chance.take(24)).decode("ascii")


class Granter:
    """Decides grants and takes their holds; undoes both where nothing comes of it."""

    def __init__(
        self,
        table: LeaseTable,
        allocator: Allocator,
        holds: Holds,
        processes: Processes,
        policy: Policy,
        make_id: Callable[[float], str] = new_id,
        make_token: Callable[[], str] = new_token,
    ) -> None:
        self._table = table
        self._allocator = allocator
        self._holds = holds
        self._processes = processes
        self.policy = policy
        self._make_id = make_id
        self._make_token = make_token

    def grant(
        self,
        request: LeaseRequest,
        caller: Caller,
        process: Process | None,
        now: Now,
        shared: Iterable[str] = (),
        adopted: Adopted | None = None,
    ) -> Grant:
        """Decide one grant: the lease is claimed in the table, counted in its pool, and its hold is taken.

        `shared` are instances of the same service that the same call has made: endpoints gather on them. `adopted` is
        the process that listens on the port already: then nothing is held. Raises the refusal; then nothing is left
        behind.
        """
        self._check(request)
        owner, identity = self._owner(caller, process)
        self.check_check(request.check, request.protocol, owner.uid)
        quota = self.policy.quota_per_uid
        if quota and self._table.count_of_uid(owner.uid) >= quota:
            raise QuotaExceeded(
                f"uid {owner.uid} has {quota} leases already, its quota: release some, "
                "or raise quota_per_uid in the configuration"
            )
        instance = request.instance or self._table.free_instance(request.service, request.endpoint, shared)
        static = self._allocator.static_for(request.service, request.endpoint)
        address, own = self._address(request, instance)
        protocol = request.protocol
        wish = request.port
        if static is not None and wish in (None, static.port):
            wish = static.port
            if static.protocol != "both" and protocol == DEFAULT_PROTOCOL:
                protocol = static.protocol
            address = address if own or request.address != DEFAULT_ADDRESS else static.address
        hold = self._hold(request, protocol)
        announce = announcing.resolve(
            request.announce,
            service=request.service,
            instance=instance,
            endpoint=request.endpoint,
            protocol=protocol,
            address=address,
            check=request.check,
        )
        ask = Ask((request.service, instance, request.endpoint), protocol, address, wish, request.pool, request.exact)
        privileged = caller.admin or own or (static is not None and wish == static.port)
        token = self._make_token()
        lease_id = self._make_id(now.at)
        whole = not (request.exact or own)
        if adopted is not None:
            address = adopted.address
            place = self._adopt(ask._replace(address=address))
        else:
            place = self._find(lease_id, ask, hold, now, privileged=privileged, whole=whole)
        lifetime: Lifetime = "process"
        if request.ttl is not None:
            lifetime = "ttl"
        elif static is not None and place.port == static.port:
            lifetime = "static"
        lease = Lease(
            id=lease_id,
            service=request.service,
            instance=instance,
            endpoint=request.endpoint,
            protocol=protocol,
            address=address,
            port=place.port,
            pool=request.pool,
            hold=hold,
            lifetime=lifetime,
            owner=owner,
            uid=owner.uid,
            tags=request.tags,
            metadata=request.metadata,
            check=request.check,
            announce=announce,
            host=self.policy.host,
            created_at=now.at,
            process=identity,
            token_hash=hash_token(token),
            ttl=request.ttl,
            exact=request.exact,
            own_address=own,
        )
        self._table.claim(lease)  # no await between the pick and here
        self._allocator.use(lease)
        return Grant(lease, token)

    def undo(self, lease: Lease) -> None:
        """Give up a decided grant of which nothing came."""
        self._holds.drop(lease.id)
        self._table.disclaim(lease)
        self._allocator.give_back(lease)

    def move(self, lease: Lease, now: Now, *, privileged: bool) -> Lease:
        """Decide another port for a live lease whose port a foreign process has; the old one goes on probation.

        The new hold replaces the old one under the same lease. Raises PoolExhausted when there is none.
        """
        self._allocator.decline(Binding(lease.protocol, lease.address, lease.port), now.tick)
        self._holds.drop(lease.id)
        ask = Ask(lease.name, lease.protocol, lease.address, None, lease.pool, exact=False)
        try:
            whole = not lease.own_address
            place = self._find(lease.id, ask, lease.hold, now, privileged=privileged, whole=whole)
        except BaseException:
            self._holds.restore(lease.id, lease.protocol, lease.address, lease.port, lease.hold)
            raise
        moved = msgspec.structs.replace(lease, port=place.port, state="held")
        self._table.claim_move(moved)  # no await between the pick and here
        self._allocator.use(moved)
        return moved

    def undo_move(self, lease: Lease, moved: Lease, *, is_live: bool) -> None:
        """Give up a decided move: the lease stays where it was, if it still lives."""
        self._holds.drop(moved.id)
        self._table.disclaim_move(moved.id)
        self._allocator.give_back(moved)
        if is_live:
            self._holds.restore(lease.id, lease.protocol, lease.address, lease.port, lease.hold)

    def process(self, request_pid: int | None, caller: Caller, *, required: bool) -> Process | None:
        """Find the process that a lease will belong to: the wished one, else the caller.

        None where it can't be known and is not `required`. Raises InvalidRequest for a process that is gone or not
        known, NotOwner for somebody else's, OtherNetwork for one of another network namespace.
        """
        self.check_caller(caller)
        pid = caller.pid if request_pid is None else self._translate(request_pid, caller)
        if pid is None or (caller.known_by == "token" and request_pid is None):
            if required:
                raise InvalidRequest(
                    "which process calls can't be known here: give 'ttl' (seconds), and renew in time", pointer="/ttl"
                )
            return None
        try:
            process = self._processes.find(pid, caller.known_by)
        except ForeignNetwork as error:
            raise OtherNetwork(
                f"process {pid} lives in another network namespace: its ports are not this host's; run "
                "portd in that namespace",
                pointer="/pid" if request_pid else None,
            ) from error
        except ProcessGone as error:
            if not required and request_pid is None:
                return None
            raise InvalidRequest(f"there is no process {pid} (any more)", pointer="/pid") from error
        except OSError as error:
            raise Busy(FILE_LIMIT) from error
        if request_pid is None and process.owner.uid != caller.uid:
            # Credentials are those of connect(): the pid may have passed on to another user's process since.
            raise InvalidRequest(f"process {pid} is not the one that connected: connect again", pointer="/pid")
        if request_pid is not None and not caller.admin and process.owner.uid != caller.uid:
            raise NotOwner(
                f"process {pid} belongs to uid {process.owner.uid}: only root or the admin group may lease for it",
                pointer="/pid",
            )
        return process

    def check_caller(self, caller: Caller) -> None:
        """Refuse a caller that may not have ports or sockets of this host: one in another network namespace, and one
        whose process can't be known any more. Raises OtherNetwork, Unauthenticated, Busy."""
        if caller.known_by == "token":
            return  # it is on another host, or behind a proxy: its token says who it is
        if caller.uid is None:
            raise Unauthenticated("the kernel does not know the other end of this connection: connect again")
        if caller.other_network:
            raise OtherNetwork(
                "the calling process is in another network namespace: its ports are not this host's; run portd in that "
                "namespace"
            )
        if caller.pid is not None:
            try:
                self._processes.find(caller.pid, caller.known_by)
            except ForeignNetwork as error:
                raise OtherNetwork(
                    f"the calling process {caller.pid} is in another network namespace: its ports are not this host's; "
                    "run portd in that namespace"
                ) from error
            except ProcessGone as error:
                raise OtherNetwork(
                    f"process {caller.pid}, which opened this connection, has exited: connect again"
                ) from error
            except OSError as error:
                raise Busy(FILE_LIMIT) from error

    def _translate(self, request_pid: int, caller: Caller) -> int:
        """Return portd's number for a process that the caller names in its own pid namespace; raises InvalidRequest."""
        if caller.known_by == "token":
            return request_pid
        try:
            if caller.pid is None:
                raise ProcessGone(request_pid)
            return self._processes.translate(request_pid, caller.pid)
        except ProcessGone as error:
            raise InvalidRequest(
                f"there is no process {request_pid} in the caller's pid namespace that portd can see", pointer="/pid"
            ) from error

    def check_check(self, check: Check | None, protocol: Protocol, uid: int | None) -> None:
        """Refuse a check that can't be made here for a lease of this user; raises InvalidRequest."""
        if check is not None:
            validate_check(check, protocol, uid, CheckPolicy(self.policy.daemon_uid, self.policy.allow_commands))

    # --- parts of a decision ---

    def _check(self, request: LeaseRequest) -> None:
        if request.pool not in self._allocator.pools():
            raise InvalidRequest(
                f"there is no pool {request.pool}; there is: {', '.join(self._allocator.pools())}", pointer="/pool"
            )
        if request.ttl is not None and request.ttl > self.policy.max_ttl_s:
            raise InvalidRequest(
                f"a ttl of more than {self.policy.max_ttl_s:g} s (max_ttl) is not granted", pointer="/ttl"
            )
        if request.exact and request.port is None:
            raise InvalidRequest("'exact' needs a 'port'", pointer="/exact")

    @staticmethod
    def _owner(caller: Caller, process: Process | None) -> tuple[Owner, ProcessId | None]:
        if process is None:
            return Owner(uid=caller.uid, known_by=caller.known_by), None
        return process.owner, process.id

    def _hold(self, request: LeaseRequest, protocol: Protocol) -> HoldKind:
        if request.hold == "shared" and protocol == "udp":
            raise InvalidRequest(
                "a udp port can't be held 'shared': the last to bind gets every datagram; use "
                "'exclusive' (by handoff) or 'none'",
                pointer="/hold",
            )
        if request.hold is not None:
            return request.hold
        return "none" if protocol == "udp" else self.policy.hold

    def _address(self, request: LeaseRequest, instance: str) -> tuple[str, bool]:
        if request.address == OWN_ADDRESS:
            return self._allocator.own_address(request.service, instance), True
        return _normal_address(request.address), False

    def _adopt(self, ask: Ask) -> Binding:
        """Return the binding of a port that its process listens on; raises PortReserved, PortTaken."""
        assert ask.port is not None, "checked with the request"
        place = Binding(ask.protocol, ask.address, ask.port)
        other = self._allocator.reserved_for(ask.name[0], place)
        if other is not None:
            raise PortReserved(f"port {ask.port} is static for {other}: adopt it as that service", pointer="/port")
        lease = self._table.conflicting(place)
        if lease is not None:
            raise PortTaken(f"port {ask.port} is leased already, by {lease.instance} ({lease.id})", pointer="/port")
        return place

    def _find(self, lease_id: str, ask: Ask, hold: HoldKind, now: Now, *, privileged: bool, whole: bool) -> Binding:
        """Find a port that works. `whole`: its number must be free at every address of this host."""
        tries = 0

        def works(place: Binding) -> bool:
            nonlocal tries
            if place.port < PRIVILEGED_BELOW and not privileged:
                if ask.exact:
                    raise PortReserved(
                        f"port {place.port} is privileged: only root, the admin group or a static port "
                        "of the configuration gets it; or ask for an own address",
                        pointer="/port",
                    )
                return False
            if self._table.conflicting(place) is not None:
                return False
            tries += 1
            if tries > TRIES_MAX:
                raise Busy(f"{TRIES_MAX} ports of pool {ask.pool} in a row are taken by foreign processes; try again")
            taken = self._holds.take(lease_id, place.protocol, place.address, place.port, hold, whole=whole)
            if taken == "taken":
                return True
            if taken == "busy" and self._allocator.pool_of(place.port) is not None and not self._mine(place):
                self._allocator.decline(place, now.tick)
            elif taken == "no_address":
                raise InvalidRequest(f"{place.address} is not an address of this host", pointer="/address")
            elif taken == "no_descriptors":
                raise Busy(FILE_LIMIT)
            elif taken == "forbidden" and ask.exact:
                raise PortReserved(
                    f"portd may not bind port {place.port}: it lacks CAP_NET_BIND_SERVICE", pointer="/port"
                )
            return False

        return self._allocator.pick(ask, works)

    def _mine(self, place: Binding) -> bool:
        return bool(self._table.on_port(place.port))


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
