"""What is announced is seen by real peers, under the name that was won, and is gone when it is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from portd.adapters.mdns import wire
from tests.adapters.mdns.bed import Host, Lan, wait_for
from tests.adapters.mdns.station import Observer, Station, ask_directly, ask_the_group, lease, legacy_query

pytestmark = pytest.mark.netns
WEB = "_http._tcp"


def test_a_peer_resolves_names_with_dots_blanks_and_umlauts(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    station = Station(here, "box").start()
    station.put(
        lease("a", "Dr. Who's Café №1", txt={"service": "orders", "path": "/"}, port=20001),
        lease("b", "Laser", "_printer._sub._http._tcp", port=20002),
    )
    station.wait_published("a", "b")
    seen = wait_for(lambda: len(found := peer.browsed(WEB)) == 2 and found, "both are seen under the base type")
    assert seen["Dr. Who's Café №1"][:3] == ("box-portd.local", here.address, "20001")
    assert sorted(seen["Dr. Who's Café №1"][3].split()) == ['"path=/"', '"service=orders"']
    assert set(peer.browsed("_printer._sub._http._tcp")) == {"Laser"}
    assert peer.exec("avahi-resolve", "-4", "-n", "box-portd.local").split() == ["box-portd.local", here.address]
    assert peer.resolve("box-portd.local") == here.address


def test_critical_draining_and_ended_leases_disappear_and_recovered_ones_return(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    observer = Observer(peer)
    station = Station(here).start()
    station.put(*(lease(name) for name in ("critical", "draining", "ended", "unannounced", "staying")))
    station.wait_published("critical", "draining", "ended", "unannounced", "staying")
    wait_for(lambda: len(peer.seen(WEB)) == 5, "all are seen")
    station.change("critical", "health", health="critical")
    station.change("draining", "draining", drain=True)
    station.change("unannounced", announce=None)
    station.change("ended", "ended", state="ended")
    gone = {f"{name}._http._tcp.local." for name in ("critical", "draining", "ended", "unannounced")}
    wait_for(lambda: observer.goodbyes() == gone, "each says goodbye, and no other")
    wait_for(lambda: peer.seen(WEB) == {"staying"}, "the peer has lost them")
    assert station.published("critical") is None
    station.change("critical", "health", health="passing")
    station.wait_published("critical")
    wait_for(lambda: peer.seen(WEB) == {"staying", "critical"}, "what recovered is back")


def test_endpoints_of_an_instance_appear_and_disappear_together(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    observer = Observer(peer)
    station = Station(here).start()
    main = lease("main", instance="orders-1", announce=None)
    admin = lease("Admin", instance="orders-1", endpoint="admin", check=None)
    other = lease("Other", instance="orders-2")
    station.put(main, admin, other)
    station.wait_published("Admin", "Other")
    station.change("main", "health", health="critical")
    wait_for(
        lambda: observer.goodbyes() == {"Admin._http._tcp.local."}, "a critical main endpoint takes the others out"
    )
    station.change("main", "health", health="warning")
    station.wait_published("Admin")
    station.change("main", "draining", drain=True)
    wait_for(lambda: station.published("Admin") is None, "so does a drained one")
    assert station.published("Other") == "Other"


def test_a_service_appears_only_once_its_check_has_passed(lan: Lan) -> None:
    station = Station(lan.host()).start()
    station.put(lease("unknown", health="unknown"), lease("held", state="held"), lease("serving"))
    station.wait_published("serving")
    assert {lease_id for lease_id, _, _ in station.reports} == {"serving"}
    station.change("unknown", "health", health="passing")
    station.wait_published("unknown")


def test_port_and_txt_change_in_place_without_a_goodbye(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    observer = Observer(peer)
    station = Station(here).start()
    station.put(lease("a", "Orders", txt={"version": "1"}, port=20001))
    station.wait_published("a")
    wait_for(lambda: "Orders" in peer.seen(WEB), "it is seen")
    announce = station.leases["a"].announce
    assert announce is not None
    station.put(lease("a", "Orders", txt={"version": "2"}, port=20002, published_as=announce.published_as))
    wait_for(lambda: peer.browsed(WEB).get("Orders", ("",) * 4)[2:] == ("20002", '"version=2"'), "the change is seen")
    assert observer.goodbyes() == set()


def test_an_orderly_stop_withdraws_all_and_a_takeover_none(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    observer = Observer(peer)
    station = Station(here).start()
    station.put(*(lease(f"s{number}", port=20000 + number) for number in range(20)))
    station.wait_published(*(f"s{number}" for number in range(20)))
    wait_for(lambda: len(peer.seen(WEB)) == 20, "all are seen")
    guardian = station.condition()["guardian"]
    station.close(takeover=True)
    assert not Path(f"/proc/{guardian}").exists(), "the guardian went with the daemon"
    successor = Station(here).start(*station.leases.values())
    wait_for(lambda: len(successor.reports) == 20, "the successor announces them again")
    assert observer.goodbyes() == set(), "no goodbye in between"
    assert [name for _, name, _ in successor.reports] == [f"s{number}" for number in range(20)]
    successor.close()
    wait_for(lambda: len(observer.goodbyes()) == 20, "an orderly stop says goodbye")
    wait_for(lambda: peer.seen(WEB) == set(), "the peer has lost them")


def test_a_lease_that_ended_while_portd_was_down_is_retracted(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    station = Station(here).start()
    station.put(lease("a", "Orders"))
    station.wait_published("a")
    wait_for(lambda: "Orders" in peer.seen(WEB), "it is seen")
    station.close(takeover=True)
    successor = Station(here).start()
    successor.leases["a"] = station.leases["a"]
    successor.change("a", "ended", state="ended")
    wait_for(lambda: peer.seen(WEB) == set(), "the stale service is gone")


DAEMON = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
from portd.adapters.mdns.announcer import Announcer
from portd.core.model import Event
from tests.adapters.mdns.station import lease
async def main():
    left = set(json.loads(sys.argv[2]))
    def report(lease_id, name, problem):
        left.discard(lease_id)
        if not left:
            print(announcer.condition()["guardian"], flush=True)
    announcer = Announcer("box", report, responder="embedded")
    await announcer.start()
    for lease_id in list(left):
        announcer.apply(Event(1, "bound", 0.0, lease(lease_id)))
    await asyncio.sleep(600)
asyncio.run(main())
"""


