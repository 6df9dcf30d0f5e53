"""Who gets which port: the allocator's guarantees, with a clock that the test drives."""

from __future__ import annotations

import sys
from ipaddress import IPv4Network

import pytest

from portd.core.allocator import COOLING_RECHECK_S, PROBATION_S, PROBATION_SIGHTINGS, Allocator, Ask, StaticPort
from portd.core.bindings import Binding, binding_of
from portd.core.errors import PoolExhausted, PortReserved, PortTaken
from portd.core.model import Lease, Owner

LOOPBACK = "127.0.0.1"


def make(ports=range(20000, 20010), statics=(), cooldown_s=5.0, block="127.77.0.0/16"):
    return Allocator({"default": ports}, statics, IPv4Network(block), cooldown_s)


def ask(service="orders", instance=None, endpoint="main", port=None, exact=False, address=LOOPBACK, protocol="tcp"):
    return Ask((service, instance or f"{service}-1", endpoint), protocol, address, port, "default", exact)


def lease(wish, place, own=False):
    service, instance, endpoint = wish.name
    return Lease(
        id=f"{service}/{instance}/{endpoint}",
        service=service,
        instance=instance,
        endpoint=endpoint,
        protocol=place.protocol,
        address=place.address,
        port=place.port,
        pool="default",
        hold="shared",
        lifetime="process",
        owner=Owner(known_by="peercred"),
        host="h",
        created_at=0.0,
        own_address=own,
    )


def grant(allocator, wish, own=False):
    granted = lease(wish, allocator.pick(wish, lambda place: True), own)
    allocator.use(granted)
    return granted


def settle(allocator, tick, free=True):
    for quarantine in allocator.due_looks(tick):
        allocator.seen(quarantine, free, tick)


def test_the_longest_unused_port_is_picked():
    allocator = make(cooldown_s=0.0)
    first = [grant(allocator, ask("orders", f"orders-{n}")) for n in range(3)]
    assert [granted.port for granted in first] == [20000, 20001, 20002]
    for ended in (first[1], first[0]):
        allocator.cool(ended, tick=1.0)
    settle(allocator, 1.0)
    others = [grant(allocator, ask("billing", f"billing-{n}")).port for n in range(9)]
    assert others == [20003, 20004, 20005, 20006, 20007, 20008, 20009, 20001, 20000]


def test_an_instance_gets_its_last_port_back_at_once_and_others_do_not():
    allocator = make()
    granted = grant(allocator, ask())
    allocator.cool(granted, tick=0.0)
    assert grant(allocator, ask("billing")).port != granted.port
    assert grant(allocator, ask()).port == granted.port


def test_a_cooling_port_is_free_for_others_only_after_its_time_and_when_it_is_unbound():
    allocator = make(range(20000, 20001))
    allocator.cool(grant(allocator, ask()), tick=0.0)
    with pytest.raises(PoolExhausted):
        grant(allocator, ask("billing"))
    assert allocator.next_look() == 5.0
    settle(allocator, 4.9)
    assert allocator.count("default").cooling == 1
    settle(allocator, 5.0, free=False)
    with pytest.raises(PoolExhausted):
        grant(allocator, ask("billing"))
    settle(allocator, 5.0 + COOLING_RECHECK_S)
    assert grant(allocator, ask("billing")).port == 20000


def test_a_cooling_port_is_port_taken_to_an_exact_wish_of_others():
    allocator = make()
    granted = grant(allocator, ask())
    allocator.cool(granted, tick=0.0)
    with pytest.raises(PortTaken):
        grant(allocator, ask("billing", port=granted.port, exact=True))


def test_a_declined_port_comes_back_after_it_was_seen_free_several_times_in_a_row():
    allocator = make(range(20000, 20001))
    allocator.decline(Binding("tcp", LOOPBACK, 20000), tick=0.0)
    assert allocator.count("default").declined == 1
    tick = 0.0
    for free in [True] * (PROBATION_SIGHTINGS - 1) + [False] + [True] * PROBATION_SIGHTINGS:
        with pytest.raises(PoolExhausted):
            grant(allocator, ask())
        tick += PROBATION_S
        settle(allocator, tick, free)
    assert grant(allocator, ask()).port == 20000


