"""Whose a name is, which port a request gets, and what asking again changes: the rules of a grant."""

from __future__ import annotations

import asyncio

import pytest

from portd.core.bindings import Binding
from portd.core.errors import (
    InvalidRequest,
    LeaseDiffers,
    PortReserved,
    PortTaken,
    QuotaExceeded,
    Refusal,
    ServiceTaken,
)
from portd.core.model import TcpCheck
from portd.core.requests import LeaseRequest, port_numbers
from portd.core.rights import Caller
from portd.core.static_ports import StaticPort
from portd.testing.world import in_world

LOOPBACK = "127.0.0.1"


# --- names ---


@in_world()
async def test_name_belongs_to_its_oldest_leases_user_and_cools(world):
    world.processes.start(41)
    world.processes.start(42, uid=2000)
    lease = await world.grant(41, service="orders")
    with pytest.raises(ServiceTaken) as refused:
        await world.grant(42, uid=2000, service="orders", instance="x")
    assert (refused.value.pointer, refused.value.retry_after_s) == ("/service", None)
    await world.service.release(lease.id, world.caller(41))
    with pytest.raises(ServiceTaken) as refused:
        await world.grant(42, uid=2000, service="orders")
    assert refused.value.retry_after_s == world.cooldown_s
    world.pass_time(world.cooldown_s)
    assert (await world.grant(42, uid=2000, service="orders")).uid == 2000


@in_world()
async def test_a_cooling_name_outlives_a_restart(world):
    world.processes.start(41)
    world.processes.start(42, uid=2000)
    lease = await world.grant(41, service="orders")
    await world.service.release(lease.id, world.caller(41))
    await world.restart()
    with pytest.raises(ServiceTaken):
        await world.grant(42, uid=2000, service="orders")


@in_world(listed={"orders": {1000, "token:ci"}})
async def test_listed_users_alone_lease_a_name_whoever_has_it(world):
    for uid in (1000, 2000, 0):
        world.processes.start(uid or 1, uid=uid)
    await world.grant(1000, service="orders")
    with pytest.raises(ServiceTaken):
        await world.grant(2000, uid=2000, service="orders")
    assert (await world.grant(1, uid=0, admin=True, service="orders")).uid == 0
    token = Caller(known_by="token", token_name="ci", token_hash=b"x")
    granted = await world.service.grant([LeaseRequest(service="orders", ttl=30.0)], token)
    assert granted.leases[0].user == "token:ci"


@in_world(has_shared_names=True)
async def test_shared_names_are_everybodys(world):
    world.processes.start(41)
    world.processes.start(42, uid=2000)
    await world.grant(41, service="orders")
    assert (await world.grant(42, uid=2000, service="orders")).instance == "orders-2"


@pytest.mark.parametrize("restarts", [False, True])
def test_a_port_requested_once_stays_the_instances(restarts):
    @in_world()
    async def grant_and_release(world):
        world.processes.start(41)
        ports = []
        for requested in (25432, None, None, None):
            lease = await world.grant(41, service="orders", port=requested)
            ports.append(lease.port)
            assert world.allocator.misplaced(lease) is None
            await world.service.release(lease.id, world.caller(41))
            if restarts:
                await world.restart()
        assert ports == [25432] * 4

    grant_and_release()


@in_world(has_shared_names=True)
async def test_ports_and_addresses_are_not_another_users_of_same_name(world):
    world.processes.start(41)
    world.processes.start(42, uid=2000)
    lease = await world.grant(41, service="orders", address="own", port=5432)
    await world.service.release(lease.id, world.caller(41))
    other = await world.grant(42, uid=2000, service="orders", address="own", port=5432)
    assert other.address != lease.address
    await world.service.release(other.id, world.caller(42, 2000))
    assert (await world.grant(41, service="orders", address="own")).address == lease.address


# --- asking again ---


@in_world()
async def test_asking_again_replaces_what_is_given_and_keeps_the_rest(world):
    world.processes.start(41)
    first = {"service": "orders", "instance": "orders-1", "tags": ("blue",), "metadata": {"a": "1"}, "port": 3000}
    lease = await world.grant(41, **first)
    again = await world.ask(
        [LeaseRequest(service="orders", instance="orders-1", tags=(), weight=5, check=TcpCheck())], pid=41
    )
    assert not again.is_new
    now = again.leases[0]
    assert (now.id, now.tags, now.metadata, now.weight) == (lease.id, (), {"a": "1"}, 5)
    assert now.check == TcpCheck()