def start_daemon(host: Host, names: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a process that announces, and return it with its guardian's pid once all are announced."""
    root = str(Path(__file__).parents[3])
    process = host.start(sys.executable, "-c", DAEMON, root, json.dumps(names), stdout=subprocess.PIPE, stderr=None)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def ignores(pid: int, number: signal.Signals) -> bool:
    """Tell whether a process ignores a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.findall(r"SigIgn:\s*(\w+)", status)[0], 16) >> (number - 1) & 1)


def test_the_guardian_withdraws_the_services_of_a_killed_daemon(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    observer = Observer(peer)
    names = [f"s{number}" for number in range(40)]
    process, guardian = start_daemon(here, names)
    wait_for(lambda: len(peer.seen(WEB)) == 40, "all are seen")
    wait_for(lambda: ignores(guardian, signal.SIGTERM), "the guardian has started")
    os.kill(guardian, signal.SIGTERM)  # as a service manager would: it is to outlive that
    process.kill()
    process.wait()
    wait_for(lambda: len(observer.goodbyes()) == 40, "the guardian said goodbye to all")
    wait_for(lambda: peer.seen(WEB) == set(), "the peer has lost them")
    wait_for(lambda: not Path(f"/proc/{guardian}").exists(), "the guardian has gone too")


def test_a_killed_guardian_is_started_again(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    observer = Observer(peer)
    station = Station(here).start()
    station.put(lease("a", "Orders"))
    station.wait_published("a")
    first = station.condition()["guardian"]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: station.condition()["guardian"] not in (None, first), "another guardian is there")
    assert observer.goodbyes() == set()


def test_a_thousand_services_are_all_seen_and_all_lost(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    station = Station(here).start()
    names = [f"s{number}" for number in range(1000)]
    station.put(*(lease(name) for name in names))
    station.wait_published(*names)
    wait_for(lambda: len(peer.seen(WEB)) == 1000, "all are seen")
    station.close()
    wait_for(lambda: len(peer.seen(WEB)) == 0, "all are lost")


def test_a_legacy_resolver_gets_one_packet_of_many_services(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    station = Station(here, "box").start()
    names = [f"s{number}" for number in range(300)]
    station.put(*(lease(name) for name in names))
    station.wait_published(*names)
    (cut,), (whole,) = ask_directly(
        peer,
        (here.address, legacy_query("_http._tcp.local.", wire.PTR)),
        (here.address, legacy_query("s7._http._tcp.local.", wire.SRV)),
    )
    assert len(cut) <= 1460
    assert cut[2] & 0x02, "it says that it was cut"
    message = wire.decode(whole, 1.0)
    assert message is not None
    assert [(record.server, record.port) for record in message.answers() if isinstance(record, wire.DNSService)] == [
        ("box-portd.local.", 20000)
    ]


def test_a_forged_source_of_another_network_gets_no_packet(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    here.ip("route", "add", "default", "via", peer.address)
    peer.ip("address", "add", "203.0.113.9/32", "dev", "eth0")
    station = Station(here, "box").start()
    names = [f"s{number}" for number in range(50)]
    station.put(*(lease(name) for name in names))
    station.wait_published(*names)
    observer = Observer(peer)
    query = wire.encode_query([("_http._tcp.local.", wire.PTR)], unicast=True)[0]
    replies = peer.call(ask_the_group("203.0.113.9", peer.address, query))
    assert replies == []
    wait_for(
        lambda: any(record.name == "_http._tcp.local." for record in observer.responses()), "the group gets the answer"
    )


def test_known_answers_are_not_repeated(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    station = Station(here).start()
    station.put(lease("a", "Orders"), lease("b", "Billing"))
    station.wait_published("a", "b")
    observer = Observer(peer)
    known = wire.pointer("_http._tcp.local.", "Orders._http._tcp.local.")
    observer.send(wire.encode_query([("_http._tcp.local.", wire.PTR)], [known], now_ms=known.created))

    def said() -> set[str]:
        return {
            record.alias
            for _, _, message in observer.received
            if message.is_response()
            for record in message.answers()[: message.num_answers]
            if isinstance(record, wire.DNSPointer) and record.name == "_http._tcp.local."
        }

    wait_for(said, "there is an answer")
    observer.forget()
    observer.send(wire.encode_query([("_http._tcp.local.", wire.PTR)], [known], now_ms=known.created))
    wait_for(said, "there is another answer, after a second at the earliest")
    observer.forget()
    observer.send(wire.encode_query([("_http._tcp.local.", wire.PTR)], [known], now_ms=known.created))
    wait_for(said, "there is a third answer")
    assert said() == {"Billing._http._tcp.local."}


def test_a_missing_address_family_of_the_host_is_denied(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    station = Station(here, "box").start()
    station.put(lease("a"))
    station.wait_published("a")
    observer = Observer(peer)
    observer.ask(("box-portd.local.", wire.AAAA))
    wait_for(
        lambda: any(record.type == 47 and record.name == "box-portd.local." for record in observer.responses()),
        "NSEC denies the AAAA",
    )


def test_a_replaced_announcement_keeps_the_name_that_it_had_won(lan: Lan) -> None:
    station = Station(lan.host()).start()
    station.put(lease("a", "Orders"), lease("b", "Orders"))
    station.wait_published("a", "b")
    station.put(lease("b", "Orders"), type_="updated")
    assert station.published("b") == "Orders (2)", "reported at once: nothing has changed on the LAN"
    station.put(lease("b", "Orders", txt={"path": "/"}), type_="updated")
    station.wait_published("b")
    assert station.published("b") == "Orders (2)"
    station.put(lease("b", "Billing"), type_="updated")
    wait_for(lambda: station.published("b") == "Billing", "another requested name is another name")


def test_a_lease_that_stopped_serving_meanwhile_keeps_its_name(lan: Lan) -> None:
    here, peer = lan.host(), lan.host()
    observer = Observer(peer)
    station = Station(here).start(lease("a", "Orders", published_as="Orders (2)", state="held"))
    wait_for(lambda: observer.goodbyes() == {"Orders (2)._http._tcp.local."}, "a goodbye is sent")
    wait_for(lambda: station.published("a") is None, "and the lease is not published")
    station.change("a", "bound", state="bound")
    station.wait_published("a")
    assert station.published("a") == "Orders (2)"
