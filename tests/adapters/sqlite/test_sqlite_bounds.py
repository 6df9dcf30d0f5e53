"""What a start reads and what history keeps is bounded, in number and in bytes, whatever came before."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing

import pytest
from msgspec.structs import replace

from portd.adapters.sqlite import reading
from portd.adapters.sqlite import store as store_module
from portd.adapters.sqlite.schema import MOVES_MAX
from portd.adapters.sqlite.store import History
from portd.core.errors import StoreUnavailable
from tests.adapters.sqlite.nouns import a_lease, an_event, ended, granted
from tests.adapters.sqlite.stores import opened


def end(number: int, **fields):
    lease = a_lease(number, instance=f"orders-{number}", **fields)
    return an_event(number, ended(lease, 1_700_000_000.0 + number), "ended")


async def test_a_start_reads_the_newest_ends_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "ENDED_LOADED", 10)
    async with opened(tmp_path / "portd.db") as store:
        await store.commit([end(number) for number in range(1, 101)])
        loaded = await store.load()
    assert [lease.instance for lease in loaded.remembered] == [f"orders-{number}" for number in range(91, 101)]


async def test_events_kept_are_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "EVENTS_BYTES", 50_000)
    async with opened(tmp_path / "portd.db") as store:
        await store.commit([an_event(n, a_lease(1, metadata={"x": "y" * 5_000}), "updated") for n in range(1, 101)])
        loaded = await store.load()
        assert 1 < len(loaded.events) < 10
        assert loaded.complete_after == loaded.events[0].revision - 1
        await store.prune(0.0, 1_000)
        after = await store.load()
        assert [event.revision for event in after.events] == [event.revision for event in loaded.events]


async def test_history_is_bounded_in_bytes_per_user_and_total(tmp_path):
    bounds = History(total_bytes=200_000, user_bytes=110_000)
    async with opened(tmp_path / "portd.db", history=bounds) as store:
        await store.commit([end(number, uid=number % 3 or None) for number in range(1, 901)])
        await store.prune(0.0, 1_000)
        kept = await store._reading.run(reading.usage)
    assert set(kept) == {None, 1, 2}
    assert all(30_000 < size <= 110_000 for size in kept.values())
    assert sum(kept.values()) <= 200_000


async def test_the_oldest_history_of_a_user_goes_first(tmp_path):
    async with opened(tmp_path / "portd.db", history=History(user_bytes=10_000)) as store:
        await store.commit([end(number, uid=7) for number in range(1, 201)])
        await store.prune(0.0, 1_000)
        numbers = sorted(int(lease.instance.removeprefix("orders-")) for lease in await store.ended())
    assert numbers == list(range(200 - len(numbers) + 1, 201))


async def test_usage_equals_what_the_tables_hold(tmp_path):
    path = tmp_path / "portd.db"
    async with opened(path) as store:
        await store.commit([end(number, uid=number % 2) for number in range(1, 101)])
        await store.prune(1_700_000_050.0, 1_000)
    with closing(sqlite3.connect(path)) as database:
        counted = database.execute("SELECT uid, count(*), sum(length(body) + 300) FROM ended GROUP BY uid").fetchall()
        assert database.execute("SELECT uid, leases, bytes FROM usage ORDER BY uid").fetchall() == counted


async def test_hanging_query_times_out_and_delays_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "READ_TIMEOUT_S", 0.05)
    thawed = threading.Event()
    async with opened(tmp_path / "portd.db") as store:
        await store.commit(granted([1]))
        with pytest.raises(StoreUnavailable, match="has not answered"):
            await store._query(lambda database: thawed.wait(10))
        monkeypatch.setattr(store_module, "READ_TIMEOUT_S", 10.0)
        with pytest.raises(StoreUnavailable, match="has not answered"):
            await store.lease("lease-000001")
        thawed.set()
        await store._reading.run(lambda database: None)
        assert await store.lease("lease-000001") is not None


def fill(place):
    with (place / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


async def test_an_end_that_happened_is_written_on_a_full_disk(small_disk):
    gone = replace(ended(a_lease(1), 1_700_000_000.0), ended_because="owner_exited")
    async with opened(small_disk / "portd.db") as store:
        await store.load()
        await store.commit(granted([1, 2]))
        fill(small_disk)
        with pytest.raises(StoreUnavailable, match="the disk is full"):
            await store.commit(granted([3]))
        await store.commit([an_event(4, gone, "ended")])
        assert store.condition()["problem"] == "the disk is full"
        with pytest.raises(StoreUnavailable, match="the disk is full"):
            await store.commit(granted([5]))
    async with opened(small_disk / "portd.db") as store:
        assert [lease.id for lease in (await store.load()).live] == ["lease-000002"]


async def granted_until_full(store):
    for number in range(1, 100_000):
        try:
            await store.commit(granted([number]))
        except StoreUnavailable:
            return number - 1
    raise AssertionError("the disk is not small")


async def test_a_disk_that_portd_filled_is_emptied_by_releasing(small_disk):
    async with opened(small_disk / "portd.db") as store:
        await store.load()
        count = await granted_until_full(store)
        for number in range(1, 21):
            await store.commit([an_event(count + number, ended(a_lease(number), 1_700_000_000.0), "ended")])
        assert len((await store.load()).live) == count - 20


async def test_moves_kept_are_bounded_for_each_user(tmp_path):
    async with opened(tmp_path / "portd.db") as store:
        lease = a_lease(1, port=81, moved_from=80, uid=7)
        await store.commit([an_event(1, replace(lease, uid=8), "declined")])
        await store.commit([an_event(n, lease, "declined") for n in range(2, MOVES_MAX + 102)])
        kept = await store.history(80, limit=2 * MOVES_MAX)
    assert [sum(lease.uid == uid for lease in kept) for uid in (7, 8)] == [MOVES_MAX, 1]
