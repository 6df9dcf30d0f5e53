"""Who gets which port: pools, requested ports, stickiness and quarantine. It proposes, and tests no port itself.

A number of a pool is used by leases, in quarantine (cooling after a lease, or on probation because a foreign process
had it), or free. What is used is the lease table's to know; the allocator keeps the free lists, in the order in which
numbers became free, so that a candidate is the longest unused one in constant time, whatever the size of the pool and
however full it is. A number that is leased for one protocol or address is not picked for another, so that a port number
identifies one lease to people.

The kernel is asked elsewhere: the caller tries each candidate, and goes on to the next one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from ipaddress import IPv4Network
from typing import Final, NamedTuple

from msgspec import Struct

from portd.core.bindings import Binding, binding_of
from portd.core.model import Lease, Protocol
from portd.core.own_addresses import Instance, OwnAddresses, User
from portd.core.quarantine import PROBATION_S, PROBATION_SIGHTINGS, Quarantine, Quarantines
from portd.core.static_ports import StaticPort, StaticPorts

REMEMBERED_MAX: Final = 100_000
"""Endpoints whose last port is remembered, the least recently used forgotten first: about 20 MB at the most."""

EndpointName = tuple[str, str, str]


class PoolCount(NamedTuple):
    """How the numbers of a pool are spread: used + cooling + declined + free = size."""

    size: int
    used: int
    cooling: int
    declined: int
    free: int


class PortRequest(Struct, frozen=True, gc=False):
    """What the allocator needs to know of a request. `address` is resolved, never `own`.

    `ports` are the requested numbers, the preferred one first; `is_exact`: no others. `is_at_share`: the user has as
    many ports as it may, and gets its own cooling ones before any free one.
    """

    name: EndpointName
    user: User
    protocol: Protocol
    address: str
    ports: Iterable[int]
    pool: str
    is_exact: bool = False
    is_at_share: bool = False

    @property
    def instance(self) -> Instance:
        """Return whose request it is: what one user had is given back to that user alone."""
        return (self.name[0], self.name[1], self.user)

    def on(self, port: int) -> Binding:
        """Return the binding that the request would get with this port."""
        return Binding(self.protocol, self.address, port)


class Allocator:
    """The port numbers of this host, as portd grants them. `used` are the numbers that leases and reservations have."""

    def __init__(
        self,
        pools: Mapping[str, Iterable[int]],
        statics: Iterable[StaticPort],
        own_block: IPv4Network,
        cooldown_s: float,
        used: Container[int],
    ) -> None:
        self.cooldown_s = cooldown_s
        self.statics = StaticPorts(statics)
        self.quarantines = Quarantines(used)
        self.own = OwnAddresses(own_block)
        self._used = used
        self._pool_of: dict[int, str] = {}
        self._free: dict[str, OrderedDict[int, None]] = {}
        for pool, ports in pools.items():
            self._free[pool] = OrderedDict.fromkeys(port for port in ports if port not in self.statics)
            self._pool_of.update(dict.fromkeys(self._free[pool], pool))
        self._numbers = {pool: tuple(free) for pool, free in self._free.items()}
        self._last: OrderedDict[tuple[EndpointName, User], tuple[Binding, bool]] = OrderedDict()

    # --- candidates ---

    def candidates(self, request: PortRequest) -> Iterator[Binding]:
        """Yield the bindings to try, best first: the requested ports, the endpoint's last port, the pool's longest
        unused ones, and when none is free the pool's longest-cooling ones.

        Whoever goes on to the next one has found that the last one can't be had.
        """
        tried: set[int] = set()
        for port in request.ports:
            binding = request.on(port)
            tried.add(port)
            if (
                self.statics.belongs_to_other(*_endpoint(request), binding) is None
                and self.quarantines.blocking(request.instance, binding, "cooling") is None
            ):  # one on probation is tried: the kernel says whether it is taken
                yield binding
        if request.is_exact:
            return
        if self._last:
            last = self._last_port(request)
            if last is not None and last not in tried:
                yield request.on(last)
        if request.is_at_share:
            yield from self._cooling(request, self.quarantines.cooling(request.user))
            return
        free, used, quarantined = self._free[request.pool], self._used, self.quarantines.by_port
        for _ in range(len(free)):
            if not free:
                break
            port = next(iter(free))
            if port in used or port in quarantined:
                del free[port]  # it comes back when its lease has ended and it has cooled down
                continue
            yield Binding(request.protocol, request.address, port)
            if port in free:
                free.move_to_end(port)
        yield from self._cooling(request, self.quarantines.cooling(of_all=True))

    def _cooling(self, request: PortRequest, quarantines: Iterable[Quarantine]) -> Iterator[Binding]:
        for quarantine in quarantines:
            port = quarantine.binding.port
            if port not in self._used and self._pool_of.get(port) == request.pool:
                if any(other.kind == "declined" for other in self.quarantines.on_port(port)):
                    continue
                yield request.on(port)

    def _last_port(self, request: PortRequest) -> int | None:
        """Return the port that the endpoint had last, if the configuration still lets it have that one."""
        found = self._last.get((request.name, request.user))
        if found is None:
            return None
        last, was_requested = found
        pool = self._pool_of.get(last.port)
        is_allowed = pool == request.pool or (pool is None and was_requested)
        binding = request.on(last.port)
        if not is_allowed or self.statics.belongs_to_other(*_endpoint(request), binding) is not None:
            return None
        return None if self.quarantines.blocking(request.instance, binding) is not None else last.port

    def is_pooled(self, port: int) -> bool:
        """Return whether a number belongs to a pool."""
        return port in self._pool_of

    # --- what became of them ---

    def put_back(self, port: int) -> None:
        """Make a number the next free one again: the grant that reserved it did not happen."""
        pool = self._pool_of.get(port)
        if pool is not None and port not in self._used and port not in self.quarantines.by_port:
            self._free[pool][port] = None
            self._free[pool].move_to_end(port, last=False)

    def remember(self, lease: Lease) -> None:
        """Record that the endpoint had this port, so that it gets it again."""
        key = (lease.name, lease.user)
        self._last[key] = (binding_of(lease), lease.port_requested)
        self._last.move_to_end(key)
        if len(self._last) > REMEMBERED_MAX:
            self._last.popitem(last=False)
        if lease.own_address:
            self.own.remember(lease.address, (lease.service, lease.instance, lease.user))

    def cool(self, lease: Lease, tick: float, *, age_s: float = 0.0) -> None:
        """Begin the cooldown of an ended lease's port, of which `age_s` seconds have passed (a restart)."""
        self.remember(lease)
        if any((each.service, each.endpoint) == lease.name[::2] for each in self.statics.on_port(lease.port)):
            return  # nobody else may have it anyway
        instance = (lease.service, lease.instance, lease.user)
        quarantine = Quarantine(binding_of(lease), "cooling", instance, lease.user, 1)
        self.quarantines.begin(quarantine, tick + max(0.0, self.cooldown_s - age_s))

    def decline(self, binding: Binding, tick: float, user: User = None) -> None:
        """Put a port on probation, because a foreign process has it. It counts to the share of a `user` who says so."""
        self.quarantines.begin(Quarantine(binding, "declined", None, user, PROBATION_SIGHTINGS), tick + PROBATION_S)

    def polled(self, quarantine: Quarantine, is_free: bool, tick: float) -> None:
        """Record whether a quarantined port was found unbound; it returns to the free list when it was often enough."""
        port = quarantine.binding.port
        if self.quarantines.polled(quarantine, is_free, tick) and port not in self._used:
            self._rejoin(port)

    def restore_order(self, ended: Iterable[Lease]) -> None:
        """Order the free lists by these ended leases, oldest end first: their ports became free in this order."""
        for lease in ended:
            self.remember(lease)
            free = self._free.get(self._pool_of.get(lease.port, ""))
            if free is not None and lease.port in free:
                free.move_to_end(lease.port)

    def _rejoin(self, port: int) -> None:
        pool = self._pool_of.get(port)
        if pool is not None:
            self._free[pool][port] = None
            self._free[pool].move_to_end(port)

    # --- queries ---

    def pools(self) -> Iterable[str]:
        """Return the names of the pools."""
        return self._free.keys()

    def numbers(self, pool: str) -> tuple[int, ...]:
        """Return the numbers of a pool, in ascending order."""
        return self._numbers[pool]

    def pool_of(self, port: int) -> str | None:
        """Return the pool that a port number belongs to, or None."""
        return self._pool_of.get(port)

    def count(self, pool: str) -> PoolCount:
        """Count a pool's numbers. Walks all of them: for status, not on the way of a grant."""
        used = cooling = declined = 0
        numbers = self._numbers[pool]
        for port in numbers:
            if port in self._used:
                used += 1
            elif port in self.quarantines.by_port:
                is_declined = any(each.kind == "declined" for each in self.quarantines.on_port(port))
                declined += is_declined
                cooling += not is_declined
        return PoolCount(len(numbers), used, cooling, declined, len(numbers) - used - cooling - declined)

    def misplaced(self, lease: Lease) -> str | None:
        """Return why the configuration would not give the lease what it has, or None. It keeps it until it ends."""
        static = self.statics.belongs_to_other(lease.service, lease.endpoint, binding_of(lease))
        if static is not None:
            return f"port {lease.port} is static for {static.service} (endpoint {static.endpoint}) now"
        if lease.own_address:
            return None if self.own.contains(lease.address) else f"{lease.address} is outside own_addresses now"
        if lease.lifetime == "static" or lease.port_requested:
            return None
        if lease.pool not in self._free:
            return f"pool {lease.pool} is no longer configured"
        if self._pool_of.get(lease.port) != lease.pool:
            return f"port {lease.port} is not in pool {lease.pool} any more"
        return None


def _endpoint(request: PortRequest) -> tuple[str, str]:
    return request.name[0], request.name[2]
