"""A running avahi-daemon publishes for portd; when it starts or stops, the responder changes."""

from __future__ import annotations

import pytest

from portd.adapters.mdns import announcer
from tests.adapters.mdns.bed import Host, Lan, wait_for
from tests.adapters.mdns.station import Observer, Station, lease

pytestmark = pytest.mark.netns
WEB = "_http._tcp"


def beside_avahi(host: Host, **options: str) -> Station:
    """Start avahi-daemon, and a station that finds it on the bus."""
    host.start_avahi(**options)
    return Station(host, bus_address=host.bus).start()


def test_a_running_avahi_publishes_and_keeps_its_unicast_port(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    station = beside_avahi(here)
    condition = station.condition()
    assert (condition["responder"], condition["problem"]) == ("avahi", None)
    assert "avahi-daemon runs on this host" in condition["why"]
    station.put(lease("a", "Dr. Who's Café №1", "_printer._sub._http._tcp", 20001, txt={"service": "orders"}))
    station.wait_published("a")
    seen = wait_for(lambda: peer.browsed(WEB), "the peer sees it under the base type")
    assert seen == {"Dr. Who's Café №1": ("h1.local", here.address, "20001", '"service=orders"')}
    assert set(peer.browsed("_printer._sub._http._tcp")) == {"Dr. Who's Café №1"}
    assert station.lan(WEB)["Dr. Who's Café №1"].ours
    sockets = here.exec("ss", "-Hulnp", "sport = :5353")
    assert [
        line
        for line in sockets.splitlines()
        if "avahi-daemon" not in line and "224.0.0.251:5353" not in line and "[ff02::fb]:5353" not in line
    ] == [], "Avahi still gets what is sent to this host"


def test_changes_and_withdrawals_go_through_avahi(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    station = beside_avahi(here)
    station.put(lease("a", "Orders", port=20001, txt={"version": "1"}), lease("b", "Other"))
    station.wait_published("a", "b")
    observer = Observer(peer)
    station.put(lease("a", "Orders", port=20001, txt={"version": "2"}, published_as="Orders"))
    wait_for(lambda: peer.browsed(WEB).get("Orders", ("",) * 4)[3] == '"version=2"', "the new TXT is seen")
    assert observer.goodbyes() == set()
    station.put(lease("a", "Orders", port=20002, txt={"version": "2"}, published_as="Orders"))
    wait_for(lambda: peer.browsed(WEB).get("Orders", ("",) * 4)[2] == "20002", "the new port is seen")
    station.change("a", "health", health="critical")
    wait_for(lambda: peer.seen(WEB) == {"Other"}, "it is gone, and no other")
    station.close()
    wait_for(lambda: peer.seen(WEB) == set(), "an orderly stop withdraws all")


def test_a_name_in_use_is_changed_through_avahi_too(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    owner = Station(peer).start()
    owner.put(lease("o", "Orders"))
    owner.wait_published("o")
    station = beside_avahi(here)
    station.put(lease("a", "Orders"), lease("b", "Orders"))
    station.wait_published("a", "b")
    assert {station.published("a"), station.published("b")} == {"Orders (2)", "Orders (3)"}
    assert owner.published("o") == "Orders"


def test_the_responder_changes_when_avahi_stops_and_starts(lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcer, "GRACE_S", 0.5)
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    station = beside_avahi(here)
    station.put(lease("a", "Orders"))
    station.wait_published("a")
    here.stop_avahi()
    wait_for(lambda: station.condition()["responder"] == "embedded", "we take over")
    assert station.condition()["why"] == "embedded: no avahi-daemon runs on this host"
    wait_for(lambda: peer.browsed(WEB).get("Orders", ("",))[0] == "box1-portd.local", "the peer sees ours")
    here.start_avahi()
    wait_for(lambda: station.condition()["responder"] == "avahi", "Avahi takes over")
    wait_for(lambda: peer.browsed(WEB).get("Orders", ("",))[0] == "h1.local", "the peer sees Avahi's")


def test_everything_is_published_again_after_a_restart_of_avahi(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    station = beside_avahi(here)
    station.put(lease("a", "Orders"))
    station.wait_published("a")
    here.stop_avahi()
    here.start_avahi()
    wait_for(lambda: peer.browsed(WEB).get("Orders", ("",))[0] == "h1.local", "it is back")
    assert station.condition()["responder"] == "avahi"


def test_a_configured_avahi_that_does_not_run_is_reported(lan: Lan) -> None:
    here = lan.host()
    here.start_avahi()
    here.stop_avahi()
    station = Station(here, bus_address=here.bus, responder="avahi").start()
    station.put(lease("a", "Orders"))
    assert "avahi-daemon does not run" in station.condition()["problem"]
    here.start_avahi()
    station.wait_published("a")
    assert station.condition()["problem"] is None


def test_an_exclusive_port_5353_is_reported_and_stops_nothing_else(lan: Lan) -> None:
    here = lan.host()
    here.start_avahi(disallow_other_stacks="yes")
    embedded = Station(here, responder="embedded").start()
    embedded.put(lease("a", "Orders"))
    assert "Address already in use" in embedded.condition()["problem"]
    announce = wait_for(
        lambda: (found := embedded.leases["a"].announce) and found.problem and found, "its lease reports it"
    )
    assert announce.published_as is None
    auto = Station(here, bus_address=here.bus).start()
    auto.put(lease("b", "Billing"))
    auto.wait_published("b")
    assert "can't browse the LAN beside avahi-daemon" in auto.condition()["problem"]
    assert auto.lan(WEB)["Billing"].ours
