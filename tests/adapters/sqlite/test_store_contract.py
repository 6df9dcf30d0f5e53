"""What every `LeaseStore` promises: the one on disk and the one that tests drive keep the same contract."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import pytest
from msgspec.structs import replace

from portd.adapters.sqlite.store import SqliteStore
from portd.leasing.seams import REVISION_GAP, LeaseStore
from portd.testing.memory_store import MemoryStore
from tests.adapters.sqlite.nouns import a_lease, an_event, ended, granted

KINDS = ["memory", "sqlite"]


def on_every_store(test):
    """Run an async test once on each store."""

    @pytest.mark.parametrize("kind", KINDS)
    @functools.wraps(test)
    def run(kind, tmp_path):
        async def on_store():
            store = await make(kind, tmp_path)
            try:
                await test(store)
            finally:
                await store.close()

        asyncio.run(on_store())

    del run.__wrapped__  # pytest reads the signature
    return run


async def make(kind: str, place: Path) -> LeaseStore:
    return MemoryStore() if kind == "memory" else await SqliteStore.open(place / "portd.db", "full")


@on_every_store
async def test_a_new_store_remembers_nothing_and_starts_at_revision_0(store):
    assert (await store.load())[:5] == ([], [], [], 0, 0)
    assert await store.lease("lease-000001") is None
    assert await store.history(20001) == []
    assert await store.ended() == []


@on_every_store
async def test_a_lease_comes_back_as_it_was_secrets_too(store):
    lease = a_lease(1)
    await store.commit([an_event(1, lease)])
    assert await store.lease(lease.id) == lease
    loaded = await store.load()
    assert loaded.live == [lease]
    assert loaded.remembered == []
    assert loaded.events == [an_event(1, lease)]


@on_every_store
async def test_ended_lease_that_passed_on_may_end_again(store):
    lease = a_lease(1)
    await store.commit([an_event(1, lease)])
    await store.commit([an_event(2, ended(lease, 1.7e9), "ended")])
    passed = a_lease(1, revision=3)
    await store.commit([an_event(3, passed, "passed")])
    assert await store.lease(lease.id) == passed
    loaded = await store.load()
    assert (loaded.live, loaded.remembered) == ([passed], [])
    await store.commit([an_event(4, ended(passed, 1.7e9), "ended")])
    await store.commit([an_event(5, passed, "passed"), an_event(6, ended(passed, 1.7e9), "ended")])
    assert [each.revision for each in await store.ended()] == [6]
    assert (await store.load()).live == []


@on_every_store
async def test_commit_keeps_the_last_change_and_every_event(store):
    events = [
        an_event(1, a_lease(1)),
        an_event(2, a_lease(1, port=20009), "declined"),
        an_event(3, a_lease(1, port=20009, state="bound"), "bound"),
    ]
    await store.commit(events)
    loaded = await store.load()
    assert loaded.live == [events[-1].lease]
    assert loaded.events == events
    assert [lease.id for lease in await store.history(20009)] == ["lease-000001"]
    assert await store.history(20001) == []


@on_every_store
async def test_lease_granted_and_ended_in_one_commit_has_ended(store):
    events = [*granted([1]), an_event(2, ended(a_lease(1), 1_700_000_100.0), "ended"), *granted([3])]
    await store.commit(events)
    loaded = await store.load()
    assert loaded.live == [events[2].lease]
    assert loaded.remembered == [events[1].lease]
    assert loaded.events == events
    assert await store.lease("lease-000001") == events[1].lease
    assert await store.history(20001) == [events[1].lease]


@on_every_store
async def test_an_ended_lease_is_live_no_more_and_still_found(store):
    gone = ended(a_lease(1), 1_700_000_100.0)
    await store.commit(granted([1, 2]))
    await store.commit([an_event(3, gone, "ended")])
    loaded = await store.load()
    assert [lease.id for lease in loaded.live] == ["lease-000002"]
    assert [lease.id for lease in loaded.remembered] == ["lease-000001"]
    found = await store.lease(gone.id)
    assert found is not None
    assert (found.state, found.ended_at, found.ended_because) == ("ended", 1_700_000_100.0, "released")


@on_every_store
async def test_newest_end_of_each_name_and_port_is_remembered(store):
    def end(number, instance, port):
        lease = a_lease(number, instance=instance, port=port)
        return an_event(number, ended(lease, 1_700_000_000.0 + number), "ended")

    await store.commit(
        [
            end(1, "orders-1", 20001),  # forgotten: its name and its port have newer ends
            end(2, "orders-1", 20002),  # the newest of its port
            end(3, "orders-2", 20001),  # the newest of its name and its port
            end(4, "orders-1", 20004),  # the newest of its name and its port
            an_event(5, a_lease(5, instance="orders-1", port=20004)),
        ]
    )  # live: no matter here
    assert [lease.id for lease in (await store.load()).remembered] == ["lease-000002", "lease-000003", "lease-000004"]


@on_every_store
async def test_endpoints_of_one_instance_are_remembered_each(store):
    await store.commit(
        [
            an_event(
                n, ended(a_lease(n, instance="orders-1", endpoint=endpoint, port=20001), 1_700_000_000.0 + n), "ended"
            )
            for n, endpoint in enumerate(["main", "metrics"], 1)
        ]
    )
    assert [lease.endpoint for lease in (await store.load()).remembered] == ["main", "metrics"]


@on_every_store
async def test_history_tells_who_had_port_newest_first_live_and_ended(store):
    await store.commit(
        [
            an_event(1, ended(a_lease(1, port=80), 1_700_000_050.0), "ended"),
            an_event(2, a_lease(60, port=80)),
            an_event(3, a_lease(3, port=81)),
        ]
    )
    assert [lease.id for lease in await store.history(80)] == ["lease-000060", "lease-000001"]
    assert [lease.id for lease in await store.history(80, limit=1)] == ["lease-000060"]


@on_every_store
async def test_history_counts_from_the_grant_until_before_the_end(store):
    await store.commit(
        [an_event(1, ended(a_lease(10, port=80), 1_700_000_050.0), "ended"), an_event(2, a_lease(50, port=80))]
    )

    async def at(second):
        return [lease.id for lease in await store.history(80, at=1_700_000_000.0 + second)]

    assert await at(9.9) == []
    assert await at(10) == ["lease-000010"]
    assert await at(49.9) == ["lease-000010"]
    assert await at(50) == ["lease-000050"]
    assert await at(1e6) == ["lease-000050"]


@on_every_store
async def test_history_has_the_time_before_a_lease_moved(store):
    """Granted at second 1 on port 80, at 10 to port 81, at 20 back to 80, at 30 to 82, and ended there at 40."""
    moving = a_lease(1, port=80)
    moves = [(10, 80, 81), (20, 81, 80), (30, 80, 82)]
    await store.commit([an_event(1, moving)])
    await store.commit(
        [an_event(second, replace(moving, port=to, moved_from=left), "declined") for second, left, to in moves]
    )
    await store.commit([an_event(40, ended(replace(moving, port=82, moved_from=80), 1_700_000_040.0), "ended")])

    async def on(port, second=None):
        found = await store.history(port, at=None if second is None else 1_700_000_000.0 + second)
        return [(lease.port, lease.ended_at - 1_700_000_000.0, lease.ended_because) for lease in found]

    assert await on(80) == [(80, 30, None), (80, 10, None)]
    assert await on(81) == [(81, 20, None)]
    assert await on(82) == [(82, 40, "released")]
    assert await on(80, 15) == await on(82, 29) == []
    assert await on(80, 25) == [(80, 30, None)]
    assert await on(82, 30) == [(82, 40, "released")]
    await store.prune(1_700_000_025.0, 10)
    assert (await on(81), await on(80)) == ([], [(80, 30, None)])


@on_every_store
async def test_lease_of_both_protocols_is_in_history_of_either(store):
    await store.commit(
        [an_event(n, a_lease(n, port=53, protocol=protocol)) for n, protocol in enumerate(["tcp", "udp", "both"], 1)]
    )

    async def of(protocol):
        return [lease.protocol for lease in await store.history(53, protocol=protocol)]

    assert await of("tcp") == ["both", "tcp"]
    assert await of("udp") == ["both", "udp"]
    assert await of("both") == await of(None) == ["both", "udp", "tcp"]


@on_every_store
async def test_ended_leases_are_listed_newest_end_first_and_by_service(store):
    await store.commit(
        [
            an_event(n, ended(a_lease(n, service=service), 1_700_000_100.0 - n), "ended")
            for n, service in enumerate(["orders", "billing", "orders"], 1)
        ]
        + [an_event(4, a_lease(4))]
    )
    assert [lease.id for lease in await store.ended()] == ["lease-000001", "lease-000002", "lease-000003"]
    assert [lease.id for lease in await store.ended("orders")] == ["lease-000001", "lease-000003"]
    assert [lease.id for lease in await store.ended("orders", limit=1)] == ["lease-000001"]


@on_every_store
async def test_pruning_deletes_old_history_and_never_a_live_lease(store):
    await store.commit(granted(range(1, 1001)))
    await store.commit([an_event(1000 + n, ended(a_lease(n), 1_700_005_000.0 + n), "ended") for n in range(1, 701)])
    assert await store.prune(1_700_005_000.0 + 501, events_kept=100) >= 500 + 1600 - 300  # what the live are may stay
    loaded = await store.load()
    assert len(loaded.live) == 300
    assert [lease.id for lease in loaded.remembered] == [f"lease-{n:06d}" for n in range(501, 701)]
    assert [event.revision for event in loaded.events] == list(range(1601, 1701))
    assert await store.prune(1_700_005_000.0 + 501, events_kept=100) == 0


@on_every_store
async def test_revisions_grow_though_every_event_is_pruned(store):
    await store.load()
    await store.commit(granted([1, 2, 3]))
    await store.prune(0.0, events_kept=0)
    assert (await store.load()).revision >= 3


@on_every_store
async def test_each_start_uses_revisions_that_no_earlier_start_gave(store):
    await store.load()
    await store.commit(granted([1, 2, 3]))
    second = (await store.load()).revision
    third = (await store.load()).revision  # the second start committed nothing, but may have published something
    assert second >= 3 + REVISION_GAP
    assert third >= second + REVISION_GAP


@on_every_store
async def test_a_cancelled_caller_does_not_stop_the_work(store):
    if isinstance(store, MemoryStore):
        store.gate.clear()
    task = asyncio.create_task(store.commit(granted([1])))
    asyncio.get_running_loop().call_soon(task.cancel)  # right after its first step
    with pytest.raises(asyncio.CancelledError):
        await task
    if isinstance(store, MemoryStore):
        store.gate.set()
    await store.commit(granted([2]))
    assert [lease.id for lease in (await store.load()).live] == ["lease-000001", "lease-000002"]
