"""The interfaces are as the kernel reports them: those that lead to a LAN, their addresses, and changes."""

from __future__ import annotations

import pytest

from portd.adapters.mdns import wire
from portd.adapters.mdns.interfaces import Interfaces, list_interfaces
from tests.adapters.mdns.bed import Host, Lan, wait_for
from tests.adapters.mdns.station import Observer, Station, lease

pytestmark = pytest.mark.netns
WEB = "_http._tcp"


async def _list(*wanted: str) -> Interfaces:
    return list_interfaces(wanted)


def names(host: Host, *wanted: str) -> set[str]:
    return {link.name for link in host.call(_list(*wanted)).values()}


def test_interfaces_that_lead_to_no_lan_need_configuration(lan: Lan) -> None:
    host = lan.host()
    for number, name in enumerate(("docker0", "br-0123456789ab", "virt0")):
        host.ip("link", "add", name, "type", "bridge")
        host.ip("address", "add", f"10.8.{number}.1/24", "dev", name)
        host.ip("link", "set", name, "up")
        host.ip("link", "add", f"v{number}", "type", "veth", "peer", "name", f"w{number}")
        host.ip("link", "set", f"v{number}", "master", name, "up")
        host.ip("link", "set", f"w{number}", "up")
        host.ip("address", "add", f"10.7.{number}.1/24", "dev", f"v{number}")
    host.ip("link", "add", "idle0", "type", "veth", "peer", "name", "idle1")
    host.ip("address", "add", "10.6.0.1/24", "dev", "idle0")
    wait_for(lambda: names(host, "docker0"), "a bridge has its carrier")
    assert names(host) == {"eth0", "virt0"}
    assert names(host, "lo", "docker*", "v0") == {"lo", "docker0", "v0"}
    assert names(host, "nothing") == set()


def test_a_changed_address_replaces_the_old_one_on_the_lan(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    station = Station(here, "box").start()
    station.put(lease("a", "Orders"))
    station.wait_published("a")
    wait_for(lambda: peer.browsed(WEB).get("Orders", ("", ""))[1] == here.address, "it is seen")
    here.ip("address", "add", "10.9.0.77/24", "dev", "eth0")
    here.ip("address", "del", f"{here.address}/24", "dev", "eth0")
    here.ip("address", "replace", "10.9.0.77/24", "dev", "eth0")  # it was secondary, and went with the primary
    wait_for(lambda: peer.resolve("box-portd.local") == "10.9.0.77", "the new address is known")
    wait_for(lambda: peer.browsed(WEB).get("Orders", ("", ""))[1] == "10.9.0.77", "the service has moved")
    observer = Observer(peer)  # asked again, past all caches
    observer.ask(("box-portd.local.", wire.A))
    wait_for(lambda: any(isinstance(record, wire.DNSAddress) for record in observer.responses()), "there is an answer")
    assert {record.address for record in observer.responses() if isinstance(record, wire.DNSAddress)} == {
        bytes([10, 9, 0, 77])
    }


def test_each_of_two_lans_gets_its_own_address_alone(lan: Lan) -> None:
    here, near = lan.host(), lan.host()
    with Lan() as second:
        here.attach(second, "10.10.0.1/24")
        far = second.host()
        far.ip("address", "replace", "10.10.0.9/24", "dev", "eth0")
        far.ip("address", "del", f"{far.address}/24", "dev", "eth0")
        observers = [Observer(near), Observer(far)]
        station = Station(here, "box").start()
        station.put(lease("a", "Everywhere"), lease("b", "There", address="10.10.0.1"))
        station.wait_published("a", "b")

        def announced(observer: Observer) -> tuple[set[bytes], set[str]]:
            records = observer.responses()
            return (
                {record.address for record in records if isinstance(record, wire.DNSAddress)},
                {
                    record.alias.partition(".")[0]
                    for record in records
                    if isinstance(record, wire.DNSPointer) and record.name == "_http._tcp.local."
                },
            )

        wait_for(lambda: all(announced(observer)[1] for observer in observers), "both LANs get it")
        assert announced(observers[0]) == ({bytes([10, 9, 0, 1])}, {"Everywhere"})
        wait_for(
            lambda: "There" in announced(observers[1])[1], "a lease of one address is announced where that address is"
        )
        assert announced(observers[1]) == ({bytes([10, 10, 0, 1])}, {"Everywhere", "There"})


def test_an_address_without_interface_is_its_own_leases_problem(lan: Lan) -> None:
    here = lan.host()
    station = Station(here).start()
    station.put(lease("a", address="10.99.0.1"), lease("b"))
    station.wait_published("b")
    announce = station.leases["a"].announce
    assert announce is not None
    assert (announce.published_as, announce.problem) == (
        None,
        "no network interface that is up has the address 10.99.0.1",
    )
    here.ip("address", "add", "10.99.0.1/24", "dev", "eth0")
    station.wait_published("a")
    assert station.leases["a"].announce.problem is None  # type: ignore[union-attr]


def test_ipv6_is_announced_over_ipv6_too(lan: Lan) -> None:
    here, peer = lan.host(ipv6=True), lan.host(ipv6=True)
    here.ip("address", "add", "fd00:9::1/64", "dev", "eth0")
    observer = Observer(peer)
    station = Station(here, "box").start()
    station.put(lease("a", "Six", address="::"))
    station.wait_published("a")
    wait_for(
        lambda: (
            {arrival.family.name for _, arrival, message in observer.received if message.is_response()}
            == {"AF_INET", "AF_INET6"}
        ),
        "it is announced in both families",
    )
    wait_for(lambda: any(record.type == wire.AAAA for record in observer.responses()), "with the IPv6 address")
