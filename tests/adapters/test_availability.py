"""Series of services: they count what serves, say since when nothing does, and stay bounded."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from portd.adapters import availability
from portd.adapters.availability import Availability
from portd.core.model import Event, Lease, ReportCheck
from portd.core.visibility import serving
from tests.adapters.dns.bed import lease

STATES = st.builds(
    lease,
    service=st.sampled_from(["a", "b"]),
    number=st.integers(1, 2),
    endpoint=st.sampled_from(["main", "admin"]),
    state=st.sampled_from(["held", "bound", "bound", "conflict", "ended"]),
    health=st.sampled_from(["passing", "warning", "critical", "unknown"]),
    check=st.sampled_from([None, ReportCheck()]),
    drain=st.sampled_from([False, False, True]),
)


def gauges(kept: Availability, now: float) -> dict[str, Any]:
    return {name: values for name, _, _, values in kept.gauges(now)}


@given(st.lists(STATES, max_size=30))
def test_series_are_those_of_a_walk_over_all_leases(steps: list[Lease]) -> None:
    kept = Availability()
    live: dict[str, Lease] = {}
    for at, each in enumerate(steps):
        kept.apply(Event(at + 1, "updated", float(at), each))
        live[each.id] = each
        if each.state == "ended":
            del live[each.id]
    found = gauges(kept, len(steps))
    for service in {each.service for each in live.values()}:
        of_it = [each for each in live.values() if each.service == service]
        count = len({each.instance for each in serving(of_it)})
        assert found["portd_service_serving_instances"][service,] == count
        assert (found["portd_service_empty_seconds"][service,] == 0) == bool(count)
        assert sum(n for (name, _), n in found["portd_service_instances"].items() if name == service) == len(
            {each.instance for each in of_it}
        )


def test_empty_time_counts_from_the_event_that_emptied_the_service() -> None:
    kept = Availability()
    kept.apply(Event(1, "bound", 10.0, lease(check=ReportCheck(), health="passing")))
    kept.apply(Event(2, "health", 20.0, lease(check=ReportCheck(), health="critical")))
    kept.apply(Event(3, "updated", 25.0, lease(check=ReportCheck(), health="critical", tags=("x",))))
    assert gauges(kept, 30.0)["portd_service_empty_seconds"]["orders",] == 10.0
    kept.apply(Event(4, "ended", 31.0, lease(state="ended")))
    assert gauges(kept, 60.0)["portd_service_empty_seconds"]["orders",] == 40.0
    assert not gauges(kept, 60.0 + availability.GONE_KEPT_S)["portd_service_empty_seconds"]


def test_services_beyond_the_bound_share_one_series() -> None:
    kept = Availability()
    for number in range(availability.SERVICES_KEPT + 50):
        each = lease(f"s{number}", 1)
        kept.apply(Event(2 * number + 1, "bound", 0.0, each))
        kept.apply(Event(2 * number + 2, "ended", 0.0, replace(each, state="ended")))
    assert len(gauges(kept, 1.0)["portd_service_empty_seconds"]) == availability.SERVICES_MAX + 1
    assert len(kept._services) <= availability.SERVICES_KEPT + 1
