"""LeaseTable: every live lease, with an index for each query.

A grant on its way is *reserved* first: its name and binding are in the indexes from the moment of the decision, before
anything is durable, so two grants can't collide in between. Applying its event makes it live. A reservation carries the
request that it belongs to. The table never decides; it refuses what would be wrong.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from portd.core.bindings import Binding, binding_of, conflicts
from portd.core.model import Event, Lease, ProcessId
from portd.core.own_addresses import User

_NOTHING: Mapping[str, Lease] = {}
_WILDCARDS = ("0.0.0.0", "::")

Request = Any
"""A request in flight. The table only keeps it: the core does not know what it is."""


class LeaseTable:
    """Indexes over the live leases and the reservations. Every query costs its answer, never a walk over all."""

    def __init__(self) -> None:
        self.revision = 0
        self._live: dict[str, Lease] = {}
        self.get: Callable[[str], Lease | None] = self._live.get
        """Returns a live lease by its id, or None."""
        self._reserved: dict[str, tuple[Lease, Request]] = {}
        self._moving: dict[str, tuple[Lease, Request]] = {}
        # By id from here on, so that most events change nothing but the lease itself.
        self._names: dict[tuple[str, str, str], str] = {}
        self._bindings: dict[int, dict[str, list[str]]] = {}
        self._processes: dict[ProcessId, dict[str, None]] = {}
        self._services: dict[str, dict[str, Lease]] = {}
        self._owners: Counter[ProcessId] = Counter()
        self._users: dict[User, int] = {}
        self._instances: dict[str, _Instances] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._live.values())

    # --- queries ---

    def named(self, service: str, instance: str, endpoint: str) -> Lease | None:
        """Return the lease or reservation that has this name, or None."""
        lease_id = self._names.get((service, instance, endpoint))
        return None if lease_id is None else self._lease(lease_id)

    def request_of(self, lease_id: str) -> Request | None:
        """Return the request in flight that reserved this lease, or its move; None where there is none."""
        reserved = self._reserved.get(lease_id) or self._moving.get(lease_id)
        return None if reserved is None else reserved[1]

    def conflicting(self, binding: Binding) -> Lease | None:
        """Return a lease or reservation that the binding would conflict with by the kernel's rules, or None."""
        by_address = self._bindings.get(binding.port)
        if not by_address:
            return None
        # A plain address conflicts with itself and the wildcards alone, which keeps this constant for own addresses.
        nearby: Iterable[str] = by_address if binding.address in _WILDCARDS else (binding.address, *_WILDCARDS)
        for address in nearby:
            for lease_id in by_address.get(address, ()):
                lease = self._lease(lease_id)
                if conflicts(Binding(lease.protocol, address, binding.port), binding):
                    return lease
        return None

    def on_port(self, port: int) -> list[Lease]:
        """Return the live leases of a port number."""
        by_address = self._bindings.get(port)
        if not by_address:
            return []
        live = (self._live.get(lease_id) for ids in by_address.values() for lease_id in ids)
        return [lease for lease in live if lease is not None and lease.port == port]  # not what is about to move here

    def ports(self) -> Collection[int]:
        """Return every port number that a lease or reservation is on, as a view that changes with the table."""
        return self._bindings.keys()

    def of_service(self, service: str) -> Mapping[str, Lease]:
        """Return the live leases of a service, by id."""
        return self._services.get(service, _NOTHING)

    def services(self) -> Collection[str]:
        """Return the names of services with live leases."""
        return self._services.keys()

    def of_process(self, process: ProcessId) -> list[Lease]:
        """Return the leases and reservations of a process."""
        return [self._lease(lease_id) for lease_id in self._processes.get(process, ())]

    def oldest_of_instance(self, service: str, instance: str) -> Lease | None:
        """Return the oldest lease or reservation of an instance: the instance belongs to its user. None without any."""
        instances = self._instances.get(service)
        oldest = None if instances is None else instances.oldest(instance)
        return None if oldest is None else self._lease(oldest)

    def oldest_of_service(self, service: str) -> Lease | None:
        """Return the oldest lease or reservation of a service: the name belongs to its user. None without any."""
        instances = self._instances.get(service)
        return None if instances is None else self._lease(instances.oldest_of_all())

    def is_owner(self, process: ProcessId) -> bool:
        """Return whether a lease or reservation lasts as long as this process does."""
        return process in self._owners

    def count_of_user(self, user: User) -> int:
        """Count the leases and reservations of a user."""
        return self._users.get(user, 0)

    def free_instance(self, service: str, endpoint: str, shared: Iterable[str] = ()) -> str:
        """Return the first of the `shared` instances without this endpoint, else the lowest free SERVICE-N."""
        for instance in shared:
            if (service, instance, endpoint) not in self._names:
                return instance
        instances = self._instances.get(service)
        return _numbered(service, 1) if instances is None else instances.lowest()

    # --- reservations and events ---

    def reserve(self, lease: Lease, request: Request) -> None:
        """Reserve the lease's name and binding for a grant that is on its way."""
        assert (lease.service, lease.instance, lease.endpoint) not in self._names, f"{lease.name} is reserved"
        assert lease.id not in self._reserved
        self._reserved[lease.id] = (lease, request)
        self._enter(lease)

    def release(self, lease: Lease) -> None:
        """Give a reservation up: its grant did not happen."""
        del self._reserved[lease.id]
        self._leave(lease)

    def reserve_move(self, moved: Lease, request: Request) -> None:
        """Reserve the binding that a live lease is about to move to (a decline); applying that event settles it."""
        self._moving[moved.id] = (moved, request)
        self._enter_binding(moved)

    def release_move(self, lease_id: str) -> None:
        """Give a move up; nothing happens when there is none."""
        moving = self._moving.pop(lease_id, None)
        if moving is not None:
            self._leave_binding(moving[0])

    def apply(self, event: Event) -> Lease | None:
        """Make an event true; returns the lease as it was before, None for a grant."""
        assert event.revision > self.revision, f"revision {event.revision} after {self.revision}"
        self.revision = event.revision
        lease = event.lease
        before = self._live.get(lease.id)
        if before is None or lease.state == "ended":
            self._begin_or_end(before, lease)
        else:
            if lease.port != before.port:
                self.release_move(lease.id)
                self._leave_binding(before)
                self._enter_binding(lease)
            if (lease.process, lease.lifetime) != (before.process, before.lifetime):
                self._leave_process(before)
                self._enter_process(lease)
            self._live[lease.id] = self._services[lease.service][lease.id] = lease
        return before

    def skip_to(self, revision: int) -> None:
        """Note a revision that no lease of this host has: that of a change on another host."""
        assert revision > self.revision, f"revision {revision} after {self.revision}"
        self.revision = revision

    def restore(self, leases: Iterable[Lease], revision: int) -> None:
        """Fill an empty table with what was live, at this revision."""
        assert not self._live
        for lease in leases:
            self._enter(lease)
            self._put(lease)
        self.revision = revision

    def indexes(self) -> dict[str, object]:
        """Return every index in a form that compares equal where the tables do: for tests of their consistency."""
        return {
            "names": dict(self._names),
            "bindings": {
                (port, address): sorted(ids)
                for port, by_address in self._bindings.items()
                for address, ids in by_address.items()
            },
            "processes": {process: sorted(ids) for process, ids in self._processes.items()},
            "services": {service: sorted(leases) for service, leases in self._services.items()},
            "owners": dict(self._owners),
            "users": dict(self._users),
            "instances": {
                (service, instance): sorted(ids)
                for service, instances in self._instances.items()
                for instance, ids in instances.ids().items()
            },
        }

    # --- indexes ---

    def _lease(self, lease_id: str) -> Lease:
        """Return a lease or reservation that the indexes know."""
        return self._live.get(lease_id) or self._reserved[lease_id][0]

    def _begin_or_end(self, before: Lease | None, lease: Lease) -> None:
        if lease.state != "ended":
            del self._reserved[lease.id]
            self._put(lease)
            return
        assert before is not None, f"{lease.id} was not live"
        self.release_move(lease.id)
        self._leave(before)
        del self._live[lease.id]
        self._drop_from_service(before)

    def _put(self, lease: Lease) -> None:
        self._live[lease.id] = lease
        self._services.setdefault(lease.service, {})[lease.id] = lease

    def _enter(self, lease: Lease) -> None:
        assert lease.port not in self._bindings or self.conflicting(binding_of(lease)) is None, (
            f"{binding_of(lease)} is leased"
        )
        self._names[(lease.service, lease.instance, lease.endpoint)] = lease.id
        self._enter_binding(lease)
        self._enter_process(lease)
        user = lease.uid if lease.token_name is None else lease.user
        self._users[user] = self._users.get(user, 0) + 1
        instances = self._instances.get(lease.service)
        if instances is None:
            instances = self._instances[lease.service] = _Instances(lease.service)
        instances.enter(lease.instance, lease.id)

    def _leave(self, lease: Lease) -> None:
        del self._names[(lease.service, lease.instance, lease.endpoint)]
        self._leave_binding(lease)
        self._leave_process(lease)
        user = lease.uid if lease.token_name is None else lease.user
        self._users[user] -= 1
        if not self._users[user]:
            del self._users[user]
        instances = self._instances[lease.service]
        instances.leave(lease.instance, lease.id)
        if not instances:
            del self._instances[lease.service]

    def _enter_process(self, lease: Lease) -> None:
        if lease.process is not None:
            self._processes.setdefault(lease.process, {})[lease.id] = None
            if lease.lifetime != "ttl":
                self._owners[lease.process] += 1

    def _leave_process(self, lease: Lease) -> None:
        if lease.process is None:
            return
        of_process = self._processes[lease.process]
        del of_process[lease.id]
        if not of_process:
            del self._processes[lease.process]
        if lease.lifetime != "ttl":
            self._owners[lease.process] -= 1
            if not self._owners[lease.process]:
                del self._owners[lease.process]

    def _enter_binding(self, lease: Lease) -> None:
        self._bindings.setdefault(lease.port, {}).setdefault(lease.address, []).append(lease.id)

    def _leave_binding(self, lease: Lease) -> None:
        by_address = self._bindings[lease.port]
        ids = by_address[lease.address]
        ids.remove(lease.id)
        if not ids:
            del by_address[lease.address]
            if not by_address:
                del self._bindings[lease.port]

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
        self._all: dict[str, None] = {}  # ids of all, oldest first
        self._next = 1  # no number below it is free but those in `_freed`
        self._lowest = _numbered(service, 1)
        self._freed: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._leases)

    def ids(self) -> dict[str, dict[str, None]]:
        return self._leases

    def lowest(self) -> str:
        while self._freed:
            name = _numbered(self._service, self._freed[0])
            if name not in self._leases:
                return name
            heapq.heappop(self._freed)
        while self._lowest in self._leases:
            self._next += 1
            self._lowest = _numbered(self._service, self._next)
        return self._lowest

    def oldest(self, instance: str) -> str | None:
        return next(iter(self._leases.get(instance, ())), None)

    def oldest_of_all(self) -> str:
        return next(iter(self._all))

    def enter(self, instance: str, lease_id: str) -> None:
        self._all[lease_id] = None
        self._leases.setdefault(instance, {})[lease_id] = None

    def leave(self, instance: str, lease_id: str) -> None:
        del self._all[lease_id]
        del self._leases[instance][lease_id]
        if self._leases[instance]:
            return
        del self._leases[instance]
        _, _, digits = instance.rpartition("-")
        if not digits.isdecimal() or digits[0] == "0" or int(digits) >= self._next:
            return
        if instance == _numbered(self._service, int(digits)):
            heapq.heappush(self._freed, int(digits))


def _numbered(service: str, number: int) -> str:
    """Return the name of a service's instance: SERVICE-N, cut to the 63 bytes of a DNS label (RFC 1035)."""
    suffix = f"-{number}"
    return service[: 63 - len(suffix)] + suffix
