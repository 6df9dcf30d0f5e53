"""What the LAN offers is seen when it is asked for: ours and others', resolved, live, and lost when it goes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import subprocess
from pathlib import Path

import pytest

from portd.adapters.mdns import wire
from portd.core.announcing import LanService
from portd.core.errors import InvalidRequest
from tests.adapters.mdns.bed import Lan, wait_for
from tests.adapters.mdns.station import Observer, Station, lease
from tests.support.npm import npm

pytestmark = pytest.mark.netns
WEB = "_http._tcp"


def queries(observer: Observer) -> list[str]:
    """The names that were asked for, probes aside."""
    return [
        question.name
        for _, _, message in observer.received
        if message.is_query() and not message.is_probe()
        for question in message.questions
    ]


def test_all_types_and_instances_are_listed_ours_and_others(lan: Lan) -> None:
    here, other, avahi = lan.host(), lan.host(), lan.host()
    avahi.start_avahi()
    avahi.publish_by_avahi("Avahi's Printer", "_ipp._tcp", 631, "rp=queue", "note=a.b")
    others = Station(other, "other").start()
    others.put(lease("o", "Dr. Who's Café №1", port=20001, txt={"service": "orders"}))
    others.wait_published("o")
    station = Station(here, "box").start()
    station.put(lease("m", "Mine", port=20002))
    station.wait_published("m")
    assert station.lan() == {
        "Avahi's Printer": LanService(
            type="_ipp._tcp",
            name="Avahi's Printer",
            host="h3.local",
            addresses=(avahi.address,),
            port=631,
            txt={"rp": "queue", "note": "a.b"},
        ),
        "Dr. Who's Café №1": LanService(
            type=WEB,
            name="Dr. Who's Café №1",
            host="other-portd.local",
            addresses=(other.address,),
            port=20001,
            txt={"service": "orders"},
        ),
        "Mine": LanService(
            type=WEB, name="Mine", host="box-portd.local", addresses=(here.address,), port=20002, ours=True
        ),
    }
    assert set(station.lan(WEB)) == {"Dr. Who's Café №1", "Mine"}
    assert station.lan("_nothing._tcp") == {}


def test_browsing_starts_with_a_listing_and_then_uses_the_cache(lan: Lan) -> None:
    here, other = lan.host(), lan.host()
    others = Station(other).start()
    others.put(lease("o", "There"))
    station = Station(here).start()
    station.put(lease("m", "Mine"))
    others.wait_published("o")
    station.wait_published("m")
    observer = Observer(other)
    assert station.condition()["browsing"] is False
    assert set(station.lan(WEB)) == {"There", "Mine"}
    wait_for(lambda: queries(observer), "it was asked")
    assert set(queries(observer)) <= {"_http._tcp.local."}, "for what somebody wanted to know, and no more"

    async def twice() -> bool:
        """The second answer needs no time: it is there before the loop does anything else."""
        waiting = asyncio.ensure_future(station.announcer.lan(WEB))
        await asyncio.sleep(0)
        return waiting.done()

    assert here.call(twice())


def test_a_service_that_falls_silent_is_lost_within_its_ttl(lan: Lan) -> None:
    here, other = lan.host(), lan.host()
    station = Station(here).start()
    station.lan(WEB)
    observer = Observer(other)  # announces once, for two seconds, and then falls silent
    name = "Silent._http._tcp.local."
    records = [
        wire.pointer("_http._tcp.local.", name),
        wire.service(name, 1, "silent.local."),
        wire.text(name, b"\0"),
        wire.address("silent.local.", bytes([10, 9, 0, 99])),
    ]
    observer.send(wire.encode_response([wire.with_ttl(record, 2) for record in records]))
    wait_for(lambda: "Silent" in station.lan(WEB), "it is listed")
    wait_for(lambda: "Silent" not in station.lan(WEB), "it is lost")


def test_an_invalid_type_is_rejected(lan: Lan) -> None:
    station = Station(lan.host()).start()
    for wrong in ("http", "_http", "_http._sctp", "\udc80._x._tcp"):
        with pytest.raises(InvalidRequest):
            station.lan(wrong)


def test_a_thousand_services_of_another_host_are_seen_and_lost(lan: Lan) -> None:
    here, other = lan.host(), lan.host()
    others = Station(other).start()
    names = [f"s{number}" for number in range(1000)]
    others.put(*(lease(name) for name in names))
    others.wait_published(*names)
    station = Station(here).start()
    wait_for(lambda: len(station.lan(WEB)) == 1000, "all are seen")
    assert set(station.lan(WEB)) == set(names)
    others.close()
    wait_for(lambda: len(station.lan(WEB)) == 0, "all are lost")


def test_malformed_packets_break_nothing(lan: Lan) -> None:
    here, other = lan.host(), lan.host()
    station = Station(here).start()
    station.put(lease("m", "Mine"))
    station.wait_published("m")
    station.lan(WEB)
    observer = Observer(other)
    chance = random.Random(6762)
    sane = [
        *wire.encode_probe([("Mine._http._tcp.local.", [wire.text("Mine._http._tcp.local.", b"\0")])]),
        *wire.encode_response(
            [
                wire.pointer("_http._tcp.local.", "Other._http._tcp.local."),
                wire.service("Other._http._tcp.local.", 1, "other.local."),
            ]
        ),
        *wire.encode_query([("_http._tcp.local.", wire.PTR), ("Mine._http._tcp.local.", wire.ANY)]),
    ]
    broken = [chance.randbytes(chance.randrange(64)) for _ in range(100)]
    for packet in sane:
        for _ in range(300):
            spoilt = bytearray(packet)
            for _ in range(chance.randrange(1, 4)):
                spoilt[chance.randrange(len(spoilt))] = chance.randrange(256)
            broken.append(bytes(spoilt))
    label = b"\xff" * 63  # no UTF-8: read, it would be three times as long
    long = b"\x3f" + b"x" * 63
    for name in (bytes([63]) + label, long + long, long + long + long, b"\0"):
        target = name + b"\x05_http\x04_tcp\x05local\0"
        head = bytes.fromhex("000084000000000100000000")
        broken.append(
            head
            + b"\x05_http\x04_tcp\x05local\0"
            + bytes.fromhex("000c000100001194")
            + len(target).to_bytes(2, "big")
            + target
        )
    observer.send(broken)
    others = Station(other).start()
    others.put(lease("o", "There"))
    others.wait_published("o")
    wait_for(lambda: {"There", "Mine"} <= set(station.lan(WEB)), "all works as before", 30.0)
    assert station.condition()["problem"] is None


BONJOUR = """
const { Bonjour } = require('bonjour-service');
const bonjour = new Bonjour();
bonjour.publish({ name: 'From Node', type: 'http', port: 3000, txt: { a: 'b' } });
bonjour.find({ type: 'http' }, service => console.log(JSON.stringify(
  { name: service.name, host: service.host, port: service.port, txt: service.txt, addresses: service.addresses })));