@pytest.mark.parametrize(
    "field",
    [{"protocol": "udp"}, {"address": "0.0.0.0"}, {"port": 8080, "exact": True}, {"ttl": 5.0}, {"hold": "exclusive"}],
)
def test_asking_again_for_something_else_is_lease_differs(field):
    @in_world()
    async def scenario(world):
        world.processes.start(41)
        await world.grant(41, service="orders", instance="orders-1")
        with pytest.raises(LeaseDiffers) as refused:
            await world.grant(41, service="orders", instance="orders-1", **field)
        assert refused.value.pointer == f"/{next(iter(field))}"

    scenario()


@pytest.mark.parametrize(
    ("has", "default"),
    [
        ({"protocol": "udp"}, {"protocol": "tcp"}),
        ({"address": "0.0.0.0"}, {"address": "127.0.0.1"}),
        ({"address": "own"}, {"address": "127.0.0.1"}),
        ({"priority": 5}, {"priority": 0}),
    ],
)
def test_asking_again_for_a_default_that_differs_is_lease_differs(has, default):
    @in_world()
    async def scenario(world):
        world.processes.start(41)
        name = {"service": "orders", "instance": "orders-1"}
        lease = await world.grant(41, **name, **has)
        assert (await world.grant(41, **name)).id == (await world.grant(41, **name, **has)).id == lease.id
        with pytest.raises(LeaseDiffers) as refused:
            await world.grant(41, **name, **default)
        assert refused.value.pointer == f"/{next(iter(default))}"

    scenario()


@in_world()
async def test_repeated_request_for_a_busy_port_changes_nothing(world):
    world.processes.start(41)
    world.foreign.add(Binding("tcp", LOOPBACK, 3000))
    request = {"service": "orders", "instance": "orders-1", "port": 3000}
    assert (await world.grant(41, **request)).id == (await world.grant(41, **request)).id


@in_world()
async def test_a_refused_call_restarts_no_clock(world):
    world.processes.start(41)
    lease = await world.grant(41, service="a", instance="a-1", ttl=10.0)
    world.clock.advance(6.0)
    before = world.service.view(lease, world.caller(admin=True)).expires_at
    with pytest.raises(Refusal):
        await world.ask(
            [LeaseRequest(service="a", instance="a-1", ttl=10.0), LeaseRequest(service="b", port=1, exact=True)], pid=41
        )
    assert world.service.view(lease, world.caller(admin=True)).expires_at == before
    world.pass_time(4.0)
    await world.settle()
    assert world.table.get(lease.id) is None


# --- ports ---


@pytest.mark.parametrize(
    ("ports", "numbers"),
    [
        (8080, (8080,)),
        ("8000-8002", (8000, 8001, 8002)),
        ("8080", (8080,)),
        ((3000, "8000-8001", 3000), (3000, 8000, 8001)),
    ],
)
def test_requested_ports_are_numbers_ranges_and_lists(ports, numbers):
    assert port_numbers(ports) == numbers


@pytest.mark.parametrize("ports", ["8010-8000", "0-10", "65000-66000"])
def test_a_range_that_is_none_is_refused(ports):
    with pytest.raises(InvalidRequest) as refused:
        port_numbers(ports)
    assert refused.value.pointer == "/port"


@in_world()
async def test_the_first_free_one_of_the_requested_ports_is_granted(world):
    world.processes.start(41)
    world.foreign.add(Binding("tcp", LOOPBACK, 3000))
    assert (await world.grant(41, service="a", port=(3000, "8000-8001"))).port == 8000
    assert (await world.grant(41, service="a", port=(3000, "8000-8001"))).port == 8001
    assert (await world.grant(41, service="a", port=(3000, "8000-8001"))).port == 20000
    with pytest.raises(PortTaken) as refused:
        await world.grant(41, service="a", port=(3000, "8000-8001"), exact=True)
    assert "a-1" in refused.value.detail


