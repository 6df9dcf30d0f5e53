"""LeaseTable: every live lease, found by whatever it is asked for by.

A grant on its way is *claimed* first: its name and place are taken from the moment of the decision, before anything
is durable, so two grants can't collide in between. Applying its event makes it live. The table never decides; it
refuses what would be wrong.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from portd.core.bindings import Binding, binding_of, conflicts
from portd.core.model import Event, Lease, ProcessId

_NOTHING: Mapping[str, Lease] = {}
_WILDCARDS = ("0.0.0.0", "::")


class LeaseTable:
    """Indexes over the live leases and the claims. Every look-up costs its answer, never a walk over all."""

    def __init__(self) -> None:
        self.revision = 0
        self._live: dict[str, Lease] = {}
        self._claims: dict[str, Lease] = {}
        self._moving: dict[str, Lease] = {}
        # By id from here on, so that most events change nothing but the lease itself.
        self._names: dict[tuple[str, str, str], str] = {}
        self._places: dict[int, dict[str, list[str]]] = {}
        self._processes: dict[ProcessId, dict[str, None]] = {}
        self._services: dict[str, dict[str, Lease]] = {}
        self._owners: Counter[ProcessId] = Counter()
        self._uids: dict[int | None, int] = {}
        self._instances: dict[str, _Instances] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._live.values())

    # --- look-ups ---

    def get(self, lease_id: str) -> Lease | None:
        """Return a live lease, or None."""
        return self._live.get(lease_id)

    def named(self, service: str, instance: str, endpoint: str) -> Lease | None:
        """Return the lease or claim that has this name, or None."""
        lease_id = self._names.get((service, instance, endpoint))
        return None if lease_id is None else self._lease(lease_id)

    def conflicting(self, place: Binding) -> Lease | None:
        """Return a lease or claim that the place would collide with by the kernel's rules, or None."""
        by_address = self._places.get(place.port)
        if not by_address:
            return None
        # A plain address meets itself and the wildcards alone, which keeps this constant for own addresses.
        nearby: Iterable[str] = by_address if place.address in _WILDCARDS else (place.address, *_WILDCARDS)
        for address in nearby:
            for lease_id in by_address.get(address, ()):
                lease = self._lease(lease_id)
                if conflicts(Binding(lease.protocol, address, place.port), place):
                    return lease
        return None

    def on_port(self, port: int) -> list[Lease]:
        """Return the live leases of a port number."""
        by_address = self._places.get(port)
        if not by_address:
            return []
        live = (self._live.get(lease_id) for ids in by_address.values() for lease_id in ids)
        return [lease for lease in live if lease is not None and lease.port == port]  # not what is about to move here

    def ports(self) -> Iterable[int]:
        """Return every port number that a lease or claim is on."""
        return self._places.keys()

    def of_service(self, service: str) -> Mapping[str, Lease]:
        """Return the live leases of a service, by id."""
        return self._services.get(service, _NOTHING)

    def services(self) -> Iterable[str]:
        """Return the names of services with live leases."""
        return self._services.keys()

    def of_process(self, process: ProcessId) -> list[Lease]:
        """Return the leases and claims of a process."""
        return [self._lease(lease_id) for lease_id in self._processes.get(process, ())]

    def oldest_of_instance(self, service: str, instance: str) -> Lease | None:
        """Return the oldest lease or claim of an instance: the instance belongs to its user. None where nobody has it."""
        instances = self._instances.get(service)
        oldest = None if instances is None else instances.oldest(instance)
        return None if oldest is None else self._lease(oldest)

    def is_owner(self, process: ProcessId) -> bool:
        """Tell whether a lease or claim lasts as long as this process does."""
        return process in self._owners

    def count_of_uid(self, uid: int | None) -> int:
        """Count the leases and claims of a user."""
        return self._uids.get(uid, 0)

    def free_instance(self, service: str, endpoint: str, shared: Iterable[str] = ()) -> str:
        """Return the first of the `shared` instances without this endpoint, else the lowest free SERVICE-N."""
        for instance in shared:
            if (service, instance, endpoint) not in self._names:
                return instance
        return (self._instances.get(service) or _Instances(service)).lowest()

    # --- claims and events ---

    def claim(self, lease: Lease) -> None:
        """Take the lease's name and place for a grant that is on its way."""
        assert lease.name not in self._names, f"{lease.name} is taken"
        assert self.conflicting(binding_of(lease)) is None, f"{binding_of(lease)} is taken"
        self._claims[lease.id] = lease
        self._enter(lease)

    def disclaim(self, lease: Lease) -> None:
        """Give a claim up: its grant did not happen."""
        del self._claims[lease.id]
        self._leave(lease)

    def claim_move(self, moved: Lease) -> None:
        """Take the place that a live lease is about to move to (a decline); applying that event settles it."""
        assert self.conflicting(binding_of(moved)) is None, f"{binding_of(moved)} is taken"
        self._moving[moved.id] = moved
        self._enter_place(moved)

    def disclaim_move(self, lease_id: str) -> None:
        """Give a move up; nothing happens when there is none."""
        moved = self._moving.pop(lease_id, None)
        if moved is not None:
            self._leave_place(moved)

    def apply(self, event: Event) -> Lease | None:
        """Make an event true; returns the lease as it was before, None for a grant."""
        assert event.revision > self.revision, f"revision {event.revision} after {self.revision}"
        self.revision = event.revision
        lease = event.lease
        before = self._live.get(lease.id)
        if lease.state == "ended" or event.type in ("declined", "updated") or self._is_passed(event, before):
            self._move(before, lease)
        else:
            self._put(lease)  # the same name, place and owner: the common case
        return before

    @staticmethod
    def _is_passed(event: Event, before: Lease | None) -> bool:
        """Tell whether a live lease passed to another process; one that is taken up again was claimed, as a grant is."""
        return event.type == "passed" and before is not None

    def restore(self, leases: Iterable[Lease], revision: int) -> None:
        """Fill an empty table with what was live, at this revision."""
        assert not self._live
        for lease in leases:
            self.claim(lease)
            self._put(lease)
        self.revision = revision

    def indexes(self) -> dict[str, object]:
        """Return every index in a form that compares equal where the tables do: for tests of their consistency."""
        return {
            "names": dict(self._names),
            "places": {
                (port, address): sorted(ids)
                for port, by_address in self._places.items()
                for address, ids in by_address.items()
            },
            "processes": {process: sorted(ids) for process, ids in self._processes.items()},
            "services": {service: sorted(leases) for service, leases in self._services.items()},
            "owners": dict(self._owners),
            "uids": dict(self._uids),
            "instances": {
                (service, instance): sorted(ids)
                for service, instances in self._instances.items()
                for instance, ids in instances.ids().items()
            },
        }

    # --- indexes ---

    def _lease(self, lease_id: str) -> Lease:
        """Return a lease or claim that the indexes know."""
        return self._live.get(lease_id) or self._claims[lease_id]

    def _put(self, lease: Lease) -> None:
        if self._claims:
            self._claims.pop(lease.id, None)
        self._live[lease.id] = lease
        self._services.setdefault(lease.service, {})[lease.id] = lease

    def _move(self, before: Lease | None, lease: Lease) -> None:
        if before is not None:
            self._leave(before)
            del self._live[lease.id]
            self._drop_from_service(before)
        self.disclaim_move(lease.id)
        if lease.state != "ended":
            self._enter(lease)
            self._put(lease)

    def _enter(self, lease: Lease) -> None:
        self._names[lease.name] = lease.id
        self._enter_place(lease)
        if lease.process is not None:
            self._processes.setdefault(lease.process, {})[lease.id] = None
            if lease.lifetime != "ttl":
                self._owners[lease.process] += 1
        self._uids[lease.uid] = self._uids.get(lease.uid, 0) + 1
        self._instances.setdefault(lease.service, _Instances(lease.service)).enter(lease.instance, lease.id)

    def _leave(self, lease: Lease) -> None:
        del self._names[lease.name]
        self._leave_place(lease)
        if lease.process is not None:
            of_process = self._processes[lease.process]
            del of_process[lease.id]
            if not of_process:
                del self._processes[lease.process]
            if lease.lifetime != "ttl":
                self._owners[lease.process] -= 1
                if not self._owners[lease.process]:
                    del self._owners[lease.process]
        self._uids[lease.uid] -= 1
        if not self._uids[lease.uid]:
            del self._uids[lease.uid]
        instances = self._instances[lease.service]
        instances.leave(lease.instance, lease.id)
        if not instances:
            del self._instances[lease.service]

    def _enter_place(self, lease: Lease) -> None:
        self._places.setdefault(lease.port, {}).setdefault(lease.address, []).append(lease.id)

    def _leave_place(self, lease: Lease) -> None:
        by_address = self._places[lease.port]
        ids = by_address[lease.address]
        ids.remove(lease.id)
        if not ids:
            del by_address[lease.address]
            if not by_address:
                del self._places[lease.port]

    def _drop_from_service(self, lease: Lease) -> None:
        of_service = self._services[lease.service]
        del of_service[lease.id]
        if not of_service:
            del self._services[lease.service]