def test_a_wish_is_tried_first_and_another_port_after_it():
    tried = []
    assert make().pick(ask(port=8080), lambda place: tried.append(place.port) or len(tried) == 2).port == 20000
    assert tried == [8080, 20000]


def test_an_exact_wish_that_is_taken_is_refused():
    with pytest.raises(PortTaken) as refused:
        make().pick(ask(port=8080, exact=True), lambda place: False)
    assert refused.value.pointer == "/port"


def test_a_static_port_is_for_its_service_alone():
    allocator = make(statics=[StaticPort("orders", 20003, "tcp", LOOPBACK)])
    assert allocator.static_for("orders", "main").port == 20003
    assert allocator.static_for("orders", "metrics") is None
    ports = {grant(allocator, ask("billing", f"billing-{n}")).port for n in range(9)}
    assert 20003 not in ports
    with pytest.raises(PortReserved):
        grant(make(statics=[StaticPort("orders", 8080, "tcp", LOOPBACK)]), ask("billing", port=8080, exact=True))


def test_a_given_back_port_is_the_next_one_again():
    allocator = make()
    granted = grant(allocator, ask())
    allocator.give_back(granted)
    assert grant(allocator, ask("billing")).port == granted.port


def test_own_addresses_are_one_for_each_instance_and_the_same_again():
    allocator = make()
    first, second = (allocator.own_address("db", f"db-{n}") for n in (1, 1))
    assert first == second == "127.77.0.1"
    one = lease(ask("db"), Binding("tcp", first, 5432), own=True)
    allocator.use(one)
    other = allocator.own_address("db", "db-2")
    assert other != first
    two = lease(ask("db", "db-2"), Binding("tcp", other, 5432), own=True)
    allocator.use(two)
    allocator.cool(one, tick=0.0)
    assert allocator.own_address("db", "db-1") == first
    assert allocator.own_address("db", "db-3") not in (first, other)


def test_own_addresses_are_taken_from_the_longest_idle_instance_when_none_is_fresh():
    allocator = make(block="127.77.0.0/30")
    held = []
    for name in ("a-1", "a-2"):
        address = allocator.own_address("a", name)
        granted = lease(ask("a", name), Binding("tcp", address, 80), own=True)
        allocator.use(granted)
        held.append(granted)
    with pytest.raises(PoolExhausted):
        allocator.own_address("a", "a-3")
    allocator.cool(held[0], tick=0.0)
    assert allocator.own_address("a", "a-3") == held[0].address


def test_pool_counts_add_up_to_its_size():
    allocator = make()
    grant(allocator, ask())
    allocator.cool(grant(allocator, ask("billing")), tick=0.0)
    allocator.decline(Binding("tcp", LOOPBACK, 20009), tick=0.0)
    assert allocator.count("default") == (10, 1, 1, 1, 7)


def test_the_order_of_the_line_is_restored_from_what_ended():
    allocator = make(range(20000, 20003))
    allocator.restore_line(
        [lease(ask("a"), Binding("tcp", LOOPBACK, 20000)), lease(ask("b"), Binding("tcp", LOOPBACK, 20002))]
    )
    assert [grant(allocator, ask("c", f"c-{n}")).port for n in range(3)] == [20001, 20000, 20002]
    assert binding_of(lease(ask("a"), Binding("tcp", LOOPBACK, 20000))) == Binding("tcp", LOOPBACK, 20000)


def count_calls(run):
    calls = 0

    def profile(frame, event, arg):
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def test_a_pick_costs_the_same_in_a_full_and_in_an_empty_pool():
    empty, full = make(range(10000, 20000)), make(range(10000, 20000))
    for number in range(9990):
        grant(full, ask("filler", f"filler-{number}"))
    costs = [count_calls(lambda pool=pool: grant(pool, ask())) for pool in (empty, full)]
    assert costs[0] == costs[1], "calls made by one pick"
