"""Who gets which port: the allocator's guarantees, with a clock that the test drives."""

from __future__ import annotations

import sys
from ipaddress import IPv4Network

import pytest

from portd.core.allocator import Allocator, PortRequest
from portd.core.bindings import Binding
from portd.core.errors import PoolExhausted
from portd.core.model import Lease, Owner
from portd.core.quarantine import COOLING_RECHECK_S, PROBATION_S, PROBATION_SIGHTINGS
from portd.core.static_ports import StaticPort

LOOPBACK = "127.0.0.1"


def make(ports=range(20000, 20010), statics=(), cooldown_s=5.0, block="127.77.0.0/16"):
    allocator = Allocator({"default": ports}, statics, IPv4Network(block), cooldown_s, used := {})
    allocator.leased = used  # what the lease table would know
    return allocator


def request(
    service="orders",
    instance=None,
    endpoint="main",
    ports=(),
    exact=False,
    address=LOOPBACK,
    protocol="tcp",
    user=1000,
    at_share=False,
):
    name = (service, instance or f"{service}-1", endpoint)
    return PortRequest(name, user, protocol, address, ports, "default", exact, at_share)


def lease(wanted, port, own=False, requested=False):
    service, instance, endpoint = wanted.name
    return Lease(
        id=f"{service}/{instance}/{endpoint}",
        service=service,
        instance=instance,
        endpoint=endpoint,
        protocol=wanted.protocol,
        address=wanted.address,
        port=port,
        pool="default",
        hold="shared",
        lifetime="process",
        owner=Owner(known_by="peercred"),
        uid=wanted.user,
        host="h",
        created_at=0.0,
        own_address=own,
        port_requested=requested,
    )


def first(allocator, wanted):
    return next((binding.port for binding in allocator.candidates(wanted)), None)


def grant(allocator, wanted, own=False):
    granted = lease(wanted, first(allocator, wanted), own, requested=bool(wanted.ports))
    allocator.leased[granted.port] = granted
    return granted


def end(allocator, granted, tick=0.0):
    allocator.leased.pop(granted.port, None)
    allocator.cool(granted, tick)


def settle(allocator, tick, free=True):
    for quarantine in allocator.quarantines.pop_due(tick):
        allocator.polled(quarantine, free, tick)


def test_the_longest_unused_port_is_the_first_candidate():
    allocator = make(cooldown_s=0.0)
    leases = [grant(allocator, request("orders", f"orders-{n}")) for n in range(3)]
    assert [granted.port for granted in leases] == [20000, 20001, 20002]
    for ended in (leases[1], leases[0]):
        end(allocator, ended, tick=1.0)
    settle(allocator, 1.0)
    others = [grant(allocator, request("billing", f"billing-{n}")).port for n in range(9)]
    assert others == [20003, 20004, 20005, 20006, 20007, 20008, 20009, 20001, 20000]


def test_only_its_instance_gets_a_port_back_at_once():
    allocator = make()
    granted = grant(allocator, request())
    end(allocator, granted)
    assert grant(allocator, request("billing")).port != granted.port
    assert first(allocator, request(user=2000)) != granted.port, "nor the same name of another user"
    assert grant(allocator, request()).port == granted.port


def test_cooling_port_is_free_after_its_time_once_unbound():
    allocator = make(range(20000, 20002))
    end(allocator, grant(allocator, request()))
    assert first(allocator, request("billing")) == 20001
    assert allocator.quarantines.next_tick() == 5.0
    settle(allocator, 4.9)
    assert allocator.count("default").cooling == 1
    settle(allocator, 5.0, free=False)
    assert allocator.count("default").cooling == 1
    settle(allocator, 5.0 + COOLING_RECHECK_S)
    assert allocator.count("default").free == 2


def test_pool_without_free_port_gives_longest_cooling_ones():
    allocator = make(range(20000, 20003))
    for granted in [grant(allocator, request("orders", f"orders-{n}")) for n in range(3)]:
        end(allocator, granted, tick=float(granted.port - 20000))
    assert [binding.port for binding in allocator.candidates(request("billing"))] == [20000, 20001, 20002]


def test_a_cooling_port_that_was_given_early_stays_used():
    allocator = make(range(20000, 20001))
    end(allocator, grant(allocator, request()))
    grant(allocator, request("billing"))
    settle(allocator, 5.0)
    assert allocator.count("default") == (1, 1, 0, 0, 0)
    assert first(allocator, request("third")) is None


def test_an_exact_cooling_port_is_no_candidate_for_others():
    allocator = make()
    granted = grant(allocator, request())
    end(allocator, granted)
    assert first(allocator, request("billing", ports=(granted.port,), exact=True)) is None
    assert first(allocator, request(ports=(granted.port,), exact=True)) == granted.port


def test_user_at_its_share_gets_its_own_cooling_ports_only():
    allocator = make()
    end(allocator, grant(allocator, request("orders", "orders-1")))
    end(allocator, grant(allocator, request("other", user=2000)))
    at_share = request("orders", "orders-2", at_share=True)
    assert [binding.port for binding in allocator.candidates(at_share)] == [20000]


