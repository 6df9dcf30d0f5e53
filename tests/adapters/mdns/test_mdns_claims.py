"""Each name ends with one owner, whatever happens: the state machine alone, with a clock that tests advance."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Interface
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portd.adapters.mdns import claims, wire
from portd.adapters.mdns.claims import STEPS, STORM_CONFLICTS, STORM_S, TABLE
from portd.adapters.mdns.interfaces import Interface
from portd.adapters.mdns.wire import DNSPointer, DNSService
from portd.adapters.mdns.zone import State
from tests.adapters.mdns.net import GROUP, LINK, Net, NetHost, service

WEB = "_http._tcp.local."
NAME = f"Orders.{WEB}"


def owners(net: Net, key: str) -> list[NetHost]:
    """Return the hosts that answer for a name."""
    return [host for host in net.hosts if (claim := host.zone.claim(key.lower())) is not None and claim.is_won]


def goodbyes(net: Net) -> set[str]:
    return {record.alias for record in net.records() if isinstance(record, DNSPointer) and record.ttl == 0}


def servers(net: Net, name: str) -> set[str]:
    """Return the host names that a service was announced with."""
    full_name = f"{name}.{WEB}"
    return {record.server for record in net.records() if isinstance(record, DNSService) and record.name == full_name}


def contradict(host: NetHost) -> None:
    """Have another host claim a name of the host's, with data of its own."""
    entry = next(iter(host.zone.entries.values()))
    host.claims.receive_response(host.net.now, LINK, [wire.service(entry.full_name, 9, "other.local.")])
    host.settle()


def owned(net: Net, *ids: str) -> NetHost:
    """Return a host that owns the names of these services."""
    host = net.host()
    host.publish(*(service(id_) for id_ in ids))
    net.run(10.0)
    assert all(host.entry(id_).state is State.OWNED for id_ in ids)
    return host


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    starts=st.lists(st.floats(0.0, 3.0), min_size=2, max_size=6),
    are_clones=st.booleans(),
    are_equal=st.booleans(),
)
def test_claimants_of_one_name_end_with_one_owner_each(
    seed: int, starts: list[float], are_clones: bool, are_equal: bool
) -> None:
    net = Net(seed)
    hosts = [net.host("clone" if are_clones else "") for _ in starts]
    for number in sorted(range(len(starts)), key=starts.__getitem__):
        net.run(1000.0 + starts[number] - net.now)
        hosts[number].publish(service("a", "Orders", port=1 if are_equal else number + 1))
    net.run(120.0)
    expected = {"Orders", *(f"Orders ({number})" for number in range(2, len(hosts) + 1))}
    assert {host.published("a") for host in hosts} == expected
    assert all(len(owners(net, f"{name}._http._tcp.local.")) == 1 for name in expected)
    assert len({host.zone.host.name for host in hosts}) == len(hosts)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["publish", "withdraw", "down", "up", "change", "wait"])),
        max_size=30,
    ),
)
def test_names_have_one_owner_after_any_history(seed: int, steps: list[tuple[int, str]]) -> None:
    net = Net(seed)
    hosts = [net.host("clone" if number % 2 else "") for number in range(4)]
    for number, step in steps:
        host = hosts[number]
        match step:
            case "publish":
                host.publish(service("a", "Orders", port=number))
            case "change" if "a" in host.zone.entries:
                host.publish(service("a", "Orders", port=number, txt=(("t", str(net.now)),)))
            case "withdraw":
                host.withdraw("a")
            case "down" | "up":
                host.side = -1 - number if step == "down" else 0
                host.set_link(up=step == "up")
        net.run(net.random.uniform(0.0, 1.5))
    for host in hosts:
        host.side = 0
        host.set_link(up=True)
    net.run(120.0)
    published = [name for host in hosts if (name := host.published("a")) is not None]
    assert max(Counter(published).values(), default=1) == 1
    assert len(published) == sum("a" in host.zone.entries for host in hosts)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), loss=st.floats(0.0, 0.9), count=st.integers(2, 4))
def test_lost_packets_leave_one_owner_once_names_are_asked_for(seed: int, loss: float, count: int) -> None:
    net = Net(seed)
    net.loss = loss
    hosts = [net.host("clone") for _ in range(count)]
    for number, host in enumerate(hosts):
        host.publish(service("a", "Orders", port=number))
    net.run(30.0)
    net.loss = 0.0
    asker = net.host()
    for _ in range(2 * count):  # a renamed host may meet the next one
        names = [(f"{host.published('a')}.{WEB}", wire.ANY) for host in hosts]
        names += [(host.zone.host.full_name, wire.A) for host in hosts]
        net.send(asker, GROUP, wire.encode_query(names))
        net.run(20.0)
    assert len({host.published("a") for host in hosts}) == count
    assert len({host.zone.host.name for host in hosts}) == count


