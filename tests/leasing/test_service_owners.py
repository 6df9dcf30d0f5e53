"""LeaseService in a world that the test drives: whose a lease is, who may change it, and how long it lasts."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from portd.core.errors import (
    InvalidRequest,
    LeaseEnded,
    NoClock,
    NotFound,
    NotOwner,
    OtherNetwork,
    QuotaExceeded,
    Unauthenticated,
)
from portd.core.requests import LeaseRequest
from portd.core.rights import Caller, hash_token
from portd.testing.world import in_world


@in_world()
async def test_a_caller_that_is_not_known_must_give_a_ttl(world):
    with pytest.raises(InvalidRequest) as refused:
        await world.service.grant([LeaseRequest(service="orders")], Caller(known_by="token"))
    assert refused.value.pointer == "/ttl"


@in_world()
async def test_a_process_that_is_gone_gets_no_lease(world):
    world.processes.start(41)
    with pytest.raises(InvalidRequest) as refused:
        await world.ask([LeaseRequest(service="orders", pid=4242)], pid=41)
    assert refused.value.pointer == "/pid"


@pytest.mark.parametrize("fields", [{}, {"ttl": 60.0}, {"pid": 41, "ttl": 60.0}])
def test_a_connection_whose_opener_has_exited_gets_no_lease(fields):
    @in_world()
    async def scenario(world):
        world.processes.start(41)
        with pytest.raises(OtherNetwork):
            await world.ask([LeaseRequest(service="orders", **fields)], pid=4242)
        assert len(world.table) == 0

    scenario()


@in_world()
async def test_a_caller_of_another_network_gets_no_lease_for_anybody(world):
    world.processes.start(41)
    caller = replace(world.caller(41), other_network=True)
    for fields in ({}, {"ttl": 60.0}, {"pid": 41}):
        with pytest.raises(OtherNetwork):
            await world.service.grant([LeaseRequest(service="orders", **fields)], caller)


@in_world()
async def test_a_local_caller_without_a_peer_gets_no_lease(world):
    with pytest.raises(Unauthenticated):
        await world.service.grant([LeaseRequest(service="orders", ttl=60.0)], Caller(known_by="socket"))


@in_world()
async def test_process_that_dies_between_request_and_grant_leaves_no_lease(world):
    world.processes.start(41)
    world.store.gate.clear()
    grant = asyncio.create_task(world.grant(41, service="orders"))
    while not world.processes.watched_count:
        await asyncio.sleep(0)
    world.processes.end(41)
    world.store.gate.set()
    await grant
    await world.settle()
    assert len(world.table) == 0
    assert [event.type for event in world.events] == ["granted", "ended"]
    assert world.holds.held == {}


@in_world()
async def test_ended_lease_is_listed_once_before_it_is_durable(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    world.processes.end(41)
    assert [each.id for each in world.service.journal.unwritten_ends()] == [lease.id]
    assert [(each.id, each.ended_because) for each in await world.service.ended("orders")] == [
        (lease.id, "owner_exited")
    ]
    assert await world.service.ended("billing") == []
    await world.service.journal.drain(5.0)
    assert world.service.journal.unwritten_ends() == []
    assert [each.id for each in await world.service.ended()] == [lease.id]


@in_world()
async def test_a_later_process_with_the_same_pid_is_another_owner(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders", instance="orders-1")
    world.processes.end(41)
    world.processes.start(41)
    again = await world.grant(41, service="orders", instance="orders-1")
    assert again.id != lease.id
    assert again.port == lease.port


@in_world()
async def test_a_lease_for_another_users_process_is_refused(world):
    for pid, uid in ((41, 1001), (42, 1000), (43, 0)):
        world.processes.start(pid, uid=uid)
    with pytest.raises(NotOwner):
        await world.ask([LeaseRequest(service="orders", pid=41)], pid=42, uid=1000)
    granted = await world.ask([LeaseRequest(service="orders", pid=41)], pid=43, uid=0, admin=True)
    assert granted.leases[0].owner.uid == 1001


@in_world()
async def test_new_process_of_a_user_takes_over_its_ttl_lease(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders", instance="orders-1", ttl=30.0)
    world.processes.end(41)
    assert world.table.get(lease.id) is not None, "a ttl lease outlives the process that asked"
    world.processes.start(42)
    again = await world.ask([LeaseRequest(service="orders", instance="orders-1", ttl=30.0)], pid=42)
    assert again.leases[0].id == lease.id
    assert not again.is_new
    assert world.table.get(lease.id).owner.pid == 42


@in_world(quota_per_uid=2)
async def test_a_user_has_no_more_leases_than_the_quota(world):
    world.processes.start(41)
    for _ in range(2):
        await world.grant(41, service="orders")
    with pytest.raises(QuotaExceeded):
        await world.grant(41, service="orders")
    assert len(world.holds.held) == 2


@in_world()
async def test_only_the_owner_a_token_and_admins_change_a_lease(world):
    world.processes.start(41)
    granted = await world.ask([LeaseRequest(service="orders")], pid=41)
    lease, token = granted.leases[0], granted.tokens[0]
    with pytest.raises(NotOwner):
        await world.service.drain(lease.id, world.caller(uid=1001), True)
    with pytest.raises(Unauthenticated):
        await world.service.drain(lease.id, Caller(), True)
    for caller in (Caller(token_hash=hash_token(token)), world.caller(uid=1000), world.caller(uid=0, admin=True)):
        assert (await world.service.drain(lease.id, caller, True)).drain
        assert not (await world.service.drain(lease.id, caller, False)).drain
    assert token.encode() not in b"".join(world.store._bodies.values())


@in_world()
async def test_releasing_again_does_nothing_and_unknown_id_is_not_found(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    await world.service.release(lease.id, world.caller(41))
    revision = world.table.revision
    await world.service.release(lease.id, world.caller(41))
    assert world.table.revision == revision
    assert (await world.service.find(lease.id)).ended_because == "released"
    with pytest.raises(NotFound):
        await world.service.release("nope", world.caller(41))


@in_world()
async def test_a_ttl_lease_ends_at_its_time_unless_renewed(world):
    lease = await world.grant(service="orders", ttl=30.0)
    world.pass_time(29.0)
    await world.service.renew(lease.id, world.caller(), None)
    world.pass_time(29.0)
    assert world.table.get(lease.id) is not None
    world.pass_time(1.0)
    await world.settle()
    assert world.events[-1].lease.ended_because == "expired"
    assert world.events[-1].lease.renewed_at is not None
    with pytest.raises(LeaseEnded):
        await world.service.renew(lease.id, world.caller(), None)


@in_world()
async def test_renewing_commits_nothing_and_a_new_period_is_durable(world):
    lease = await world.grant(service="orders", ttl=30.0)
    commits = world.store.commit_count
    for _ in range(10):
        await world.service.renew(lease.id, world.caller(), None)
    assert world.store.commit_count == commits
    await world.service.renew(lease.id, world.caller(), 60.0)
    await world.restart()
    world.pass_time(59.0)
    assert world.table.get(lease.id) is not None
    world.pass_time(1.0)
    await world.settle()
    assert world.table.get(lease.id) is None


@in_world()
async def test_time_that_the_daemon_lost_is_given_back(world):
    lease = await world.grant(service="orders", ttl=30.0)
    world.clock.lose(3600.0)
    world.service.run_due()
    assert world.table.get(lease.id) is not None
    view = world.service.view(lease, world.caller(admin=True))
    assert (view.expires_at - view.created_at).total_seconds() == pytest.approx(3630.0)


@in_world()
async def test_a_process_lease_has_no_clock(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    with pytest.raises(NoClock):
        await world.service.renew(lease.id, world.caller(41), None)


@in_world()
async def test_lease_survives_its_owners_change_of_user(world):
    """memcached -u, mosquitto, setpriv, su and every setuid program change their user after the grant."""
    world.processes.start(41)
    lease = await world.grant(41, service="cache")
    world.service.observe_state(lease.id, "bound", world.processes.change(41, uid=65534, exe="/usr/bin/memcached"))
    await world.settle()
    now = await world.service.find(lease.id)
    assert (now.uid, now.owner.uid, now.owner.exe) == (1000, 65534, "/usr/bin/memcached")
    await world.service.release(lease.id, world.caller(uid=1000))
    assert world.table.count_of_user(1000) == world.table.count_of_user(65534) == 0


@in_world()
async def test_exit_of_owner_that_changed_user_ends_its_lease(world):
    world.processes.start(41)
    lease = await world.grant(41, service="cache")
    world.service.observe_state(lease.id, "bound", world.processes.change(41, uid=65534))
    world.processes.end(41)
    await world.settle()
    assert (await world.service.find(lease.id)).ended_because == "owner_exited"
    await world.grant(0, service="next", ttl=5.0)  # the daemon goes on
