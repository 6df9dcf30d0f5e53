"""Who gets which port: pools, wishes, stickiness and quarantine. It proposes ports and never tests them itself.

A port number is in one place at a time: in its pool's line (free), used by leases, or in quarantine (cooling after a
lease, or on probation after a foreign process was met there). The line is ordered by when a number became free, so a pick
takes the longest unused one in constant time, whatever the size of the pool and however full it is. A number that is
leased for one protocol or address is not picked for another: nobody wants to explain port 20017 twice.

The kernel is asked elsewhere: the caller tries each proposal, and says what became of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import IPv4Network
from typing import Final, Literal, NamedTuple

from portd.core.bindings import Binding, binding_of, conflicts
from portd.core.errors import PoolExhausted, PortReserved, PortTaken
from portd.core.expiry import Deadlines
from portd.core.model import MAIN_ENDPOINT, Lease, Protocol
from portd.core.own_addresses import Instance, OwnAddresses

REMEMBERED_MAX: Final = 100_000
"""Endpoints whose last port is remembered, the least recently used forgotten first: about 20 MB at the most."""
PROBATION_S: Final = 5.0
"""Seconds between two looks at a port that a foreign process had: short enough that a dev server's end is noticed."""
PROBATION_SIGHTINGS: Final = 3
"""How often in a row a declined port must be seen free: a foreign process that restarts is not gone (FACTS of the field)."""
COOLING_RECHECK_S: Final = 1.0
"""Seconds until a cooled port that is still bound is looked at again."""

EndpointName = tuple[str, str, str]


class StaticPort(NamedTuple):
    """A port that the configuration gives to one service for good."""

    service: str
    port: int
    protocol: Protocol
    address: str

    @property
    def place(self) -> Binding:
        """Return the place that is reserved."""
        return Binding(self.protocol, self.address, self.port)


class Quarantine(NamedTuple):
    """A port that is kept from all but the `exempt` instance for a while, until `sightings` more looks find it free."""

    place: Binding
    kind: Literal["cooling", "declined"]
    exempt: Instance | None
    sightings: int


class PoolCount(NamedTuple):
    """How the numbers of a pool are spread: used + cooling + declined + free = size."""

    size: int
    used: int
    cooling: int
    declined: int
    free: int


class Ask(NamedTuple):
    """What the allocator needs to know of a request; `address` is resolved, never `own`."""

    name: EndpointName
    protocol: Protocol
    address: str
    port: int | None
    pool: str
    exact: bool