def test_a_joined_lan_ends_with_one_owner_once_somebody_asks() -> None:
    net = Net()
    hosts = [net.host(), net.host()]
    hosts[1].side = 1
    for number, host in enumerate(hosts):
        host.publish(service("a", "Orders", port=number))
    net.run(10.0)
    assert [host.published("a") for host in hosts] == ["Orders", "Orders"]
    hosts[1].side = 0
    asker = net.host()
    net.send(asker, GROUP, wire.encode_query([(NAME, wire.SRV)]))
    net.run(20.0)
    assert sorted(str(host.published("a")) for host in hosts) == ["Orders", "Orders (2)"]


def test_an_owner_keeps_its_name_if_a_probe_finds_nobody() -> None:
    net = Net()
    host = owned(net, "a")
    contradict(host)
    assert not host.entry("a").is_won
    net.run(10.0)
    assert (host.entry("a").state, host.published("a")) == (State.OWNED, "a")
    assert host.reports == [("a", "a", None)], "its owner is not notified of a name that did not change"


def test_a_contradiction_before_the_first_probe_costs_no_name() -> None:
    net = Net()
    host = owned(net, "a")
    contradict(host)
    contradict(host)
    net.run(10.0)
    assert host.published("a") == "a"


def test_the_greater_proposal_wins_a_tie_and_the_other_waits() -> None:
    net = Net()
    host = net.host()
    host.publish(service("a", "Orders", port=5))
    net.run(1.0, until=lambda: host.entry("a").state is State.PROBING)
    question = wire.decode(wire.encode_query([(NAME, wire.ANY)])[0], 1.0)
    assert question is not None
    for port, state in ((4, State.PROBING), (6, State.DEFERRED)):
        proposed = [
            wire.service(NAME, port, host.zone.host.full_name),
            host.entry("a").unique(host.link)[1],
        ]
        host.claims.receive_probe(net.now, LINK, question.questions, proposed)
        assert host.entry("a").state is state
    assert host.entry("a").due == pytest.approx(net.now + claims.DEFER_S)
    assert host.entry("a").name == "Orders"


def test_a_storm_of_conflicts_slows_probing_down() -> None:
    net = Net()
    host = net.host()
    host.publish(service("a", "Orders"))
    started = []
    for _ in range(STORM_CONFLICTS + 5):
        net.run(30.0, until=lambda: host.entry("a").state is State.PROBING)
        started.append(net.now)
        contradict(host)
    waits = [later - earlier for earlier, later in pairwise(started)]
    assert max(waits[: STORM_CONFLICTS - 1]) < 1.0
    assert min(waits[STORM_CONFLICTS:]) >= STORM_S
    net.run(30.0)
    assert host.entry("a").conflict_count == 0, "a name that was won starts afresh"


def test_endless_contradictions_cause_a_bounded_number_of_packets() -> None:
    """Two cloned machines that invalidated each other's records without end sent 350 packets a second."""
    net = Net()
    host = owned(net, "a")
    net.sent.clear()
    for _ in range(6000):
        net.run(0.010)
        contradict(host)
    assert len(net.sent) / 60.0 < 8


def test_a_name_is_probed_three_times_and_announced_twice() -> None:
    net = Net()
    owned(net, "a")
    probes = [at for at, _, _, message in net.sent if message.is_probe()]
    announcements = [at for at, _, _, message in net.sent if message.is_response()]
    assert [round(later - earlier, 3) for earlier, later in pairwise(probes)] == [0.25, 0.25]
    assert len(announcements) == 2
    assert announcements[0] - probes[2] >= 0.25
    assert announcements[1] - announcements[0] >= 1.0


def test_services_published_together_share_packets() -> None:
    net = Net()
    owned(net, *(f"s{number}" for number in range(60)))
    assert len([message for _, _, _, message in net.sent if message.is_probe()]) <= 3 * 6


def test_a_service_that_was_never_announced_sends_no_goodbye() -> None:
    net = Net()
    host = net.host()
    host.publish(service("a"))
    net.run(1.0, until=lambda: host.entry("a").state is State.PROBING)
    host.withdraw("a")
    net.run(10.0)
    assert goodbyes(net) == set()


def test_a_withdrawn_service_sends_two_goodbyes_and_nothing_else() -> None:
    net = Net()
    host = owned(net, "a", "b")
    net.sent.clear()
    host.withdraw("a")
    net.run(30.0)
    pointers = [record for record in net.records() if isinstance(record, DNSPointer)]
    assert [(record.alias, record.ttl) for record in pointers] == [("a._http._tcp.local.", 0)] * 2


def test_a_name_that_is_published_again_is_not_withdrawn_afterwards() -> None:
    net = Net()
    host = owned(net, "a")
    host.withdraw("a")
    host.publish(service("b", "a"))
    net.run(0.1)
    net.sent.clear()
    net.run(10.0)
    assert host.published("b") == "a"
    assert goodbyes(net) == set()


def test_another_hosts_goodbye_for_our_record_is_contradicted() -> None:
    net = Net()
    host = owned(net, "a")
    net.sent.clear()
    forged = [wire.with_ttl(record, 0) for record in host.entry("a").unique(host.link)]
    for _ in range(500):
        host.claims.receive_response(net.now, LINK, forged)
        net.run(0.010)
    announced = [record for record in net.records() if record.name == "a._http._tcp.local." and record.type == wire.SRV]
    assert 1 <= len(announced) <= 6, "once a second at most"


