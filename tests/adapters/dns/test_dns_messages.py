"""What a message must be: ids, cases, codes, sizes, rotation (RFC 1035, 2308, 6891, 8482). dnspython is the judge."""

from __future__ import annotations

from collections import Counter

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portd.adapters.dns.message import Limits, Responder
from portd.adapters.dns.zone import Zone
from tests.adapters.dns.bed import CHECK, ask_for, lease

LIMITS = Limits(512, 16384)
TCP = Limits(65535, 65535)


class Asked:
    """A zone, and what a responder says about it."""

    def __init__(self, *leases, ttl=0):
        self.zone = Zone("portd.internal.", ttl, ("127.0.0.1", "::1"))
        self.counts: Counter[tuple[str, str]] = Counter()
        self.responder = Responder(self.zone, lambda qtype, rcode: self.counts.update([(qtype, rcode)]))
        for each in leases:
            self.zone.apply(each)

    def wire(self, query, limits=LIMITS):
        return self.responder.respond(query if isinstance(query, bytes) else query.to_wire(), limits)

    def ask(self, name, rdtype, limits=LIMITS, **more):
        query = ask_for(name, rdtype, **more)
        answer = dns.message.from_wire(self.wire(query, limits))
        assert query.is_response(answer)
        return answer


def many(count):
    return [lease(number=number) for number in range(1, count + 1)]


def texts(section):
    return [record.to_text() for rrset in section for record in rrset]


@pytest.mark.parametrize("rdtype", ["A", "AAAA", "SOA", "HTTPS", "ANY"])
@pytest.mark.parametrize("name", ["oRDers", "Orders-1.orderS", "_TCP", "NoBody", "eXample.com."])
def test_the_question_comes_back_as_it_was_asked(name, rdtype):
    query = ask_for(name, rdtype).to_wire()
    answer = Asked(lease()).wire(query)
    assert answer[:2] == query[:2]
    assert answer[12 : len(query)] == query[12:]


@pytest.mark.parametrize("name", ["orders", "_orders._tcp", "orders-1.orders", "_tcp", "nobody", "", "example.com."])
def test_the_case_of_a_question_makes_no_other_difference(name):
    lower = ask_for(name, "SRV").to_wire()
    upper = lower[:12] + lower[12:].upper()  # no length of a label is a letter: they are 63 at most
    asked = Asked(lease())
    plain, loud = asked.wire(lower), asked.wire(upper)
    assert (loud[:12], loud[len(upper) :]) == (plain[:12], plain[len(lower) :])


@pytest.mark.parametrize("name", ["orders", "nobody", "_tcp", "example.com."])
@pytest.mark.parametrize("desired", [0, dns.flags.RD])
def test_recursion_desired_is_copied_and_never_available(name, desired):
    answer = Asked(lease()).ask(name, "A", flags=desired)
    assert answer.flags & dns.flags.RD == desired
    assert not answer.flags & dns.flags.RA


@pytest.mark.parametrize(
    ("name", "rdtype", "rcode"),
    [
        ("orders", "A", "NOERROR"),
        ("orders", "AAAA", "NOERROR"),
        ("orders", "HTTPS", "NOERROR"),
        ("", "A", "NOERROR"),
        ("_tcp", "SRV", "NOERROR"),
        ("_tcp.orders", "SRV", "NOERROR"),
        ("_udp", "SRV", "NXDOMAIN"),
        ("_metrics._tcp.orders", "SRV", "NXDOMAIN"),
        ("orders-2.orders", "A", "NXDOMAIN"),
        ("x.orders-1.orders", "A", "NXDOMAIN"),
        ("billing", "A", "NXDOMAIN"),
        ("billing", "ANY", "NXDOMAIN"),
    ],
)
def test_nodata_and_nxdomain_differ_and_both_carry_the_soa(name, rdtype, rcode):
    answer = Asked(lease(address="127.0.0.1"), ttl=3).ask(name, rdtype)
    assert dns.rcode.to_text(answer.rcode()) == rcode
    if name == "orders" and rdtype == "A":
        return
    assert not answer.answer
    (soa,) = answer.authority
    assert soa.name.to_text() == "portd.internal."
    assert (soa.rdtype, soa.ttl, soa[0].minimum) == (dns.rdatatype.SOA, 3, 3)


def test_service_without_serving_instance_exists_and_answers_with_nothing():
    asked = Asked(lease(check=CHECK, health="critical"))
    assert asked.ask("orders", "A").rcode() == dns.rcode.NOERROR
    assert not asked.ask("orders", "A").answer
    asked.zone.apply(lease(check=CHECK, health="passing"))
    assert asked.ask("orders", "A").answer


def test_serial_grows_with_revision_in_positive_and_negative_answers():
    asked = Asked(lease())
    for revision in (1, 2, 70000, 2**32 + 5):
        asked.zone.renumber(revision)
        assert asked.ask("", "SOA").answer[0][0].serial == revision % 2**32
        assert asked.ask("nobody", "A").authority[0][0].serial == revision % 2**32


