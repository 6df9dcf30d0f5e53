"""Each name has one owner on a link: however it came to two, one of them takes another, and says so."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.adapters.mdns import wire
from portd.adapters.mdns.zone import Entry, HostName, Service
from portd.core.announcing import NAME_BYTES
from tests.adapters.mdns.bed import Lan, wait_for
from tests.adapters.mdns.station import Ear, Station, ask_directly, lease, legacy_query

WEB = "_http._tcp"


def entry(wish: str, name: str | None = None) -> Entry:
    return Entry(Service(id="a", type=WEB, name=wish, port=1), name or wish, HostName("box"))


def test_after_orders_comes_orders_2_and_then_3() -> None:
    claim = entry("Orders")
    names = []
    for _ in range(3):
        claim.rename()
        names.append(claim.name)
    assert names == ["Orders (2)", "Orders (3)", "Orders (4)"]


def test_a_number_that_belongs_to_the_wish_is_no_count() -> None:
    claim = entry("Room 5")
    claim.rename()
    assert claim.name == "Room 5 (2)"


def test_a_name_that_was_won_before_a_restart_goes_on_from_there() -> None:
    claim = entry("Orders", "Orders (2)")
    claim.rename()
    assert claim.name == "Orders (3)"


@given(
    st.text(min_size=1, max_size=63).filter(
        lambda text: 0 < len(text.encode(errors="replace")) <= NAME_BYTES and text.isprintable()
    )
)
def test_every_renamed_name_is_new_and_fits_a_label(wish: str) -> None:
    claim = entry(wish)
    seen = {claim.name}
    for _ in range(12):
        claim.rename()
        assert claim.name not in seen
        assert len(claim.name.encode()) <= NAME_BYTES
        seen.add(claim.name)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("box", "box-portd.local."),
        ("Box.example.org", "box-portd.local."),
        ("my_host", "my-host-portd.local."),
        ("", "host-portd.local."),
        ("x" * 70, "x" * 53 + "-portd.local."),
    ],
)
def test_the_host_name_is_portds_own_and_a_dns_label(host: str, name: str) -> None:
    assert HostName(host).full_name == name


@pytest.mark.netns
def test_two_hosts_that_want_one_name_at_one_moment_agree_on_one_owner_twenty_times(lan: Lan) -> None:
    hosts = [lan.host(), lan.host()]
    observer = lan.host()
    stations = [Station(host, "twin").start() for host in hosts]
    for number, station in enumerate(stations):
        station.put(lease("first", f"First {number}"))
    for station in stations:
        station.wait_published("first")
    host_names = {str(station.condition()["host_name"]) for station in stations}
    assert host_names == {"twin-portd.local", "twin-portd-2.local"}, "the host's name is won like any other"
    names = [f"Contest {number}" for number in range(20)]
    for name in names:  # one batch each: every contest draws its own random wait
        for station in stations:
            station.host.spawn(station._put((lease(name),), "bound"))
        time.sleep(0.03)
    for station in stations:
        station.wait_published(*names)

    for name in names:
        assert sorted(str(station.published(name)) for station in stations) == [name, f"{name} (2)"]
    queries = [
        (host.address, legacy_query(f"{name}._http._tcp.local.", wire.SRV))
        for name in (*names, *(f"{name} (2)" for name in names))
        for host in hosts
    ]
    answers = ask_directly(observer, *queries)  # asked again later, each host by itself
    for first, second in zip(answers[::2], answers[1::2], strict=True):
        assert [len(first), len(second)] in ([0, 1], [1, 0]), "one host answers to a name, the other does not"


@pytest.mark.netns
def test_a_name_that_avahi_has_is_not_taken_and_the_lease_says_which_one_is(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    peer.publish_by_avahi("Orders", WEB, 99)
    station = Station(here).start()
    station.put(lease("a", "Orders"))
    station.wait_published("a")
    announce = station.leases["a"].announce
    assert announce is not None
    assert (announce.published_as, announce.problem) == (
        "Orders (2)",
        "'Orders' is in use on the LAN: published as 'Orders (2)'",
    )
    wait_for(lambda: peer.seen(WEB) == {"Orders", "Orders (2)"}, "both are seen")
    assert peer.browsed(WEB)["Orders"][0] == "h2.local"
    station.close(takeover=True)
    successor = Station(here).start(station.leases["a"])
    wait_for(lambda: successor.reports, "it is announced again")
    assert successor.reports == [("a", "Orders (2)", announce.problem)], "without asking for the first name again"


@pytest.mark.netns
def test_two_leases_of_one_host_may_want_one_name(lan: Lan) -> None:
    station = Station(lan.host()).start()
    station.put(lease("a", "Orders"), lease("b", "Orders"), lease("c", "Orders", "_ipp._tcp"))
    station.wait_published("a", "b", "c")
    assert [station.published(lease_id) for lease_id in "abc"] == ["Orders", "Orders (2)", "Orders"]


@pytest.mark.netns
def test_when_a_cut_lan_is_joined_again_one_of_two_owners_takes_another_name(lan: Lan) -> None:
    one, other, observer = lan.host(ipv6=True), lan.host(ipv6=True), lan.host()
    ear = Ear(observer)
    stations = [Station(one).start(), Station(other).start()]
    names = [f"Orders {number}" for number in range(20)]
    lan.ip("link", "set", other.port, "nomaster")  # no link goes down: nobody is told
    for number, station in enumerate(stations):
        station.put(*(lease(name, txt={"version": str(number)}, port=20000 + number) for name in names))
        station.wait_published(*names)
    assert [station.published(name) for station in stations for name in names] == names + names
    lan.ip("link", "set", other.port, "master", "br0")

    def settled() -> bool:
        ear.ask(("_http._tcp.local.", wire.PTR))
        return all(
            sorted(str(station.published(name)) for station in stations) == [name, f"{name} (2)"] for name in names
        )

    wait_for(settled, "each name has one owner, and the other one has the next", pause_s=0.5)


@pytest.mark.netns
def test_when_a_link_was_down_its_host_asks_again_whether_its_names_are_its_own(lan: Lan) -> None:
    one, other = lan.host(), lan.host()
    stations = [Station(one).start(), Station(other).start()]
    lan.ip("link", "set", other.port, "down")
    wait_for(lambda: stations[1].condition()["interfaces"] == [], "the host has lost its link")
    for station in stations:
        station.put(lease("a", "Orders"))
    stations[0].wait_published("a")
    wait_for(lambda: stations[1].reports, "the other one can't publish")
    assert stations[1].reports == [("a", None, "no network interface to announce on is up")]
    lan.ip("link", "set", other.port, "up")
    stations[1].wait_published("a")
    assert [station.published("a") for station in stations] == ["Orders", "Orders (2)"]


@pytest.mark.netns
def test_two_daemons_on_one_host_share_its_name_and_the_first_to_go_does_not_take_it_along(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    first, second = Station(here, "box").start(), Station(here, "box").start()
    first.put(lease("a", "First"))
    first.wait_published("a")
    second.put(lease("b", "Second"))
    second.wait_published("b")
    assert first.condition()["host_name"] == second.condition()["host_name"] == "box-portd.local"
    wait_for(lambda: peer.seen(WEB) == {"First", "Second"}, "both are seen")
    first.close()
    wait_for(lambda: peer.seen(WEB) == {"Second"}, "one has gone")
    time.sleep(1.5)  # a goodbye counts after a second: only then is it seen whether it was contradicted
    assert peer.exec("avahi-resolve", "-4", "-n", "box-portd.local").split() == ["box-portd.local", here.address]


@pytest.mark.netns
def test_two_hosts_of_one_name_do_not_share_a_service_because_it_looks_the_same(lan: Lan) -> None:
    stations = [Station(lan.host(), "clone").start() for _ in range(2)]
    for station in stations:
        station.host.spawn(station._put((lease("a", "Orders"),), "bound"))
    for station in stations:
        station.wait_published("a")
    assert sorted(str(station.published("a")) for station in stations) == ["Orders", "Orders (2)"]