class Allocator:
    """The port numbers of this host, as portd gives them out."""

    def __init__(
        self,
        pools: Mapping[str, Iterable[int]],
        statics: Iterable[StaticPort],
        own_block: IPv4Network,
        cooldown_s: float,
    ) -> None:
        self.cooldown_s = cooldown_s
        self._statics = {static.service: static for static in statics}
        self._static_ports: dict[int, list[StaticPort]] = {}
        for static in self._statics.values():
            self._static_ports.setdefault(static.port, []).append(static)
        self._pool_of: dict[int, str] = {}
        self._lines: dict[str, OrderedDict[int, None]] = {}
        for pool, ports in pools.items():
            self._lines[pool] = OrderedDict.fromkeys(port for port in ports if port not in self._static_ports)
            self._pool_of.update(dict.fromkeys(self._lines[pool], pool))
        self._sizes = {pool: len(line) for pool, line in self._lines.items()}
        self._uses: dict[int, int] = {}
        self._quarantine: dict[int, list[Quarantine]] = {}
        self._looks: Deadlines[Quarantine] = Deadlines()
        self._last: OrderedDict[EndpointName, Binding] = OrderedDict()
        self._own = OwnAddresses(own_block)

    # --- picking ---

    def static_for(self, service: str, endpoint: str) -> StaticPort | None:
        """Return the static port of a service's main endpoint, or None."""
        return self._statics.get(service) if endpoint == MAIN_ENDPOINT else None

    def pick(self, ask: Ask, works: Callable[[Binding], bool]) -> Binding:
        """Return the first place that works, best first: the wish, the endpoint's last port, then the pool's longest
        unused ones.

        The caller takes it with `use`, and tells of each that a foreign process had with `decline`; the line moves on by that
        alone. An exact wish raises PortReserved when the port is another service's static one, PortTaken when it is
        cooling down for another instance or does not work; else PoolExhausted when the line is empty.
        """
        if ask.port is not None:
            other = self._reserved_for(ask, ask.port)
            cooling = self._blocked(ask, ask.port, "cooling")
            place = Binding(ask.protocol, ask.address, ask.port)
            if other is None and not cooling and works(place):  # also one on probation: the kernel tells if it is taken
                return place
            if ask.exact and other is not None:
                raise PortReserved(
                    f"port {ask.port} is static for {other}: ask for another, or without 'exact'", pointer="/port"
                )
            if ask.exact:
                state = "is cooling down after another instance" if cooling else "is taken"
                raise PortTaken(
                    f"port {ask.port} on {ask.address} {state}: ask without 'exact' for another, "
                    f"or see 'portd who {ask.port}'",
                    pointer="/port",
                )
        last = self._last.get(ask.name)
        if last is not None and last.port != ask.port and self._may_return_to(last, ask):
            place = Binding(ask.protocol, ask.address, last.port)
            if works(place):
                return place
        line = self._lines[ask.pool]
        for _ in range(len(line)):
            if not line:
                break
            port = next(iter(line))
            place = Binding(ask.protocol, ask.address, port)
            if works(place):
                return place
            if port in line:  # not this time, but nothing is wrong with it
                line.move_to_end(port)
        raise PoolExhausted(
            f"pool {ask.pool} has no free port: {self._account(ask.pool)}; "
            "release some, wait for the cooldown, or widen the pool in the configuration"
        )

    def _may_return_to(self, last: Binding, ask: Ask) -> bool:
        in_pool = last.address != ask.address or self._pool_of.get(last.port) in (None, ask.pool)
        return in_pool and self._reserved_for(ask, last.port) is None and not self._blocked(ask, last.port)

    def reserved_for(self, service: str, place: Binding) -> str | None:
        """Return the other service that a port is static for, or None."""
        for static in self._static_ports.get(place.port, ()):
            if static.service != service and conflicts(static.place, place):
                return static.service
        return None

    def _reserved_for(self, ask: Ask, port: int) -> str | None:
        return self.reserved_for(ask.name[0], Binding(ask.protocol, ask.address, port))

    def _blocked(self, ask: Ask, port: int, kind: Literal["cooling", "declined"] | None = None) -> bool:
        if port not in self._quarantine:
            return False
        return any(
            quarantine.exempt != ask.name[:2]
            and kind in (None, quarantine.kind)
            and conflicts(quarantine.place, Binding(ask.protocol, ask.address, port))
            for quarantine in self._quarantine[port]
        )

    def own_address(self, service: str, instance: str) -> str:
        """Pick the instance's own loopback address; raises PoolExhausted when the block is used up."""
        return self._own.pick((service, instance))

    # --- what became of it ---

    def use(self, lease: Lease) -> None:
        """Count the lease's port as used, from the pick on: before the grant is durable."""
        port = lease.port
        self._uses[port] = self._uses.get(port, 0) + 1
        self._leave_line(port)
        self._end_quarantines(port, lease)
        if lease.own_address:
            self._own.use(lease.address, lease.name[:2])

    def give_back(self, lease: Lease) -> None:
        """Undo `use` for a grant that did not happen: the port goes back to the head of the line."""
        self._drop_use(lease)
        self._rejoin(lease.port, at_head=True)

    def vacate(self, lease: Lease) -> None:
        """Count a lease off the port that it has moved away from; a foreign process is there, so the port is on probation."""
        self._drop_use(lease)

    def remember(self, lease: Lease) -> None:
        """Keep in mind that the endpoint had this port, so that it gets it again."""
        name = lease.name
        self._last[name] = binding_of(lease)
        self._last.move_to_end(name)
        if len(self._last) > REMEMBERED_MAX:
            self._last.popitem(last=False)
        if lease.own_address:
            self._own.remember(lease.address, lease.name[:2])

    def cool(self, lease: Lease, tick: float) -> None:
        """Count an ended lease off its port, which goes into its cooldown."""
        self._drop_use(lease)
        self.restore_cooling(lease, tick)

    def restore_cooling(self, lease: Lease, tick: float, *, age_s: float = 0.0) -> None:
        """Put an ended lease's port into its cooldown, of which `age_s` seconds have passed (a restart)."""
        self.remember(lease)
        statics = self._static_ports.get(lease.port)
        if statics and any(static.service == lease.service for static in statics):
            return  # nobody else may have it anyway
        quarantine = Quarantine(binding_of(lease), "cooling", lease.name[:2], 1)
        self._isolate(quarantine, tick + max(0.0, self.cooldown_s - age_s))

    def decline(self, place: Binding, tick: float) -> None:
        """Put a port on probation: a foreign process has it."""
        self._isolate(Quarantine(place, "declined", None, PROBATION_SIGHTINGS), tick + PROBATION_S)

    def restore_line(self, ended: Iterable[Lease]) -> None:
        """Order the lines by these ended leases, oldest end first: their ports go to the back, as they had gone."""
        for lease in ended:
            self.remember(lease)
            line = self._lines.get(self._pool_of.get(lease.port, ""))
            if line is not None and lease.port in line:
                line.move_to_end(lease.port)

    # --- quarantine ---

    def next_look(self) -> float | None:
        """Return the tick at which a quarantined port wants to be looked at, or None."""
        return self._looks.next_tick()

    def due_looks(self, tick: float) -> list[Quarantine]:
        """Take the quarantined ports that are due; each must be answered with `seen`."""
        return self._looks.pop_due(tick)

    def seen(self, quarantine: Quarantine, free: bool, tick: float) -> None:
        """Tell whether a quarantined port was found unbound; it joins the line when it has been, often enough."""
        port = quarantine.place.port
        held = self._quarantine.get(port, [])
        if quarantine not in held:
            return  # its instance took it back meanwhile
        held.remove(quarantine)
        if not held:
            self._quarantine.pop(port, None)
        left = quarantine.sightings - 1 if free else max(quarantine.sightings, 1)
        if left > 0:
            wait_s = PROBATION_S if quarantine.kind == "declined" else COOLING_RECHECK_S
            if not free and quarantine.kind == "declined":
                left = PROBATION_SIGHTINGS
            self._isolate(quarantine._replace(sightings=left), tick + wait_s)
        else:
            self._rejoin(port)

    def quarantines(self) -> Iterator[Quarantine]:
        """Yield every quarantine."""
        for held in self._quarantine.values():
            yield from held

    def quarantines_on(self, port: int) -> list[Quarantine]:
        """Return the quarantines of one port number."""
        return list(self._quarantine.get(port, ()))

    # --- accounts ---

    def statics(self) -> Iterable[StaticPort]:
        """Return every static port."""
        return self._statics.values()

    def pools(self) -> Iterable[str]:
        """Return the names of the pools."""
        return self._lines.keys()

    def pool_of(self, port: int) -> str | None:
        """Return the pool that a port number belongs to, or None."""
        return self._pool_of.get(port)

    def count(self, pool: str) -> PoolCount:
        """Count a pool's numbers; walks the used and quarantined ones: for status, not on the way of a grant."""
        used = sum(1 for port in self._uses if self._pool_of.get(port) == pool)
        kinds = {"cooling": 0, "declined": 0}
        for port, held in self._quarantine.items():
            if port not in self._uses and self._pool_of.get(port) == pool:
                kinds["declined" if any(q.kind == "declined" for q in held) else "cooling"] += 1
        return PoolCount(self._sizes[pool], used, kinds["cooling"], kinds["declined"], len(self._lines[pool]))

    def _account(self, pool: str) -> str:
        count = self.count(pool)
        return f"{count.used} of {count.size} leased, {count.cooling} cooling, {count.declined} declined"

    # --- moving numbers between line, use and quarantine ---

    def _isolate(self, quarantine: Quarantine, tick: float) -> None:
        port = quarantine.place.port
        held = self._quarantine.setdefault(port, [])
        if quarantine not in held:
            held.append(quarantine)
        self._looks.set(quarantine, tick)
        self._leave_line(port)

    def _end_quarantines(self, port: int, lease: Lease) -> None:
        held = self._quarantine.get(port)
        if not held:
            return
        for quarantine in list(held):
            if conflicts(quarantine.place, binding_of(lease)):
                held.remove(quarantine)
                self._looks.discard(quarantine)
        if not held:
            del self._quarantine[port]

    def _leave_line(self, port: int) -> None:
        pool = self._pool_of.get(port)
        if pool is not None:
            self._lines[pool].pop(port, None)

    def _rejoin(self, port: int, *, at_head: bool = False) -> None:
        pool = self._pool_of.get(port)
        if pool is None or port in self._uses or port in self._quarantine:
            return
        self._lines[pool][port] = None
        if at_head:
            self._lines[pool].move_to_end(port, last=False)

    def _drop_use(self, lease: Lease) -> None:
        left = self._uses.get(lease.port, 0) - 1
        if left > 0:
            self._uses[lease.port] = left
        else:
            self._uses.pop(lease.port, None)
        if lease.own_address:
            self._own.release(lease.address)