def test_the_zone_names_its_server_and_where_it_is():
    asked = Asked()
    answer = asked.ask("", "NS")
    assert texts(answer.answer) == ["ns.portd.internal."]
    assert texts(answer.additional) == ["127.0.0.1", "::1"]
    assert texts(asked.ask("ns", "A").answer) == ["127.0.0.1"]
    asked.zone.apply(lease("ns", address="10.0.0.9"))
    assert texts(asked.ask("ns", "A").answer) == ["10.0.0.9"]
    asked.zone.apply(lease("ns", state="ended"))
    assert texts(asked.ask("ns", "A").answer) == ["127.0.0.1"]


def test_any_query_gets_hinfo_rfc8482():
    answer = Asked(lease()).ask("orders", "ANY")
    assert texts(answer.answer) == ['"RFC8482" ""']
    assert answer.answer[0].rdtype == dns.rdatatype.HINFO


@pytest.mark.parametrize(
    "name",
    [
        "example.com.",
        ".",
        "internal.",
        "xportd.internal.",
        "portd.internal.example.",
        r"x\005portd.internal.",
        r"a\007b\005portd\008internal.",
    ],
)
def test_other_zones_are_refused_those_that_only_look_alike_too(name):
    answer = Asked(lease()).ask(name, "A")
    assert answer.rcode() == dns.rcode.REFUSED
    assert not answer.flags & dns.flags.AA
    assert not answer.authority


@pytest.mark.parametrize("rdtype", ["AXFR", "IXFR"])
def test_the_zone_is_not_transferred(rdtype):
    assert Asked(lease()).ask("", rdtype, TCP).rcode() == dns.rcode.REFUSED


def test_classes_other_than_in_are_refused():
    assert Asked(lease()).ask("orders", "A", rdclass=dns.rdataclass.CH).rcode() == dns.rcode.REFUSED


@pytest.mark.parametrize("opcode", [dns.opcode.STATUS, dns.opcode.NOTIFY, dns.opcode.UPDATE])
def test_other_opcodes_are_not_implemented(opcode):
    query = ask_for("orders", "A")
    query.set_opcode(opcode)
    answer = dns.message.from_wire(Asked(lease()).wire(query.to_wire()[:12]))
    assert answer.rcode() == dns.rcode.NOTIMP
    assert answer.opcode() == opcode
    assert answer.id == query.id


@pytest.mark.parametrize("count", [0, 2, 65535])
def test_one_question_is_asked_or_the_message_is_malformed(count):
    query = bytearray(ask_for("orders", "A").to_wire())
    query[4:6] = count.to_bytes(2)
    assert dns.message.from_wire(Asked(lease()).wire(bytes(query))).rcode() == dns.rcode.FORMERR


@pytest.mark.parametrize(
    "mangle",
    [
        lambda query: query[:-1],
        lambda query: query[:-4],
        lambda query: query[:14],
        lambda query: query[:12],
        lambda query: query + b"\0",
        lambda query: query[:12] + b"\xc0\x0c\0\1\0\1",
        lambda query: query[:12] + b"\x40" * 9,
        lambda query: query[:12] + b"\x3f" + b"x" * 63 + (b"\x3f" + b"x" * 63) * 3 + b"\0\0\1\0\1",
    ],
)
def test_malformed_question_gets_formerr(mangle):
    answer = Asked(lease()).wire(mangle(ask_for("orders", "A").to_wire()))
    assert dns.message.from_wire(answer).rcode() == dns.rcode.FORMERR
    assert len(answer) == 12


def test_answers_and_scraps_are_not_answered():
    asked = Asked(lease())
    query = ask_for("orders", "A").to_wire()
    assert asked.wire(asked.wire(query)) is None
    assert all(asked.wire(query[:length]) is None for length in range(12))


# --- EDNS ---


@pytest.mark.parametrize("name", ["orders", "nobody", "example.com."])
def test_opt_is_returned_with_its_do_bit_where_sent(name):
    asked = Asked(lease())
    assert asked.ask(name, "A").edns == -1
    for flags in (0, dns.flags.DO):
        answer = asked.ask(name, "A", use_edns=0, ednsflags=flags)
        assert (answer.edns, answer.ednsflags, answer.options) == (0, flags, ())
        assert answer.payload == 1232


def test_unknown_options_are_ignored():
    options = [dns.edns.GenericOption(10, b"\1" * 8), dns.edns.GenericOption(65001, b"x" * 99)]
    assert Asked(lease()).ask("orders", "A", use_edns=0, options=options).rcode() == dns.rcode.NOERROR


@pytest.mark.parametrize("name", ["orders", "nobody", "example.com."])
def test_a_later_version_of_edns_is_declined_by_badvers(name):
    answer = Asked(lease()).ask(name, "A", use_edns=1)
    assert answer.rcode() == dns.rcode.BADVERS
    assert answer.edns == 0
    assert not answer.answer