"""


@pytest.fixture(scope="session")
def bonjour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with npm's bonjour-service in it."""
    directory = tmp_path_factory.mktemp("bonjour")
    (directory / "peer.js").write_text(BONJOUR)
    npm("install", "--no-audit", "--no-fund", "--prefix", str(directory), "bonjour-service@1", cwd=directory)
    return directory


def test_nodes_bonjour_service_and_portd_see_each_other(lan: Lan, bonjour: Path) -> None:
    here, node = lan.host(), lan.host()
    node.ip("route", "add", "default", "via", here.address)  # what bonjour-service needs to send at all
    station = Station(here, "box").start()
    station.put(lease("m", "Café Orders", port=20001, txt={"service": "orders"}))
    station.wait_published("m")
    process = node.start("node", str(bonjour / "peer.js"), stdout=subprocess.PIPE, stderr=None)
    assert process.stdout is not None
    output = process.stdout.fileno()
    text = bytearray()
    seen: dict[str, dict[str, object]] = {}

    def read() -> bool:
        if select.select([output], [], [], 0)[0]:  # not by line: a reader would keep a second one to itself
            text.extend(os.read(output, 65536))
        *lines, text[:] = text.split(b"\n")
        seen.update({service["name"]: service for service in map(json.loads, lines)})
        return "Café Orders" in seen

    wait_for(read, "Node sees ours")
    found = seen["Café Orders"]  # it cuts names at their first dot, so there is none in this one
    assert (found["host"], found["port"], found["txt"], found["addresses"]) == (
        "box-portd.local",
        20001,
        {"service": "orders"},
        [here.address],
    )
    theirs = wait_for(lambda: station.lan(WEB).get("From Node"), "portd sees it")
    assert (theirs.port, theirs.txt, theirs.ours) == (3000, {"a": "b"}, False)
