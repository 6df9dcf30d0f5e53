"""portd is no amplifier: who is answered, by which way, how often and how much, with a clock that tests advance."""

from __future__ import annotations

import struct
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portd.adapters.mdns import answering, wire
from portd.adapters.mdns.answering import Sending
from portd.adapters.mdns.wire import DNSIncoming, DNSPointer, DNSRecord
from tests.adapters.mdns.net import LINK, Net, NetHost, arrival, service

WEB = "_http._tcp.local."
NEIGHBOUR, ELSEWHERE = "10.9.0.77", "203.0.113.9"


@pytest.fixture(scope="module")
def many() -> NetHost:
    """A host that announces 500 services, long enough ago that nothing was multicast just now."""
    host = Net().host("box")
    host.publish(*(service(f"s{number}") for number in range(500)))
    host.net.run(30.0)
    return host


@pytest.fixture
def host(many: NetHost) -> NetHost:
    """The same host, a while later."""
    many.net.run(1300.0)
    many.net.sent.clear()
    return many


def decode(packet: bytes) -> DNSIncoming:
    message = wire.decode(packet, 1.0)
    assert message is not None
    return message


def receive(host: NetHost, packet: bytes, source: str, **fields: object) -> list[Sending]:
    """Have a query arrive; returns what is sent to single addresses at once."""
    return host.answerer.receive(host.net.now, arrival(packet, source, **fields), decode(packet))  # type: ignore[arg-type]


def query(name: str = WEB, type_: int = wire.PTR, *, unicast: bool = False) -> bytes:
    return wire.encode_query([(name, type_)], unicast=unicast)[0]


def legacy(name: str = WEB, type_: int = wire.PTR) -> bytes:
    return struct.pack(">H", 4711) + query(name, type_)[2:]


def size(sendings: list[Sending]) -> int:
    return sum(len(packet) for _, packets in sendings for packet in packets)


def multicast(host: NetHost, seconds: float) -> list[DNSRecord]:
    """Return the answers (not the additional records) multicast within this time."""
    host.net.sent.clear()
    host.net.run(seconds)
    assert all(target.address is None for _, _, target, _ in host.net.sent)
    return [record for _, _, _, message in host.net.sent for record in message.answers()[: message.num_answers]]


def rest(host: NetHost) -> None:
    """Have all records multicast, so that questions for unicast answers may be answered by unicast."""
    receive(host, query(), NEIGHBOUR)
    host.net.run(2.0)


@pytest.mark.parametrize(
    ("packet", "fields"),
    [
        (query(unicast=True), {}),
        (query(), {}),
        (query(), {"is_multicast": False}),
        (legacy(), {"port": 5999}),
        (legacy(), {"port": 5999, "is_multicast": False}),
        (legacy("box-portd.local.", wire.A), {"port": 53}),
    ],
)
def test_nothing_is_sent_to_an_address_of_another_network(
    host: NetHost, packet: bytes, fields: dict[str, object]
) -> None:
    rest(host)
    assert receive(host, packet, ELSEWHERE, **fields) == []
    host.net.sent.clear()
    host.net.run(5.0)
    assert all(target.address is None for _, _, target, _ in host.net.sent)


def test_a_neighbour_gets_the_unicast_answer_it_asked_for(host: NetHost) -> None:
    rest(host)
    name = "s7._http._tcp.local."
    (sending,) = receive(host, query(name, wire.SRV, unicast=True), NEIGHBOUR)
    assert (sending.target.address, sending.target.port) == (NEIGHBOUR, 5353)
    assert decode(sending.packets[0]).answers()[0].name == name


def test_unicast_answers_beyond_the_bound_are_multicast(host: NetHost) -> None:
    rest(host)
    host.net.run(1.0 - host.net.now % 1.0)
    sent = [sending for _ in range(50) for sending in receive(host, query(unicast=True), NEIGHBOUR)]
    assert answering.DIRECT_BYTES <= size(sent) < answering.DIRECT_BYTES * 1.1
    direct = {record.alias for _, packets in sent for packet in packets for record in decode(packet).answers()[:16]
              if isinstance(record, DNSPointer)}  # fmt: skip
    others = {record.alias for record in multicast(host, 3.0) if isinstance(record, DNSPointer)}
    assert len(direct | others) == 500, "a host that browses still learns of every service"
    assert receive(host, query(unicast=True), NEIGHBOUR), "the next second has a budget of its own"


def test_answers_to_all_addresses_together_are_bounded(host: NetHost) -> None:
    rest(host)
    host.net.run(1.0 - host.net.now % 1.0)
    sources = [f"10.9.0.{number}" for number in range(2, 200)]
    sent = [sending for source in sources for sending in receive(host, query(unicast=True), source)]
    assert size(sent) < answering.DIRECT_BYTES_IN_ALL * 1.1


def test_a_cut_legacy_answer_is_one_packet_with_tc(host: NetHost) -> None:
    (sending,) = receive(host, legacy(), NEIGHBOUR, port=5999)
    (packet,) = sending.packets
    assert len(packet) <= 1460
    assert packet[2] & 0x02
    (sending,) = receive(host, legacy("s7._http._tcp.local.", wire.SRV), NEIGHBOUR, port=5999)
    assert not sending.packets[0][2] & 0x02


def test_a_legacy_answer_of_too_many_short_records_has_tc() -> None:
    net = Net()
    host = net.host()
    host.publish(*(service(f"s{number}", type_=f"_t{number}._tcp") for number in range(40)))
    net.run(10.0)
    (sending,) = receive(host, legacy(wire.TYPES_NAME), NEIGHBOUR, port=5999)
    assert len(sending.packets[0]) < 1400
    assert sending.packets[0][2] & 0x02