@in_world()
async def test_an_exact_port_that_is_leased_names_who_has_it(world):
    world.processes.start(41)
    await world.grant(41, service="orders", port=8080)
    with pytest.raises(PortTaken) as refused:
        await world.grant(41, service="a", port=8080, exact=True)
    assert "orders-1" in refused.value.detail
    assert "pid 41" in refused.value.detail


@in_world()
async def test_ports_in_relation_are_found_together(world):
    world.processes.start(41)
    world.foreign.add(Binding("tcp", LOOPBACK, 20005))
    call = [LeaseRequest(service="k", endpoint=name, offset=offset) for name, offset in (("peer", 5), ("admin", 7))]
    leases = (await world.ask([LeaseRequest(service="k"), *call], pid=41)).leases
    assert [lease.port for lease in leases] == [20001, 20006, 20008]
    assert {lease.instance for lease in leases} == {"k-1"}
    assert set(world.holds.held) == {lease.id for lease in leases}


@in_world(ports=range(20000, 20003))
async def test_ports_in_relation_are_granted_all_or_none(world):
    world.processes.start(41)
    for port in range(20010, 20013):
        world.foreign.add(Binding("tcp", LOOPBACK, port))
    before = (dict(world.holds.held), world.allocator.count("default"))
    with pytest.raises(PortTaken) as refused:
        await world.ask([LeaseRequest(service="k"), LeaseRequest(service="k", endpoint="peer", offset=10)], pid=41)
    assert refused.value.pointer.startswith("/1") or refused.value.pointer.startswith("/0/1")
    assert (dict(world.holds.held), world.allocator.count("default")) == before
    assert world.processes.watched_count == 0


@in_world(ports=range(20000, 20003))
async def test_a_refused_offset_points_to_its_own_request(world):
    world.processes.start(41)
    for port in range(20010, 20013):
        world.foreign.add(Binding("tcp", LOOPBACK, port))
    with pytest.raises(PortTaken) as refused:
        await world.ask([LeaseRequest(service="k"), LeaseRequest(service="k", endpoint="peer", offset=10)], pid=41)
    assert refused.value.pointer == "/1/port"


@in_world()
async def test_lease_renewed_by_a_second_attempt_still_expires(world):
    world.processes.start(41)
    renewed = await world.grant(41, service="k", instance="k-1", endpoint="peer", ttl=30.0)
    world.processes.end(41)
    world.processes.start(42)
    world.foreign.add(Binding("tcp", LOOPBACK, 20006))
    call = [
        LeaseRequest(service="k"),
        LeaseRequest(service="k", instance="k-1", endpoint="peer", ttl=30.0, offset=20),
        LeaseRequest(service="k", endpoint="admin", offset=5),
    ]
    leases = (await world.ask(call, pid=42)).leases
    assert [lease.port for lease in leases] == [20002, renewed.port, 20007]
    world.pass_time(31.0)
    await world.settle()
    assert world.table.get(renewed.id) is None


@in_world()
async def test_an_offset_needs_a_first_request_without_one(world):
    world.processes.start(41)
    for call in ([{"offset": 1}], [{"offset": 1}, {}], [{}, {"offset": 1, "port": 8080}]):
        with pytest.raises(InvalidRequest):
            await world.ask(
                [LeaseRequest(service="k", endpoint=f"e{n}", **fields) for n, fields in enumerate(call)], pid=41
            )
    assert world.holds.held == {}


@in_world(
    statics=[StaticPort("zk", 2181, "tcp", LOOPBACK), StaticPort("zk", 2888, "tcp", LOOPBACK, "peer")],
)
async def test_static_ports_are_held_while_their_service_is_absent(world):
    world.processes.start(41)
    assert {binding.port for binding, _ in world.holds.held.values()} == {2181, 2888}
    with pytest.raises(PortReserved):
        await world.grant(41, service="other", port=2888, exact=True)
    main, peer = (
        await world.ask([LeaseRequest(service="zk"), LeaseRequest(service="zk", endpoint="peer")], pid=41)
    ).leases
    assert (main.port, peer.port, peer.lifetime) == (2181, 2888, "static")
    with pytest.raises(PortTaken) as refused:
        await world.grant(41, service="zk")
    assert "zk-1" in refused.value.detail, "never another number in silence"
    world.processes.end(41)
    assert {binding.port for binding, _ in world.holds.held.values()} == {2181, 2888}