def test_declined_port_returns_after_several_free_polls_in_a_row():
    allocator = make(range(20000, 20001))
    allocator.decline(Binding("tcp", LOOPBACK, 20000), tick=0.0)
    assert allocator.count("default").declined == 1
    tick = 0.0
    for free in [True] * (PROBATION_SIGHTINGS - 1) + [False] + [True] * PROBATION_SIGHTINGS:
        assert first(allocator, request()) is None
        tick += PROBATION_S
        settle(allocator, tick, free)
    assert first(allocator, request()) == 20000


def test_declined_ports_count_toward_their_users_share():
    allocator = make()
    allocator.decline(Binding("tcp", LOOPBACK, 20000), 0.0, 1000)
    allocator.decline(Binding("tcp", LOOPBACK, 20001), 0.0)
    assert allocator.quarantines.count_of(1000) == 1
    for number in range(PROBATION_SIGHTINGS):
        settle(allocator, PROBATION_S * (number + 1))
    assert allocator.quarantines.count_of(1000) == 0


def test_requested_ports_come_first_in_their_order():
    candidates = make().candidates(request(ports=(8080, 8000, 8001)))
    assert [next(candidates).port for _ in range(4)] == [8080, 8000, 8001, 20000]


def test_a_static_port_is_for_its_endpoint_alone():
    allocator = make(statics=[StaticPort("orders", 20003, "tcp", LOOPBACK)])
    assert allocator.statics.of_endpoint("orders", "main").port == 20003
    assert allocator.statics.of_endpoint("orders", "metrics") is None
    ports = {grant(allocator, request("billing", f"billing-{n}")).port for n in range(9)}
    assert 20003 not in ports
    assert first(allocator, request("billing", "billing-x", ports=(20003,), exact=True)) is None
    assert first(allocator, request("orders", ports=(20003,), exact=True)) == 20003


def test_port_that_is_put_back_is_next_one_again():
    allocator = make()
    granted = grant(allocator, request())
    assert first(allocator, request("other")) == 20001
    allocator.leased.clear()
    allocator.put_back(granted.port)
    assert first(allocator, request("billing")) == granted.port


def test_own_addresses_are_one_for_each_instance_and_same_again():
    own = make().own
    one = own.pick(("db", "db-1", 1000))
    assert one == own.pick(("db", "db-1", 1000)) == "127.77.0.1"
    own.use(one, ("db", "db-1", 1000))
    assert own.pick(("db", "db-2", 1000)) != one
    assert own.pick(("db", "db-1", 2000)) != one, "another user's instance of the same name"
    own.release(one)
    assert own.pick(("db", "db-1", 1000)) == one


def test_own_address_reuse_starts_with_the_longest_idle():
    own = make(block="127.77.0.0/30").own
    addresses = []
    for name in ("a-1", "a-2"):
        addresses.append(own.pick(("a", name, 1000)))
        own.use(addresses[-1], ("a", name, 1000))
    with pytest.raises(PoolExhausted):
        own.pick(("a", "a-3", 1000))
    own.release(addresses[0])
    assert own.pick(("a", "a-3", 1000)) == addresses[0]


def test_remembered_own_address_outside_block_is_not_given_again():
    own = make(block="127.77.0.0/30").own
    own.remember("127.99.0.1", ("a", "a-1", 1000))
    assert own.pick(("a", "a-1", 1000)) == "127.77.0.1"


def test_pool_counts_add_up_to_its_size():
    allocator = make()
    grant(allocator, request())
    end(allocator, grant(allocator, request("billing")))
    allocator.decline(Binding("tcp", LOOPBACK, 20009), tick=0.0)
    assert allocator.count("default") == (10, 1, 1, 1, 7)


def test_free_ports_are_restored_in_the_order_of_what_ended():
    allocator = make(range(20000, 20003))
    allocator.restore_order([lease(request("a"), 20000), lease(request("b"), 20002)])
    assert [grant(allocator, request("c", f"c-{n}")).port for n in range(3)] == [20001, 20000, 20002]


@pytest.mark.parametrize(
    ("ports", "statics", "requested", "is_given"),
    [
        (range(20000, 20010), (), False, True),
        (range(20001, 20010), (), False, False),
        (range(30000, 30010), (), False, False),
        (range(30000, 30010), (), True, True),
        (range(20000, 20010), [StaticPort("billing", 20000, "tcp", LOOPBACK)], True, False),
    ],
)
def test_a_remembered_port_obeys_the_configuration_of_now(ports, statics, requested, is_given):
    allocator = make(ports, statics)
    had = lease(request(), 20000, requested=requested)
    allocator.restore_order([had])
    assert (first(allocator, request()) == 20000) == is_given
    assert (allocator.misplaced(had) is None) == is_given


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


def test_candidate_costs_same_in_full_and_in_empty_pool():
    empty, full = make(range(10000, 20000)), make(range(10000, 20000))
    for number in range(9990):
        grant(full, request("filler", f"filler-{number}"))
    grant(empty, request("filler", "filler-0"))  # each candidate drops the one before it from the free list
    costs = [count_calls(lambda pool=pool: grant(pool, request())) for pool in (empty, full)]
    assert costs[0] == costs[1], "calls made for one candidate"
