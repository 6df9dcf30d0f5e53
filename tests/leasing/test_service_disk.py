"""LeaseService in a world that the test drives: full, lost and hanging disks, restarts and reboots."""

from __future__ import annotations

import asyncio

import pytest

import portd.leasing.journal
import portd.leasing.timers
from portd.core.bindings import Binding
from portd.core.errors import (
    Busy,
    PortTaken,
    StoreLost,
    StoreUnavailable,
)
from portd.testing.world import in_world

LOOPBACK = "127.0.0.1"


@in_world()
async def test_full_disk_refuses_grants_changes_nothing_and_recovers(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    world.store.failing = "unavailable"
    before = (dict(world.holds.held), len(world.table), world.allocator.count("default"))
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await world.grant(41, service="billing")
    with pytest.raises(StoreUnavailable):
        await world.service.release(lease.id, world.caller(41))
    assert (dict(world.holds.held), len(world.table), world.allocator.count("default")) == before
    assert (await world.service.find(lease.id)).state == "held"
    world.store.failing = ""
    assert (await world.grant(41, service="billing")).port == 20001


@in_world()
async def test_exit_applies_on_a_full_disk_and_is_written_later(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    world.store.failing = "unavailable"
    world.processes.end(41)
    assert world.table.get(lease.id) is None
    world.processes.start(42)
    with pytest.raises(StoreUnavailable):
        await world.grant(42, service="orders")
    world.store.failing = ""
    await world.grant(42, service="orders")
    assert (await world.store.lease(lease.id)).ended_because == "owner_exited"


@in_world()
async def test_lost_commit_stops_journal_and_nothing_of_it_is_answered(world):
    world.processes.start(41)
    world.store.failing = "unknown"
    with pytest.raises(StoreUnavailable):
        await world.grant(41, service="orders")
    with pytest.raises(StoreLost):
        await world._task
    world.store.failing = ""
    await world.restart()
    assert [lease.service for lease in world.table] == ["orders"], "the disk had it: the port is kept, never doubled"


@in_world()
async def test_too_many_waiting_requests_get_busy(world):
    world.processes.start(41)
    world.store.gate.clear()
    world.ports.extend(range(30000, 30000 + portd.leasing.journal.PENDING_MAX))
    await world.restart()
    tasks = [
        asyncio.create_task(world.grant(41, service="orders", port=40000 + n))
        for n in range(portd.leasing.journal.PENDING_MAX + portd.leasing.journal.BATCH_MAX + 2)
    ]
    await asyncio.sleep(0)
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert all(isinstance(task.exception(), Busy) for task in done)
    held = len(world.holds.held)
    world.store.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    granted = [result for result in results if not isinstance(result, Exception)]
    assert len(granted) == held == len(world.table)


@in_world()
async def test_everything_is_as_it_was_after_a_restart(world):
    world.processes.start(41)
    world.processes.start(42)
    process = await world.grant(41, service="orders", tags=("blue",), metadata={"version": "1"})
    timed = await world.grant(service="timed", ttl=30.0)
    gone = await world.grant(42, service="gone")
    ended = await world.grant(41, service="ended")
    await world.service.release(ended.id, world.caller(41))
    revision = world.table.revision
    world.processes.vanish(42)
    world.clock.advance(2.0)
    await world.restart()
    assert world.table.get(process.id) == process
    assert world.table.get(timed.id).ttl == 30.0
    assert world.events[-1].lease.ended_because == "owner_exited"
    assert world.events[-1].lease.id == gone.id
    assert world.events[-1].revision > revision
    assert set(world.holds.held) == {process.id, timed.id}
    world.pass_time(29.0)
    assert world.table.get(timed.id) is not None, "a full period after the restart"
    world.processes.end(41)
    assert world.table.get(process.id) is None, "the pidfd was opened again"
    world.processes.start(43)
    assert (await world.grant(43, service="ended")).port == ended.port, "its last port"


@in_world()
async def test_hold_blocked_at_the_start_is_restored_later(world):
    lease = await world.grant(service="orders", ttl=600.0)
    place = Binding("tcp", LOOPBACK, lease.port)
    await world.kill()
    world.foreign.add(place)
    await world.start()
    assert world.holds.held == {}
    assert world.service.without_hold_count == 1
    world.foreign.discard(place)
    world.pass_time(portd.leasing.timers.HOLD_AGAIN_S)
    assert world.holds.held[lease.id][0] == place
    assert world.service.without_hold_count == 0


@in_world()
async def test_a_cooldown_goes_on_over_a_restart(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    await world.service.release(lease.id, world.caller(41))
    world.clock.advance(2.0)
    await world.restart()
    with pytest.raises(PortTaken):
        await world.grant(41, service="billing", port=lease.port, exact=True)
    world.pass_time(3.0)
    assert (await world.grant(41, service="billing", port=lease.port, exact=True)).port == lease.port


@in_world()
async def test_reboot_ends_process_leases_and_keeps_instances_ports(world):
    world.processes.start(41)
    first = await world.grant(41, service="first")
    lease = await world.grant(41, service="orders")
    timed = await world.grant(service="timed", ttl=30.0)
    world.boot_id = "another boot"
    await world.restart()
    await world.settle()
    assert {event.lease.ended_because for event in world.events if event.type == "ended"} == {"host_rebooted"}
    assert [left.id for left in world.table] == [timed.id]
    assert (await world.store.lease(first.id)).ended_because == "host_rebooted"
    assert (await world.grant(service="orders", ttl=5.0)).port == lease.port


@in_world()
async def test_revisions_grow_over_restarts_and_are_never_given_twice(world):
    seen = []
    for _ in range(3):
        lease = await world.grant(service="orders", ttl=30.0)
        world.store.failing = "unavailable"
        world.service.observe_health(lease.id, "passing", "")
        seen += [event.revision for event in world.events]
        world.events.clear()
        world.store.failing = ""
        await world.restart()
    assert seen == sorted(set(seen))


@in_world()
async def test_hanging_disk_is_reported_and_its_late_write_undone(world):
    world.processes.start(41)
    world.journal.patience_s = 0.01
    world.store.gate.clear()
    with pytest.raises(StoreUnavailable):
        await world.grant(41, service="orders")
    with pytest.raises(StoreUnavailable):
        await world.grant(41, service="orders")
    world.store.gate.set()
    await world.settle()
    assert [(event.type, event.lease.ended_because) for event in world.events] == [
        ("granted", None),
        ("ended", "revoked"),
    ]
    assert world.holds.held == {}


@in_world()
async def test_exit_is_noticed_while_grant_hangs_on_disk(world):
    world.processes.start(41)
    world.processes.start(42)
    known = await world.grant(42, service="billing")
    world.journal.patience_s = 0.01
    world.store.gate.clear()
    with pytest.raises(StoreUnavailable):
        await world.grant(41, service="orders")
    world.processes.end(42)
    assert world.table.get(known.id) is None, "a dead instance is in no look-up"
    world.store.gate.set()
    await world.settle()
    revisions = [event.revision for event in world.events]
    assert revisions == sorted(set(revisions))
    assert {lease.id for lease in (await world.store.load()).live} == set()


@in_world()
async def test_release_that_hung_and_exit_meanwhile_end_lease_once(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    world.journal.patience_s = 0.01
    world.store.gate.clear()
    with pytest.raises(StoreUnavailable):
        await world.service.release(lease.id, world.caller(41))
    world.processes.end(41)
    world.store.gate.set()
    await world.settle()
    assert [event.lease.ended_because for event in world.events if event.type == "ended"] == ["owner_exited"]