class _Instances:
    """The instance names of one service, and the lowest free number among them."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._leases: dict[str, dict[str, None]] = {}  # ids by instance, oldest first
        self._next = 1
        self._freed: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._leases)

    def ids(self) -> dict[str, dict[str, None]]:
        return self._leases

    def lowest(self) -> str:
        while self._freed:
            name = self._name(self._freed[0])
            if name not in self._leases:
                return name
            heapq.heappop(self._freed)
        while (name := self._name(self._next)) in self._leases:
            self._next += 1
        return name

    def oldest(self, instance: str) -> str | None:
        return next(iter(self._leases.get(instance, ())), None)

    def enter(self, instance: str, lease_id: str) -> None:
        self._leases.setdefault(instance, {})[lease_id] = None

    def leave(self, instance: str, lease_id: str) -> None:
        del self._leases[instance][lease_id]
        if self._leases[instance]:
            return
        del self._leases[instance]
        _, _, digits = instance.rpartition("-")
        if digits.isdecimal() and digits[0] != "0" and int(digits) < self._next and instance == self._name(int(digits)):
            heapq.heappush(self._freed, int(digits))

    def _name(self, number: int) -> str:
        suffix = f"-{number}"
        return self._service[: 63 - len(suffix)] + suffix  # an instance is a DNS label too
