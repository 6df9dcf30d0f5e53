"""Each name has one owner on a link: of two owners, one switches to another name and reports it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.adapters.mdns import wire
from portd.adapters.mdns.zone import Entry, HostName, Service
from portd.core.announcing import NAME_BYTES
from tests.adapters.mdns.bed import Lan, wait_for
from tests.adapters.mdns.station import Observer, Station, ask_directly, lease, legacy_query

WEB = "_http._tcp"


def entry(requested: str, name: str | None = None) -> Entry:
    return Entry(Service(id="a", type=WEB, name=requested, port=1), name or requested, HostName("box"))


def test_renaming_counts_from_2() -> None:
    claim = entry("Orders")
    names = []
    for _ in range(3):
        claim.rename()
        names.append(claim.name)
    assert names == ["Orders (2)", "Orders (3)", "Orders (4)"]


def test_a_number_in_the_requested_name_is_not_counted_up() -> None:
    claim = entry("Room 5")
    claim.rename()
    assert claim.name == "Room 5 (2)"


def test_renaming_goes_on_from_the_name_won_before_a_restart() -> None:
    claim = entry("Orders", "Orders (2)")
    claim.rename()
    assert claim.name == "Orders (3)"


@given(
    st.text(min_size=1, max_size=63).filter(
        lambda text: 0 < len(text.encode(errors="replace")) <= NAME_BYTES and text.isprintable()
    )
)
def test_every_renamed_name_is_new_and_fits_a_label(requested: str) -> None:
    claim = entry(requested)
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
def test_two_hosts_agree_on_one_owner_of_each_name(lan: Lan) -> None:
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
    for name in names:
        for station in stations:
            station.host.spawn(station._put((lease(name),), "bound"))
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
def test_a_name_that_avahi_has_is_changed_and_reported(lan: Lan) -> None:
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
def test_two_leases_of_one_host_get_different_names(lan: Lan) -> None:
    station = Station(lan.host()).start()
    station.put(lease("a", "Orders"), lease("b", "Orders"), lease("c", "Orders", "_ipp._tcp"))
    station.wait_published("a", "b", "c")
    assert [station.published(lease_id) for lease_id in "abc"] == ["Orders", "Orders (2)", "Orders"]


@pytest.mark.netns
def test_a_joined_lan_leaves_one_owner_of_each_name(lan: Lan) -> None:
    one, other, observer = lan.host(ipv6=True), lan.host(ipv6=True), lan.host()
    observer = Observer(observer)
    stations = [Station(one).start(), Station(other).start()]
    names = [f"Orders {number}" for number in range(20)]
    lan.ip("link", "set", other.port, "nomaster")  # no link goes down: no host notices
    for number, station in enumerate(stations):
        station.put(*(lease(name, txt={"version": str(number)}, port=20000 + number) for name in names))
        station.wait_published(*names)
    assert [station.published(name) for station in stations for name in names] == names + names
    lan.ip("link", "set", other.port, "master", "br0")

    def settled() -> bool:
        observer.ask(("_http._tcp.local.", wire.PTR))
        return all(
            sorted(str(station.published(name)) for station in stations) == [name, f"{name} (2)"] for name in names
        )

    wait_for(settled, "each name has one owner, and the other one has the next", pause_s=0.5)


@pytest.mark.netns
def test_a_host_probes_again_when_its_link_returns(lan: Lan) -> None:
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
def test_a_host_name_of_two_daemons_survives_the_first_stop(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    first, second = Station(here, "box").start(), Station(here, "box").start()
    first.put(lease("a", "First"))
    first.wait_published("a")
    second.put(lease("b", "Second"))
    second.wait_published("b")
    assert first.condition()["host_name"] == second.condition()["host_name"] == "box-portd.local"
    wait_for(lambda: peer.seen(WEB) == {"First", "Second"}, "both are seen")
    observer = Observer(peer)
    first.close()
    wait_for(lambda: peer.seen(WEB) == {"Second"}, "one has gone")

    def ttls() -> list[int]:
        return [record.ttl for record in observer.responses() if record.type == wire.A]

    wait_for(lambda: 0 in ttls() and ttls()[-1] > 0, "the other one contradicts the goodbye for the host's address")
    assert peer.exec("avahi-resolve", "-4", "-n", "box-portd.local").split() == ["box-portd.local", here.address]


@pytest.mark.netns
def test_clones_do_not_share_a_service_with_equal_data(lan: Lan) -> None:
    stations = [Station(lan.host(), "clone").start() for _ in range(2)]
    for station in stations:
        station.host.spawn(station._put((lease("a", "Orders"),), "bound"))
    for station in stations:
        station.wait_published("a")
    assert sorted(str(station.published("a")) for station in stations) == ["Orders", "Orders (2)"]