def test_legacy_answers_to_one_address_are_bounded(host: NetHost) -> None:
    host.net.run(1.0 - host.net.now % 1.0)
    sent = [sending for _ in range(500) for sending in receive(host, legacy(), NEIGHBOUR, port=5999)]
    assert size(sent) < answering.DIRECT_BYTES * 1.1


@settings(max_examples=20, deadline=None)
@given(
    questions=st.lists(
        st.tuples(
            st.floats(0.0, 0.3),
            st.sampled_from([NEIGHBOUR, "10.9.0.78", ELSEWHERE]),
            st.sampled_from([WEB, "a._http._tcp.local.", "box-portd.local."]),
            st.sampled_from([wire.PTR, wire.SRV, wire.A, wire.AAAA, wire.ANY]),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_a_record_is_multicast_once_a_second_whoever_asks(
    questions: list[tuple[float, str, str, int, bool]],
) -> None:
    net = Net()
    host = net.host("box")
    host.publish(service("a"), service("b"))
    net.run(10.0)
    net.sent.clear()
    for wait_s, source, name, type_, unicast in questions:
        net.run(wait_s)
        receive(host, query(name, type_, unicast=unicast), source)
    net.run(5.0)
    answered: dict[DNSRecord, float] = {}
    for at, _, target, message in net.sent:
        assert target.address is None
        for record in message.answers():
            assert at - answered.get(record, -1.0) >= 1.0 - 1e-6
            answered[record] = at


def test_a_probe_is_answered_by_multicast_at_once(host: NetHost) -> None:
    name = "s7._http._tcp.local."
    (packet,) = wire.encode_probe([(name, [wire.service(name, 9, "other.local.")])])
    assert receive(host, packet, ELSEWHERE) == []
    assert {record.type for record in multicast(host, 0.05)} == {wire.SRV, wire.TXT}


def test_a_type_that_a_name_lacks_is_denied(host: NetHost) -> None:
    for name, types in (("box-portd.local.", [wire.A]), ("s7._http._tcp.local.", [wire.TXT, wire.SRV])):
        receive(host, query(name, wire.AAAA), NEIGHBOUR)
        (record,) = multicast(host, 1.0)
        assert (record.type, record.name, record.rdtypes) == (wire.NSEC, name, types)  # type: ignore[attr-defined]


def test_equal_questions_of_one_query_cost_one_answer(host: NetHost) -> None:
    packets = wire.encode_query([(WEB, wire.PTR)] * 300)
    for packet in packets:
        receive(host, packet, NEIGHBOUR)
    counts = Counter(record.alias for record in multicast(host, 5.0) if isinstance(record, DNSPointer))
    assert set(counts.values()) == {1}


def test_a_truncated_query_waits_for_its_known_answers(host: NetHost) -> None:
    first = bytearray(query())
    first[2] |= 0x02
    known = [wire.pointer(WEB, f"s{number}._http._tcp.local.") for number in range(499)]
    receive(host, bytes(first), NEIGHBOUR)
    for packet in wire.encode_query([], known, now_ms=known[0].created):
        receive(host, packet, NEIGHBOUR)
    assert {record.alias for record in multicast(host, 5.0) if isinstance(record, DNSPointer)} == {
        "s499._http._tcp.local."
    }


def test_truncated_queries_take_bounded_memory(host: NetHost) -> None:
    first = bytearray(query())
    first[2] |= 0x02
    for number in range(1, 255):
        receive(host, bytes(first), f"10.9.0.{number}")
    assert len(host.answerer._held) == answering.HELD_QUERIES
    for number in range(300):
        names = [(f"x{number}-{index}.local.", wire.A) for index in range(50)]
        receive(host, wire.encode_query(names)[0], "10.9.0.1")
    assert len(host.answerer._held["10.9.0.1"].questions) == answering.QUESTIONS
    for number in range(20):
        known = [wire.pointer(WEB, f"k{number}-{index}.{WEB}") for index in range(300)]
        for packet in wire.encode_query([], known, now_ms=known[0].created):
            receive(host, packet, "10.9.0.1")
    assert len(host.answerer._held["10.9.0.1"]._known) == answering.KNOWN_ANSWERS
    host.net.run(2.0)
    assert host.answerer.deadline() is None


def test_an_answer_that_is_withdrawn_meanwhile_is_not_sent(host: NetHost) -> None:
    host.publish(service("gone"))
    host.net.run(30.0)
    receive(host, query("gone._http._tcp.local.", wire.SRV), NEIGHBOUR)
    host.net.sent.clear()
    host.withdraw("gone")
    host.net.run(5.0)
    assert all(record.ttl == 0 for record in host.net.records() if record.name.startswith("gone."))


def test_an_answer_whose_name_is_contradicted_meanwhile_is_not_sent(host: NetHost) -> None:
    receive(host, query(), NEIGHBOUR)
    contradiction = wire.service("s7._http._tcp.local.", 9, "other.local.")
    host.claims.receive_response(host.net.now, LINK, [contradiction])
    aliases = {record.alias for record in multicast(host, 0.2) if isinstance(record, DNSPointer)}
    assert len(aliases) == 499
    assert "s7._http._tcp.local." not in aliases
    host.net.run(10.0)


def test_a_query_on_an_unused_interface_is_ignored(host: NetHost) -> None:
    packet = query("box-portd.local.", wire.A)
    other = arrival(packet, NEIGHBOUR)._replace(link=LINK + 1)
    assert host.answerer.receive(host.net.now, other, decode(packet)) == []
    assert host.answerer.deadline() is None
