"""Which services have instances that serve, and since when others have none: what an alert is made of.

A watcher of events. Series are bounded: SERVICES_MAX services have their own, the rest are counted together under the
name "" (services are named by their users, and a series for each name would let anybody fill a Prometheus).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

from portd.core.model import Event, Lease
from portd.core.visibility import serving

SERVICES_MAX: Final = 500
"""Services with series of their own."""
GONE_KEPT_S: Final = 3600.0
"""For how long a service without leases is still reported as empty: an alert needs minutes to fire."""
SERVICES_KEPT: Final = 2_000
"""Services beyond which one without leases is forgotten at once."""
HEALTHS: Final = ("passing", "warning", "critical", "unknown")

Gauge = tuple[str, str, tuple[str, ...], Mapping[tuple[str, ...], float]]


class _Service:
    __slots__ = ("empty_at", "instances", "serving")

    def __init__(self, at: float) -> None:
        self.instances: dict[str, dict[str, Lease]] = {}  # leases by id, by instance
        self.serving: set[str] = set()
        self.empty_at: float | None = at


class Availability:
    """Counts instances by service and health. Times are epoch seconds, as events have them."""

    def __init__(self) -> None:
        self._services: OrderedDict[str, _Service] = OrderedDict()

    def restore(self, leases: Iterable[Lease], at: float) -> None:
        """Enter the live leases of before the start."""
        for lease in leases:
            self._enter(lease, at)

    def apply(self, event: Event) -> None:
        """Follow an event. A grant alone changes nothing: nobody listens yet."""
        if event.type != "granted":
            self._enter(event.lease, event.at)

    def _enter(self, lease: Lease, at: float) -> None:
        service = self._services.get(lease.service)
        if service is None:
            if lease.state == "ended":
                return
            service = self._services[lease.service] = _Service(at)
        leases = service.instances.setdefault(lease.instance, {})
        if lease.state == "ended":
            leases.pop(lease.id, None)
        else:
            leases[lease.id] = lease
        if not leases:
            del service.instances[lease.instance]
            if not service.instances and len(self._services) > SERVICES_KEPT:
                del self._services[lease.service]
                return
        if serving(leases.values()):
            service.serving.add(lease.instance)
            service.empty_at = None
        else:
            service.serving.discard(lease.instance)
            if not service.serving and service.empty_at is None:
                service.empty_at = at

    def gauges(self, now: float) -> list[Gauge]:
        """Return the gauges as of `now` (epoch seconds)."""
        self._forget_gone(now)
        instances: Counter[tuple[str, ...]] = Counter()
        available: Counter[tuple[str, ...]] = Counter()
        empty_s: dict[tuple[str, ...], float] = {}
        for number, (name, service) in enumerate(self._services.items()):
            shown = name if number < SERVICES_MAX else ""
            for health in HEALTHS:
                instances[shown, health] += 0
            for leases in service.instances.values():
                worst = max((lease.health for lease in leases.values()), key=_BADNESS.index)
                instances[shown, worst] += 1
            available[shown,] += len(service.serving)
            empty = 0.0 if service.empty_at is None else max(0.0, now - service.empty_at)
            empty_s[shown,] = max(empty, empty_s.get((shown,), 0.0))
        of_service = ("service",)
        return [
            (
                "portd_service_instances",
                "Instances of a service by the worst health of their endpoints.",
                ("service", "health"),
                {key: float(count) for key, count in instances.items()},
            ),
            (
                "portd_service_serving_instances",
                "Instances of a service that callers are given.",
                of_service,
                {key: float(count) for key, count in available.items()},
            ),
            (
                "portd_service_empty_seconds",
                "Seconds since no instance of a service serves; 0 while one does.",
                of_service,
                empty_s,
            ),
        ]

    def _forget_gone(self, now: float) -> None:
        gone = [
            name
            for name, service in self._services.items()
            if not service.instances and service.empty_at is not None and now - service.empty_at > GONE_KEPT_S
        ]
        for name in gone:
            del self._services[name]


_BADNESS: Final = ("passing", "unknown", "warning", "critical")