def test_two_opts_or_a_wrong_length_are_malformed():
    query = ask_for("orders", "A", use_edns=0).to_wire()
    opt = query[-11:]
    twice = query[:10] + b"\0\2" + query[12:] + opt
    for bad in (twice, query[:-1], query[:-2] + b"\0\1"):
        assert dns.message.from_wire(Asked(lease()).wire(bad)).rcode() == dns.rcode.FORMERR


# --- sizes ---


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 60),
    offered=st.one_of(st.none(), st.integers(0, 20000)),
    name=st.sampled_from(["orders", "_orders._tcp"]),
)
def test_answer_keeps_to_size_and_says_when_it_was_cut(count, offered, name):
    asked = Asked(*many(count))
    edns = {} if offered is None else {"use_edns": 0, "payload": offered}
    rdtype = "A" if name == "orders" else "SRV"
    wire = asked.wire(ask_for(name, rdtype, **edns))
    size = max(512, min(offered or 0, 16384))
    assert len(wire) <= size
    answer = dns.message.from_wire(wire)
    records, added = texts(answer.answer), texts(answer.additional)
    assert len(set(records)) == len(records)
    assert bool(answer.flags & dns.flags.TC) == (len(records) < count)
    one = len(asked.wire(ask_for("orders-1.orders", rdtype))) - len(ask_for("orders-1.orders", rdtype).to_wire())
    one -= 16 if rdtype == "SRV" else 0  # its address
    opt = 0 if offered is None else 11
    if len(records) < count:
        assert not added, "additional records are to go first"
        assert len(wire) + one + 2 > size, "another one had fitted"
    elif rdtype == "SRV" and len(added) < count:
        assert len(wire) + 16 > size, "another address had fitted"
    assert opt == 0 or answer.edns == 0


def test_tcp_answer_is_whole_and_compresses_only_reachable_names():
    asked = Asked(*many(700))
    wire = asked.wire(ask_for("_orders._tcp", "SRV"), TCP)
    answer = dns.message.from_wire(wire)
    assert 0x4000 < len(wire) <= 65535
    assert not answer.flags & dns.flags.TC
    ports = {record.target.to_text(): record.port for record in answer.answer[0]}
    assert len(ports) == 700
    added = {rrset.name.to_text(): rrset[0].to_text() for rrset in answer.additional}
    assert len(added) > 300
    for name, address in added.items():
        number = ports[name] - 20000
        assert (name, address) == (f"orders-{number}.orders.portd.internal.", lease(number=number).address)


# --- rotation ---


@pytest.mark.parametrize(("count", "offered"), [(2, 512), (5, 512), (20, 1232), (60, 512)])
@pytest.mark.parametrize("name", ["orders", "_orders._tcp"])
def test_every_instance_comes_first_equally_often(name, count, offered):
    asked = Asked(*many(count))
    rdtype = "A" if name == "orders" else "SRV"
    firsts = Counter(texts(asked.ask(name, rdtype, use_edns=0, payload=offered).answer)[0] for _ in range(count * 3))
    assert len(firsts) == count
    assert set(firsts.values()) == {3}


@pytest.mark.parametrize("count", [30, 60, 300])
def test_repeating_over_tcp_favours_no_instance(count):
    asked = Asked(*many(count))
    firsts = Counter()
    for _ in range(count * 2):
        asked.ask("orders", "A", limits=Limits(512, 512))
        firsts[texts(asked.ask("orders", "A", limits=Limits(65535, 65535)).answer)[0]] += 1
    assert len(firsts) == count
    assert set(firsts.values()) == {2}


def test_cut_answers_show_all_of_a_thousand_instances_in_turn():
    asked = Asked(*many(1000))
    seen = {text for _ in range(1000) for text in texts(asked.ask("_orders._tcp", "SRV").answer)}
    assert len(seen) == 1000


def test_events_between_queries_do_not_favour_an_instance():
    asked = Asked(*many(4))
    firsts = Counter()
    for note in range(40):
        asked.zone.apply(msgspec.structs.replace(lease(), health_note=str(note)))
        firsts[texts(asked.ask("orders", "A").answer)[0]] += 1
    assert set(firsts.values()) == {10}


def test_outcomes_are_counted_by_type_and_code():
    asked = Asked(lease())
    asked.ask("orders", "A")
    asked.ask("orders", "AAAA")
    asked.ask("nobody", "SRV")
    asked.ask("example.com.", "TYPE999")
    asked.ask("orders", "A", use_edns=1)
    asked.wire(ask_for("orders", "A").to_wire()[:-1])
    assert asked.counts == {
        ("A", "NOERROR"): 1,
        ("AAAA", "NOERROR"): 1,
        ("SRV", "NXDOMAIN"): 1,
        ("other", "REFUSED"): 1,
        ("A", "BADVERS"): 1,
        ("other", "FORMERR"): 1,
    }
