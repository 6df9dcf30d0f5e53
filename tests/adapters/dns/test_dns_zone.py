"""The zone says what the leases say, whatever happened before: a naive model and dnspython are the judges."""

from __future__ import annotations

import ipaddress

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.reversename
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portd.adapters.dns import records
from portd.adapters.dns.message import Limits, Responder
from portd.adapters.dns.zone import Zone
from portd.core.model import Lease
from tests.adapters.dns.bed import CHECK, ZONE, ask_for, lease

HOSTS = ("192.0.2.7", "2001:db8::7")
WHOLE = Limits(65535, 65535)
TYPES = ("A", "AAAA", "SRV", "TXT")


# --- the model: walks over all leases for every question ---


def shown(leases: list[Lease], service: str, endpoint: str) -> list[Lease]:
    of_it = [each for each in leases if each.service == service and each.state == "bound"]
    out = {each.instance for each in of_it if each.drain}
    out |= {each.instance for each in of_it if each.endpoint == "main" and each.check and each.health == "critical"}
    return [
        each
        for each in of_it
        if each.endpoint == endpoint
        and each.instance not in out
        and (each.check is None or each.health in ("passing", "warning"))
    ]


def addresses(each: Lease, asked_at: str | None) -> set[str]:
    bound = set(each.listening or [each.address])
    if asked_at is None:
        local = {"0.0.0.0": {"127.0.0.1"}, "::": {"::1", "127.0.0.1"}}
        return {given for address in bound for given in local.get(address, {address})}
    found = {address for address in bound if not ipaddress.ip_address(address).is_loopback}
    wildcards = {"0.0.0.0", "::"} & found
    reached = "::" in wildcards or (wildcards and ":" not in asked_at)
    return found - wildcards | ({asked_at} if reached else set())


def host_of(each: Lease, selection: str = "") -> str:
    endpoint = "" if each.endpoint == "main" else f"{each.endpoint}."
    return f"{endpoint}{each.instance}.{selection}{each.service}"


def texts(each: Lease) -> set[str]:
    strings = [*(f"tag={tag}" for tag in each.tags), *(f"{key}={value}" for key, value in each.metadata.items())]
    return {f'"{escaped(text)}"' for text in strings}


def escaped(text: str) -> str:
    """Return text as dnspython shows it: octets outside of ASCII by their numbers (RFC 1035 section 5.1)."""
    return "".join(chr(octet) if octet < 128 else f"\\{octet:03d}" for octet in text.encode())


def protocols(each: Lease) -> list[str]:
    return ["tcp", "udp"] if each.protocol == "both" else [each.protocol]


def model(leases: list[Lease], asked_at: str | None) -> dict[str, dict[str, set[str]]]:
    """Return every name there is, and what each type has there."""
    at_server = set(HOSTS) if asked_at is None else {asked_at}
    names: dict[str, dict[str, set[str]]] = {"": {}}
    if not any(each.service == "ns" for each in leases):
        names["ns"] = {}
        for address in at_server:
            add(names, "ns", "AAAA" if ":" in address else "A", address)
    for each in leases:
        ports = [f"_{each.endpoint}._{protocol}.{each.service}" for protocol in protocols(each)]
        tagged = []
        if each.endpoint == "main":
            ports += [f"_{each.service}._{protocol}" for protocol in protocols(each)]
        for tag in each.tags:
            if "." not in tag:
                tagged += [f"{escaped(tag.lower())}.{each.service}"]
                if each.endpoint == "main":
                    tagged += [f"_{each.service}._{escaped(tag.lower())}._{protocol}" for protocol in protocols(each)]
        for name in [host_of(each), host_of(each, "_all."), *ports, *tagged]:
            while name:  # and every name above it
                names.setdefault(name, {})
                name = name.partition(".")[2]
        where = addresses(each, asked_at)
        if not where:
            continue
        groups = []
        if each.state in ("held", "bound"):
            at = {host_of(each, "_all."), *([f"_all.{each.service}"] if each.endpoint == "main" else [])}
            groups.append((at, at, host_of(each, "_all.")))
        if each in shown(leases, each.service, each.endpoint):
            main = each.endpoint == "main"
            by_tag = {name for name in tagged if not name.startswith("_")} if main else set()
            by_port = {
                name for name in tagged if main and name.rpartition("_")[2] in protocols(each) and name.startswith("_")
            }
            at = {host_of(each), *by_tag, *([each.service] if main else [])}
            groups.append((at, {host_of(each), *by_tag, *by_port, *ports}, host_of(each)))
        for at, srv_at, target in groups:
            for name in at:
                for address in where:
                    add(names, name, "AAAA" if ":" in address else "A", address)
                for text in texts(each):
                    add(names, name, "TXT", text)
            for name in srv_at:
                add(names, name, "SRV", f"{each.priority} {each.weight} {each.port} {target}.{ZONE}")
    return names


def add(names: dict[str, dict[str, set[str]]], name: str, rdtype: str, text: str) -> None:
    names[name].setdefault(rdtype, set()).add(text)


