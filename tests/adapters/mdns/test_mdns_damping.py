"""Health that flaps does not flood the LAN: each time it waits longer, and the lease says so."""

from __future__ import annotations

import pytest

from portd.adapters.mdns import desired
from portd.adapters.mdns.desired import Damping
from tests.adapters.mdns.bed import Lan, wait_for
from tests.adapters.mdns.station import Observer, Station, lease


def test_each_further_withdrawal_doubles_the_delay_up_to_a_minute() -> None:
    damping = Damping()
    waits = []
    for now in range(10):
        damping.note_withdrawal(float(now))
        waits.append(max(0.0, damping.until - now))
    assert waits == [0, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_a_calm_minute_resets_the_damping() -> None:
    damping = Damping()
    for now in (0.0, 1.0, 2.0, 2.0 + desired.CALM_S):
        damping.note_withdrawal(now)
    assert (damping.flap_count, damping.until) == (1, 0.0)


@pytest.mark.netns
def test_a_flapping_lease_is_announced_later_and_reports_why(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    observer = Observer(peer)
    station = Station(here).start()
    station.put(lease("a", "Orders"), lease("calm"))
    station.wait_published("a", "calm")
    station.change("a", "health", health="critical")
    station.change("a", "health", health="passing")
    station.wait_published("a")
    observer.forget()
    station.change("a", "health", health="critical")
    wait_for(lambda: observer.goodbyes() == {"Orders._http._tcp.local."}, "it is gone at once")
    station.change("a", "health", health="passing")
    announce = station.leases["a"].announce
    assert announce is not None
    assert announce.problem == "withdrawn 2 times within a short time: announced again in 2 s"
    assert station.condition()["damped"] == 1
    station.change("a", "health", health="critical")
    station.change("a", "health", health="passing")
    announce = station.leases["a"].announce
    assert announce is not None
    assert announce.problem == "withdrawn 3 times within a short time: announced again in 4 s"
    assert station.published("calm") == "calm"
    station.wait_published("a")
    assert station.leases["a"].announce.problem is None  # type: ignore[union-attr]
