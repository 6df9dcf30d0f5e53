"""What becomes of a lease when its owner exits, is exchanged, or was there before the lease."""

from __future__ import annotations

import asyncio

import pytest

from portd.core.errors import InvalidRequest, NotFound, NotOwner, PortTaken, StoreUnavailable
from portd.core.requests import LeaseRequest
from portd.testing.world import in_world

PORT = 20000


async def start_and_exit(world, **fields):
    """Grant port PORT to process 41, whose child 42 may listen, and let 41 exit."""
    world.processes.start(41)
    world.processes.start(42)
    lease = await world.grant(41, service="orders", port=PORT, **fields)
    world.processes.end(41)
    return lease


def types(world):
    return [event.type for event in world.events]


@in_world()
async def test_lease_passes_to_its_own_listener_and_ends_with_it(world):
    world.listening[PORT] = 42
    lease = await start_and_exit(world)
    passed = world.table.get(lease.id)
    assert (passed.owner.pid, passed.passed_from.pid, passed.vouched_by) == (42, 41, "descendant")
    world.listening.clear()
    world.processes.end(42)
    assert world.table.get(lease.id) is None
    assert types(world) == ["granted", "passed", "ended"]


@in_world()
async def test_a_lease_without_a_listener_ends_at_the_exit(world):
    lease = await start_and_exit(world)
    assert world.table.get(lease.id) is None
    assert not world.processes.watched_count


@in_world()
async def test_an_ended_lease_is_taken_up_again_under_its_id(world):
    lease = await start_and_exit(world)
    ended = world.events[-1].lease
    world.listening[PORT] = 42
    world.service.observe_exit(ended, world.successor(ended))
    resumed = world.table.get(lease.id)
    assert (resumed.state, resumed.owner.pid, resumed.port, resumed.ended_at) == ("held", 42, PORT, None)
    assert world.allocator.count("default")[1:4] == (1, 0, 0), "it does not cool any more"
    await world.settle()
    await world.restart()
    assert world.table.get(lease.id).owner.pid == 42
    world.listening.clear()
    world.processes.end(42)
    assert world.table.get(lease.id) is None


@pytest.mark.parametrize("fields", [{"instance": "orders-1"}, {"instance": "orders-2", "port": PORT}])
def test_what_was_granted_meanwhile_is_not_taken_back(fields):
    @in_world(cooldown_s=0.0)
    async def scenario(world):
        lease = await start_and_exit(world)
        ended = world.events[-1].lease
        world.pass_time(1.0)
        world.processes.start(43)
        other = await world.grant(43, service="orders", **fields)
        world.listening[PORT] = 42
        world.service.observe_exit(ended, world.successor(ended))
        assert world.table.get(lease.id) is None
        assert world.table.get(other.id) is not None

    scenario()


@in_world()
async def test_owner_that_died_during_restart_passes_its_lease_on(world):
    world.processes.start(41)
    world.processes.start(42)
    lease = await world.grant(41, service="orders", port=PORT)
    world.processes.vanish(41)
    world.listening[PORT] = 42
    await world.restart()
    assert world.table.get(lease.id).owner.pid == 42


@in_world()
async def test_transfer_makes_lease_last_as_long_as_new_owner(world):
    world.processes.start(41)
    world.processes.start(42)
    lease = await world.grant(41, service="orders")
    moved = await world.service.transfer(lease.id, world.caller(41), 42)
    assert (moved.owner.pid, moved.uid) == (42, 1000)
    world.processes.end(41)
    assert world.table.get(lease.id) is not None
    world.processes.end(42)
    assert world.table.get(lease.id) is None


@in_world()
async def test_a_transfer_outlives_the_old_owners_exit_on_its_way(world):
    world.processes.start(41)
    world.processes.start(42)
    lease = await world.grant(41, service="orders")
    world.store.gate.clear()
    transfer = asyncio.create_task(world.service.transfer(lease.id, world.caller(42), 42))
    while world.processes.watched_count < 2:
        await asyncio.sleep(0)
    world.processes.end(41)
    world.store.gate.set()
    assert (await transfer).owner.pid == 42
    assert world.table.get(lease.id).owner.pid == 42


@in_world()
async def test_a_transfer_that_the_disk_refuses_leaves_the_owner(world):
    world.processes.start(41)
    world.processes.start(42)
    lease = await world.grant(41, service="orders")
    world.store.failing = "unavailable"
    with pytest.raises(StoreUnavailable):
        await world.service.transfer(lease.id, world.caller(41), 42)
    assert (world.table.get(lease.id).owner.pid, world.processes.watched_count) == (41, 1)


@in_world()
async def test_transfer_is_refused_to_other_users_and_for_their_processes(world):
    world.processes.start(41)
    world.processes.start(42, uid=1001)
    lease = await world.grant(41, service="orders")
    with pytest.raises(NotOwner):
        await world.service.transfer(lease.id, world.caller(42, 1001), 42)
    with pytest.raises(NotOwner):
        await world.service.transfer(lease.id, world.caller(41), 42)
    with pytest.raises(InvalidRequest):
        await world.service.transfer(lease.id, world.caller(41), 4242)
    with pytest.raises(NotFound):
        await world.service.transfer("nobody", world.caller(41), 41)
    assert world.table.get(lease.id).owner.pid == 41


async def adopt(world, pid=41, uid=1000, *, admin=False, **fields):
    request = LeaseRequest(service="db", adopt=True, **fields)
    return (await world.ask([request], pid=pid, uid=uid, admin=admin)).leases[0]


@in_world()
async def test_adopted_process_is_bound_at_once_and_ends_its_lease(world):
    world.processes.start(41)
    world.listening[PORT] = 41
    lease = await adopt(world, port=PORT)
    assert (lease.state, lease.port, lease.owner.pid, lease.listening) == ("bound", PORT, 41, ("127.0.0.1",))
    world.listening.clear()
    world.processes.end(41)
    assert world.table.get(lease.id) is None


@in_world()
async def test_port_outside_pools_and_in_cooldown_can_be_adopted(world):
    world.processes.start(41)
    world.processes.start(42)
    released = await world.grant(42, service="other", port=PORT)
    await world.service.release(released.id, world.caller(42))
    for port in (PORT, 5432, 80):
        world.listening[port] = 41
        assert (await adopt(world, port=port)).port == port


@in_world()
async def test_another_users_process_is_adopted_by_admins_alone(world):
    world.processes.start(41)
    world.processes.start(42, uid=1001)
    world.listening[PORT] = 42
    with pytest.raises(NotOwner):
        await adopt(world, port=PORT)
    assert (await adopt(world, port=PORT, admin=True)).uid == 1001


@in_world()
async def test_adoption_needs_listener_on_port_that_nobody_leases(world):
    world.processes.start(41)
    for fields in ({}, {"port": PORT}, {"port": PORT, "pid": 41}):
        with pytest.raises(InvalidRequest):
            await adopt(world, **fields)
    lease = await world.grant(41, service="orders", port=PORT)
    world.listening[PORT] = 41
    with pytest.raises(PortTaken):
        await adopt(world, port=PORT)
    assert [each.id for each in world.table] == [lease.id]