@in_world(statics=[StaticPort("web", 80, "tcp", LOOPBACK)])
async def test_a_low_static_port_is_for_listed_users_and_admins(world):
    world.processes.start(41)
    with pytest.raises(PortReserved):
        await world.grant(41, service="web")
    assert (await world.grant(41, admin=True, service="web")).port == 80


# --- shares ---


@in_world(quota_per_uid=3)
async def test_grants_and_releases_use_no_more_than_the_share(world):
    world.processes.start(41)
    ports = set()
    for number in range(20):
        lease = await world.grant(41, service="churn", instance=f"churn-{number}")
        ports.add(lease.port)
        await world.service.release(lease.id, world.caller(41))
    assert len(ports) == 3


@in_world(quota_per_uid=3)
async def test_declined_ports_count_to_the_share_of_who_declines(world):
    world.processes.start(41)
    world.processes.start(42, uid=2000)
    lease = await world.grant(41, service="liar")
    for _ in range(2):
        lease = await world.service.decline(lease.id, world.caller(41))
    with pytest.raises(QuotaExceeded):
        await world.grant(41, service="liar")
    with pytest.raises(QuotaExceeded):
        await world.service.decline(lease.id, world.caller(41))
    assert (await world.grant(42, uid=2000, service="honest")).port


@in_world()
async def test_tags_and_metadata_together_are_bounded(world):
    world.processes.start(41)
    metadata = {f"k{number}": "x" * 512 for number in range(32)}
    with pytest.raises(InvalidRequest) as refused:
        await world.grant(41, service="orders", metadata=metadata)
    assert refused.value.pointer == "/metadata"


# --- waiting ---


@in_world()
async def test_wait_for_exact_port_ends_when_it_is_released(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders", port=8080)
    request = LeaseRequest(service="orders", instance="orders-1", port=8080, exact=True, endpoint="next")
    waiting = asyncio.create_task(world.service.grant([request], world.caller(41), 5.0))
    await asyncio.sleep(0)
    await world.service.release(lease.id, world.caller(41))
    granted = await asyncio.wait_for(waiting, 2.0)
    assert granted.leases[0].port == 8080


@in_world()
async def test_a_wait_that_is_over_is_answered_with_the_refusal(world):
    world.processes.start(41)
    world.foreign.add(Binding("tcp", LOOPBACK, 8080))
    with pytest.raises(PortTaken):
        await world.service.grant([LeaseRequest(service="a", port=8080, exact=True)], world.caller(41), 0.01)


# --- answers ---


@in_world()
async def test_a_renewal_that_is_answered_outlives_the_old_deadline(world):
    lease = await world.grant(service="orders", ttl=10.0)
    world.store.gate.clear()
    renewal = asyncio.create_task(world.service.renew(lease.id, world.caller(), 3600.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    world.pass_time(10.0)
    world.store.gate.set()
    assert (await renewal).ttl == 3600.0
    world.pass_time(1.0)
    await world.settle()
    assert world.table.get(lease.id) is not None


@in_world()
async def test_a_renewal_that_the_disk_refuses_leaves_the_old_deadline(world):
    lease = await world.grant(service="orders", ttl=10.0)
    world.store.failing = "unavailable"
    with pytest.raises(Refusal):
        await world.service.renew(lease.id, world.caller(), 3600.0)
    world.store.failing = ""
    world.pass_time(10.0)
    await world.settle()
    assert world.table.get(lease.id) is None


@in_world()
async def test_expiry_that_disk_refuses_ends_nothing_and_is_tried_again(world):
    lease = await world.grant(service="orders", ttl=10.0)
    world.store.failing = "unavailable"
    world.pass_time(10.0)
    for _ in range(5):
        await asyncio.sleep(0)
    assert world.table.get(lease.id) is not None, "what was published is not undone by a crash"
    world.store.failing = ""
    world.pass_time(1.0)
    await world.settle()
    assert world.table.get(lease.id) is None


@in_world()
async def test_a_grant_whose_owner_exited_meanwhile_is_answered_as_ended(world):
    world.processes.start(41)
    world.store.gate.clear()
    grant = asyncio.create_task(world.grant(41, service="orders"))
    while not world.processes.watched_count:
        await asyncio.sleep(0)
    world.processes.end(41)
    world.store.gate.set()
    assert (await grant).state == "ended"