def test_changes_are_announced_once_a_second_at_most() -> None:
    net = Net()
    host = owned(net, "a")
    net.sent.clear()
    for number in range(500):
        host.publish(service("a", txt=(("n", str(number)),)))
        net.run(0.010)
    net.run(2.0)
    texts = [record for record in net.records() if record.type == wire.TXT]
    assert 1 <= len(texts) <= 9
    assert texts[-1] == host.entry("a").unique(host.link)[1]


def test_the_return_of_a_lost_interface_probes_again() -> None:
    net = Net()
    host = owned(net, "a")
    host.set_link(up=False)
    assert host.reports[-1] == ("a", None, claims.NO_LINK)
    net.sent.clear()
    host.set_link(up=True)
    net.run(10.0)
    assert host.published("a") == "a"
    assert sum(message.is_probe() for _, _, _, message in net.sent) == 3


def test_an_interrupted_interface_checks_names_that_stay_answered() -> None:
    net = Net()
    host = owned(net, "a")
    host.set_link(up=True, interrupted=True)
    assert (host.entry("a").state, host.entry("a").is_won) == (State.CHECKING, True)
    net.run(10.0)
    assert host.entry("a").state is State.OWNED


def test_a_renamed_host_announces_its_services_with_the_new_name() -> None:
    net = Net()
    one = owned(net, "a")
    two = net.host("box1")
    two.publish(service("b"))
    net.run(20.0)
    assert (one.zone.host.name, two.zone.host.name) == ("box1-portd", "box1-portd-2")
    assert servers(net, "b") == {"box1-portd-2.local."}, "no service is announced before its host's name is won"


def test_service_waits_for_its_hosts_name_and_probes_again() -> None:
    net = Net()
    host = net.host()
    host.publish(service("a"))
    net.run(1.0, until=lambda: host.zone.host.state is State.PROBING)
    greater = [wire.address(host.zone.host.full_name, bytes([255] * 4))]
    (probe,) = (wire.decode(packet, 1.0) for packet in wire.encode_probe([(host.zone.host.full_name, greater)]))
    assert probe is not None
    host.claims.receive_probe(net.now, LINK, probe.questions, greater)
    net.run(2.0, until=lambda: host.entry("a").is_won and host.zone.host.state is State.PROBING)
    assert net.records() == [], "no service is announced before its host's name is won"
    host.claims.receive_response(net.now, LINK, greater)
    assert host.entry("a").state is State.DEFERRED
    net.run(10.0)
    assert servers(net, "a") == {"box1-portd-2.local."}


def test_link_that_comes_up_late_is_probed_three_times() -> None:
    net = Net()
    host = net.host()
    host.publish(service("a"))
    net.run(1.0, until=lambda: host.entry("a").step == 2)
    second = Interface(2, "eth1", (IPv4Interface("10.8.0.1/24"),), ())
    host.claims.set_links(net.now, {LINK: host.link, 2: second})
    probed = []
    while (due := host.claims.deadline()) is not None and not host.entry("a").is_won:
        probed += [message.link.index for message in host.claims.tick(due) if isinstance(message, claims.Probe)]
    assert probed.count(2) == 3


def test_an_own_address_received_over_another_interface_is_no_conflict() -> None:
    net = Net()
    host = owned(net, "a")
    second = Interface(2, "eth1", (IPv4Interface("10.8.0.1/24"),), ())
    host.claims.set_links(net.now, {LINK: host.link, 2: second})
    address = wire.address(host.zone.host.full_name, second.addresses[0].ip.packed)
    host.claims.receive_response(net.now, LINK, [address])
    assert host.zone.host.is_won
    host.claims.receive_response(net.now, LINK, [wire.address(host.zone.host.full_name, bytes(4))])
    assert not host.zone.host.is_won


def test_stale_service_is_retracted_unless_its_name_is_in_use() -> None:
    net = Net()
    host = owned(net, "a")
    for name in ("a", "old"):
        host.claims.retract(net.now, service("x", name))
    net.run(10.0)
    assert goodbyes(net) == {"old._http._tcp.local."}


def test_an_orderly_stop_withdraws_everything_and_ends() -> None:
    net = Net()
    host = owned(net, *(f"s{number}" for number in range(200)))
    host.claims.withdraw_all(net.now)
    net.run(5.0)
    assert len(goodbyes(net)) == 200
    assert any(record.ttl == 0 and record.type == wire.A for record in net.records())
    assert host.claims.deadline() is None


def test_every_timed_state_ends() -> None:
    for state in STEPS:
        seen = set()
        at: State | None = state
        while at in STEPS:
            assert at not in seen
            seen.add(at)
            at = STEPS[at].then
        assert at in (State.OWNED, None)


def test_no_move_of_the_table_leads_into_a_dead_end() -> None:
    assert all(state is not State.GOODBYE for state, _ in TABLE)
    assert all(move.state in STEPS or move.state is State.WAITING for move in TABLE.values())
