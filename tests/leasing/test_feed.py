"""Feed: what followers get, over restarts and crashes too, and what is answered RevisionGone."""

from __future__ import annotations

import pytest

import portd.leasing.feed
from portd.core.errors import RevisionGone
from portd.leasing.feed import Feed
from portd.leasing.seams import REVISION_GAP, Loaded
from portd.testing.world import in_world


@in_world()
async def test_followers_see_an_observation_only_once_it_is_durable(world):
    seen = []
    world.feed.follow(seen.append, "follower")
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    world.store.gate.clear()
    world.processes.end(41)
    assert world.table.get(lease.id) is None, "look-ups drop it at once"
    assert [event.type for event in seen] == ["granted"]
    world.store.gate.set()
    await world.settle()
    assert [event.type for event in seen] == ["granted", "ended"]


@in_world()
async def test_followers_see_observations_at_once_while_the_store_fails(world):
    seen = []
    world.feed.follow(seen.append, "follower")
    world.processes.start(41)
    await world.grant(41, service="orders")
    world.journal.mark_unwritable("the disk is full")
    world.store.failing = "unavailable"
    world.processes.end(41)
    assert [event.type for event in seen] == ["granted", "ended"]


@in_world()
async def test_owner_that_died_during_restart_is_in_replay(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    await world.settle()
    seen = world.feed.revision
    await world.kill()
    world.processes.vanish(41)
    await world.restart()
    await world.settle()
    assert [(event.type, event.lease.id) for event in world.feed.since(seen)] == [("ended", lease.id)]


@in_world()
async def test_a_revision_that_a_crash_took_back_is_gone(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    durable = world.feed.revision
    world.store.failing = "unavailable"
    world.service.observe_state(lease.id, "bound", None)
    lost = world.feed.revision
    await world.restart()
    world.store.failing = ""
    assert list(world.feed.since(durable)) == []
    with pytest.raises(RevisionGone):
        world.feed.since(lost)
    assert world.feed.changed_since("orders", lost), "a long poll is answered at once"


@in_world()
async def test_a_revision_of_a_quiet_run_is_resumed_after_restarts(world):
    await world.grant(service="orders", ttl=60.0)
    for _ in range(3):
        await world.restart()
        resumed_from = world.feed.revision
        await world.restart()
        assert list(world.feed.since(resumed_from)) == []
        await world.grant(service="orders", ttl=60.0)
        assert len(list(world.feed.since(resumed_from))) == 1


@in_world()
async def test_the_replay_of_a_full_ring_begins_where_it_says(world):
    for _ in range(3):
        await world.grant(service="orders", ttl=60.0)
    events = list(world.feed.since(0))
    feed = Feed()
    feed.restore(Loaded([], [], events[1:], REVISION_GAP + events[-1].revision, events[0].revision))
    assert [event.revision for event in feed.since(events[0].revision)] == [event.revision for event in events[1:]]
    with pytest.raises(RevisionGone):
        feed.since(events[0].revision - 1)


@in_world()
async def test_remembered_services_are_bounded_after_a_start(world):
    leases = [await world.grant(service=f"s{number}", ttl=60.0) for number in range(4)]
    before, portd.leasing.feed.SERVICES_KEPT = portd.leasing.feed.SERVICES_KEPT, 2
    try:
        feed = Feed()
        feed.restore(Loaded(leases, [], [], REVISION_GAP, 0))
        assert len(feed._changed) == 2
        assert feed.changed_since("s0", 1), "what is not remembered is answered at once"
    finally:
        portd.leasing.feed.SERVICES_KEPT = before


@in_world()
async def test_kept_events_are_bounded_in_bytes(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portd.leasing.feed, "EVENTS_BYTES", 20_000)
        world.processes.start(41)
        for number in range(8):
            await world.grant(41, service=f"s{number}", metadata={"x": "y" * 4_000})
        kept = list(world.feed.since(world.feed._gone))
    assert len(kept) == 3
    older = world.feed._gone - 1
    with pytest.raises(RevisionGone):
        world.feed.since(older)