# --- the comparison ---


def check(responder: Responder, leases: list[Lease], names: list[str], asked_at: str | None = None) -> None:
    truth = model(leases, asked_at)
    for name in names:
        for rdtype in TYPES:
            query = ask_for(name, rdtype)
            wire = responder.respond(query.to_wire(), WHOLE, asked_at)
            answer = dns.message.from_wire(wire)
            assert query.is_response(answer)
            assert answer.flags & dns.flags.AA
            assert not answer.flags & dns.flags.TC
            found = {record.to_text() for rrset in answer.answer for record in rrset}
            assert sum(map(len, answer.answer)) == len(found), "a record came twice"
            expected = truth.get(name, {}).get(rdtype, set())
            assert found == expected, (name, rdtype)
            missing = dns.rcode.NXDOMAIN if name not in truth else dns.rcode.NOERROR
            assert answer.rcode() == missing
            authority = [rrset.rdtype for rrset in answer.authority]
            assert authority == ([] if expected else [dns.rdatatype.SOA]), (name, rdtype)
            if rdtype == "SRV":
                targets = {text.split()[3].removesuffix(f".{ZONE}") for text in found}
                added = {
                    (rrset.name.to_text().removesuffix(f".{ZONE}"), record.to_text())
                    for rrset in answer.additional
                    for record in rrset
                }
                assert added == {
                    (target, address)
                    for target in targets
                    for rdtype in ("A", "AAAA")
                    for address in truth[target].get(rdtype, ())
                }


LEASES = st.builds(
    lease,
    service=st.sampled_from(["a", "bb", "ns"]),
    number=st.integers(1, 3),
    endpoint=st.sampled_from(["main", "main", "metrics"]),
    protocol=st.sampled_from(["tcp", "udp", "both"]),
    address=st.sampled_from(["127.0.0.1", "127.77.0.9", "0.0.0.0", "::", "::1"]),
    port=st.integers(1, 65535),
    health=st.sampled_from(["passing", "passing", "warning", "critical", "unknown"]),
    check=st.sampled_from([None, CHECK]),
    drain=st.sampled_from([False, False, True]),
    state=st.sampled_from(["held", "bound", "bound", "conflict", "ended"]),
    tags=st.sampled_from([(), ("blue",), ("Blue", "grün"), ("red", "a.b")]),
    weight=st.sampled_from([1, 0, 65535]),
    priority=st.sampled_from([0, 7]),
    listening=st.sampled_from([(), (), ("0.0.0.0",), ("127.0.0.1", "::1"), ("192.0.2.9",)]),
    metadata=st.sampled_from([{}, {"version": "1.4.2"}]),
)


def names_around(each: Lease) -> list[str]:
    """Return the names that an event for a lease could change, and some that never exist."""
    service, instance, endpoint = each.service, each.instance, each.endpoint
    around = [
        service,
        f"{instance}.{service}",
        f"{endpoint}.{instance}.{service}",
        "_tcp",
        "_udp",
        "_nobody._tcp",
        f"_all.{service}",
        f"{instance}._all.{service}",
        f"{endpoint}.{instance}._all.{service}",
        f"blue.{service}",
        f"red.{service}",
        "_blue._tcp",
        f"_{service}._blue._tcp",
        f"_{service}._red._udp",
        f"nobody.{service}",
        f"x.y.{instance}.{service}",
    ]
    for protocol in ("_tcp", "_udp"):
        around += [f"{protocol}.{service}", f"_{service}.{protocol}", f"_{endpoint}.{protocol}.{service}"]
    return around


@settings(max_examples=60, deadline=None)
@given(
    events=st.lists(LEASES, min_size=1, max_size=12),
    restored=st.integers(0, 4),
    asked_at=st.sampled_from([None, *HOSTS]),
)
def test_after_any_events_every_answer_is_what_the_leases_say(events, restored, asked_at):
    zone = Zone(ZONE, 0, HOSTS)
    responder = Responder(zone)
    live: dict[str, Lease] = {}
    for index, each in enumerate(events):
        protocol = live[each.id].protocol if each.id in live else each.protocol  # a live lease keeps its protocol
        each = msgspec.structs.replace(each, protocol=protocol)
        zone.apply(each)
        live[each.id] = each
        if each.state == "ended":
            del live[each.id]
        if index >= restored:  # as many are taken over without a question in between
            check(responder, list(live.values()), names_around(each), asked_at)
    everywhere = {name for each in events for name in names_around(each)}
    check(responder, list(live.values()), ["", "ns", *sorted(everywhere)], asked_at)


@settings(max_examples=30, deadline=None)
@given(events=st.lists(LEASES, min_size=1, max_size=12))
def test_after_all_leases_end_nothing_is_left(events):
    zone = Zone(ZONE, 0, HOSTS)
    fresh = len(zone)
    for each in events:
        zone.apply(each)
    for each in events:
        zone.apply(msgspec.structs.replace(each, state="ended"))
    assert len(zone) == fresh
    assert zone.service_count == 0
    assert not zone._reverse
    assert not zone._tags


