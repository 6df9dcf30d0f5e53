"""Whatever is sent: no crash, and nothing sent back that is larger than a question deserves."""

from __future__ import annotations

import dns.edns
import dns.exception
import dns.message
import dns.rcode
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portd.adapters.dns.message import Limits, Responder
from portd.adapters.dns.zone import Zone
from tests.adapters.dns.bed import ask_for, lease

LIMITS = Limits(512, 1232)
REJECTIONS = {dns.rcode.FORMERR, dns.rcode.NOTIMP, dns.rcode.REFUSED}


@pytest.fixture(scope="module")
def responder():
    zone = Zone("portd.internal.", 0, ("127.0.0.1", "::1"))
    for number in range(1, 30):
        zone.apply(lease(number=number, tags=("blue",), protocol="both"))
        zone.apply(lease(number=number, endpoint="metrics"))
    return Responder(zone)


QUERIES = st.builds(
    lambda name, rdtype, edns, options: ask_for(
        name, rdtype, use_edns=edns or bool(options), payload=1232, options=options
    ).to_wire(),
    name=st.sampled_from(
        ["", "orders", "_orders._tcp", "_metrics._tcp.orders", "orders-1.orders", "_tcp", "nobody", "example.com."]
    ),
    rdtype=st.sampled_from(["A", "AAAA", "SRV", "TXT", "SOA", "NS", "ANY", "AXFR", "HTTPS"]),
    edns=st.booleans(),
    options=st.lists(st.builds(dns.edns.GenericOption, st.integers(1000, 65535), st.binary(max_size=40)), max_size=3),
)


@st.composite
def mutated(draw):
    """A real query after a few accidents."""
    query = bytearray(draw(QUERIES))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(query)))
        accident = draw(st.sampled_from(["set", "cut", "insert", "repeat", "drop"]))
        if accident == "set" and at < len(query):
            query[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 41, 63, 64, 192, 255])))
        elif accident == "cut":
            del query[max(at, 12) :]
        elif accident == "insert":
            query[at:at] = draw(st.binary(max_size=20))
        elif accident == "repeat":
            query += query[at:]
        elif accident == "drop":
            del query[at : at + draw(st.integers(1, 5))]
    return bytes(query)


def check(responder: Responder, query: bytes) -> None:
    answer = responder.respond(query, LIMITS)
    if answer is None:
        assert len(query) < 12 or query[2] & 0x80
        return
    assert answer[:2] == query[:2]
    assert answer[2] & 0x80
    assert len(answer) <= 1232
    rcode = answer[3] & 15
    if rcode in REJECTIONS:
        assert len(answer) <= len(query)
    # What the question's name is made of may be beyond dnspython's liking; the answer's own form must not be.
    parsed = dns.message.from_wire(answer)
    assert parsed.id == int.from_bytes(query[:2])


@settings(max_examples=600, deadline=None)
@given(query=st.binary(max_size=200))
def test_noise_is_harmless(responder, query):
    check(responder, query)


@settings(max_examples=600, deadline=None)
@given(noise=st.binary(max_size=120))
def test_noise_behind_a_plausible_header_is_harmless(responder, noise):
    check(responder, b"\x12\x34\1\0\0\1\0\0\0\0\0\1" + noise)


@settings(max_examples=1500, deadline=None)
@given(query=mutated())
def test_queries_after_accidents_are_harmless(responder, query):
    check(responder, query)


@settings(max_examples=300, deadline=None)
@given(query=QUERIES)
def test_a_well_formed_query_is_never_called_malformed(responder, query):
    assert dns.message.from_wire(responder.respond(query, LIMITS)).rcode() != dns.rcode.FORMERR
