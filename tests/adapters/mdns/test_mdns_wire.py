"""The wire room: zeroconf's parts do what is used of them, and what they write is what dnspython reads."""

from __future__ import annotations

import importlib.metadata
import inspect

import dns.flags
import dns.message
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.adapters.mdns import wire
from portd.core.announcing import check_name

DOTTED = "Dr. Who v1.2._http._tcp.local."


def read(packet: bytes) -> dns.message.Message:
    return dns.message.from_wire(packet)


def labels(name: str) -> tuple[bytes, ...]:
    """The labels of a name as they stand in a packet that holds it twice, the second time as a pointer."""
    answer = read(wire.encode_response([wire.text(name, b"\0"), wire.text(name, b"\1a")])[0])
    names = {rrset.name for rrset in answer.answer}
    assert len(names) == 1, "the compressed name is the same name"
    return names.pop().labels


def test_zeroconf_is_the_pinned_version() -> None:
    assert importlib.metadata.version("zeroconf") == "0.154.0"


def test_the_internals_of_zeroconf_are_as_wire_expects() -> None:
    out = wire._Message(0)
    assert (out.names, out.size, out.data) == ({}, 12, [])
    assert list(inspect.signature(wire.DNSOutgoing.write_name).parameters) == ["self", "name"]
    for method in (
        "async_add_records",
        "async_expire",
        "async_all_by_details",
        "get",
        "async_mark_unique_records_older_than_1s_to_expire",
    ):
        assert callable(getattr(wire.DNSCache, method))


def test_an_instance_name_with_dots_is_one_label() -> None:
    assert labels(DOTTED) == (b"Dr. Who v1.2", b"_http", b"_tcp", b"local", b"")


def test_a_subtype_is_separate_labels() -> None:
    assert labels("_printer._sub._http._tcp.local.") == (b"_printer", b"_sub", b"_http", b"_tcp", b"local", b"")


@given(st.text(min_size=1, max_size=30))
def test_every_instance_name_survives_the_wire(text: str) -> None:
    try:
        name = check_name(text)
    except Exception:
        return
    full = f"{name}._http._tcp.local."
    packet = wire.encode_response([wire.pointer("_http._tcp.local.", full), wire.service(full, 80, "h.local.")])[0]
    pointer = read(packet).answer[0][0]
    assert pointer.target.labels[0] == name.encode()
    message = wire.decode(packet, 1.0)
    assert message is not None
    assert wire.split_instance(message.answers()[0].alias) == (name, "_http._tcp.local.")


def test_only_unique_records_carry_cache_flush() -> None:
    packet = wire.encode_response(
        [
            wire.pointer("_http._tcp.local.", DOTTED),
            wire.service(DOTTED, 80, "h.local."),
            wire.text(DOTTED, b"\0"),
            wire.address("h.local.", b"\1\2\3\4"),
        ]
    )[0]
    assert [(rrset.rdtype, bool(rrset.rdclass & 0x8000)) for rrset in read(packet).answer] == [
        (dns.rdatatype.PTR, False),
        (dns.rdatatype.SRV, True),
        (dns.rdatatype.TXT, True),
        (dns.rdatatype.A, True),
    ]


def test_a_probe_asks_for_many_names_and_proposes_their_records() -> None:
    claims = [
        (f"S{number}._http._tcp.local.", [wire.service(f"S{number}._http._tcp.local.", 80, "h.local.")])
        for number in range(30)
    ]
    packets = wire.encode_probe(claims)
    assert [len(read(packet).question) for packet in packets] == [12, 12, 6]
    first = read(packets[0])
    assert {(question.rdtype, question.rdclass) for question in first.question} == {(255, 0x8001)}
    assert {rrset.name for rrset in first.authority} == {question.name for question in first.question}


def test_probe_with_long_txts_keeps_each_question_with_its_proposal() -> None:
    names = [f"S{number}._x._tcp.local." for number in range(12)]
    claims = [(name, [wire.text(name, bytes([200]) + b"x" * 200)]) for name in names]
    for packet in wire.encode_probe(claims):
        message = read(packet)
        assert not message.flags & dns.flags.TC
        assert {rrset.name for rrset in message.authority} == {question.name for question in message.question}


def test_a_goodbye_is_the_record_with_ttl_0() -> None:
    for record in (
        wire.pointer("_http._tcp.local.", DOTTED),
        wire.service(DOTTED, 80, "h.local."),
        wire.text(DOTTED, b"\0"),
        wire.address("h.local.", bytes(4)),
        wire.denial("h.local.", [1]),
    ):
        gone = wire.with_ttl(record, 0)
        assert gone.ttl == 0
        assert gone == record
        assert gone.unique == record.unique


def test_data_is_compared_uncompressed() -> None:
    record = wire.service(DOTTED, 80, "h.local.")
    assert wire.rdata(record) == b"\0\0\0\0\0\x50\1h\5local\0"


def test_a_legacy_answer_is_one_packet_with_the_question() -> None:
    query = wire.decode(b"\x12\x34" + wire.encode_query([("_http._tcp.local.", wire.PTR)])[0][2:], 1.0)
    assert query is not None
    many = [wire.pointer("_http._tcp.local.", f"Service {n} with a long name._http._tcp.local.") for n in range(200)]
    answer = read(wire.encode_legacy(query, many, []))
    assert (answer.id, len(answer.question)) == (0x1234, 1)
    assert answer.flags & dns.flags.TC
    assert {rrset.ttl for rrset in answer.answer} == {10}
    assert not any(rrset.rdclass & 0x8000 for rrset in answer.answer)
    assert not read(wire.encode_legacy(query, many[:2], [])).flags & dns.flags.TC


def test_txt_pairs_survive_encoding() -> None:
    assert wire.decode_txt(wire.encode_txt([("a", "1=2"), ("b", ""), ("é", "ü")])) == {"a": "1=2", "b": "", "é": "ü"}
    assert wire.encode_txt([]) == b"\0"
    assert wire.decode_txt(b"\0") == {}


@pytest.mark.parametrize("data", [b"\4flag", b"\2=x", b"\3a=1\3a=2", b"\xffshort", b"\1\xff"])
def test_an_unusual_txt_has_pairs_or_nothing(data: bytes) -> None:
    assert all(key and isinstance(value, str) for key, value in wire.decode_txt(data).items())


@given(st.binary(max_size=200))
def test_garbage_raises_no_exception(data: bytes) -> None:
    message = wire.decode(data, 1.0)
    if message is not None:
        message.answers()


def test_a_goodbye_expires_a_cached_record_after_one_second() -> None:
    cache, record = wire.DNSCache(), wire.pointer("_http._tcp.local.", DOTTED)
    assert not wire.apply_goodbye(cache, record)
    cache.async_add_records([record])
    now_ms = record.created
    assert wire.apply_goodbye(cache, wire.with_ttl(record, 0))
    assert cache.async_expire(now_ms + 999) == []
    assert cache.async_expire(now_ms + 1000) == [record]