def test_an_unknown_address_changes_nothing():
    zone = Zone(ZONE, 0, HOSTS)
    zone.apply(lease(port=1))
    with pytest.raises(ValueError, match="not an IP address"):
        zone.apply(lease(port=2, address="nowhere"))
    check(Responder(zone), [lease(port=1)], names_around(lease()))


def test_names_too_long_for_an_underscore_are_left_out():
    long = "x" * 63
    zone = Zone(ZONE, 0, HOSTS)
    each = lease(long, instance=long, endpoint=long)
    zone.apply(each)
    zone.apply(lease(long, instance=long))
    answer = dns.message.from_wire(Responder(zone).respond(ask_for(f"{long}.{long}.{long}", "SRV").to_wire(), WHOLE))
    assert answer.answer[0][0].to_text() == f"0 1 20001 {long}.{long}.{long}.{ZONE}"
    answer = dns.message.from_wire(Responder(zone).respond(ask_for(f"_main._tcp.{long}", "SRV").to_wire(), WHOLE))
    assert answer.answer
    zone.apply(msgspec.structs.replace(each, state="ended"))
    zone.apply(lease(long, instance=long, state="ended"))
    assert zone.service_count == 0


def test_string_too_long_for_txt_is_left_out_not_cut():
    zone = Zone(ZONE, 0, HOSTS)
    zone.apply(lease(metadata={"k": "v" * 300, "short": "yes"}))
    answer = dns.message.from_wire(Responder(zone).respond(ask_for("orders", "TXT").to_wire(), WHOLE))
    assert [record.to_text() for record in answer.answer[0]] == ['"short=yes"']


@pytest.mark.parametrize("name", ["", ".", "a..b", "x" * 64, f"{'x' * 40}.{'y' * 40}."])
def test_what_can_not_be_zone_is_refused_with_reason(name):
    with pytest.raises(ValueError, match="dns zone"):
        Zone(name, 0, HOSTS)


def test_zone_name_ignores_case_and_trailing_dot():
    assert Zone("Portd.Internal", 0, HOSTS).wire == Zone(ZONE, 0, HOSTS).wire


# --- reverse names ---


def pointers(zone, address):
    query = dns.message.make_query(dns.reversename.from_address(address), "PTR")
    answer = dns.message.from_wire(Responder(zone).respond(query.to_wire(), WHOLE))
    return answer.rcode(), {record.to_text() for rrset in answer.answer for record in rrset}


def test_reverse_name_of_a_leased_address_names_its_instance():
    zone = Zone(ZONE, 0, HOSTS)
    zone.apply(lease(address="127.77.0.9", state="held"))
    zone.apply(lease(number=2, address="127.77.0.9", endpoint="metrics"))
    zone.apply(lease(number=3, address="2001:db8::3"))
    names = {f"orders-1.orders.{ZONE}", f"metrics.orders-2.orders.{ZONE}"}
    assert pointers(zone, "127.77.0.9") == (dns.rcode.NOERROR, names)
    assert pointers(zone, "2001:db8::3") == (dns.rcode.NOERROR, {f"orders-3.orders.{ZONE}"})
    assert pointers(zone, "127.77.0.10") == (dns.rcode.REFUSED, set())
    zone.apply(lease(address="127.77.0.9", state="ended"))
    assert pointers(zone, "127.77.0.9") == (dns.rcode.NOERROR, {f"metrics.orders-2.orders.{ZONE}"})
    zone.apply(lease(number=2, endpoint="metrics", state="ended"))
    assert pointers(zone, "127.77.0.9") == (dns.rcode.REFUSED, set())


# --- bounds ---


def test_an_answer_renders_no_more_than_it_holds(monkeypatch):
    rendered = []
    of_endpoint = records.txt_strings

    def counted(each):
        rendered.append(each.id)
        return of_endpoint(each)

    zone = Zone(ZONE, 0, HOSTS)
    for number in range(2000):
        zone.apply(lease(number=number, tags=tuple(f"{tag:0120}" for tag in range(60))))
    monkeypatch.setattr(records, "txt_strings", counted)
    for limits in (Limits(512, 512), WHOLE):
        rendered.clear()
        wire = Responder(zone).respond(ask_for("orders", "TXT").to_wire(), limits)
        assert wire[2] & 0x02  # cut
        assert len(rendered) < 12


def test_all_critical_instances_are_given_only_where_configured():
    sick = [lease(number=number, check=CHECK, health="critical") for number in (1, 2)]
    for setting, count in (("none", 0), ("all", 2)):
        zone = Zone(ZONE, 0, HOSTS, lambda service, setting=setting: setting)
        for each in sick:
            zone.apply(each)
        answer = dns.message.from_wire(Responder(zone).respond(ask_for("_orders._tcp", "SRV").to_wire(), WHOLE))
        assert sum(map(len, answer.answer)) == count
