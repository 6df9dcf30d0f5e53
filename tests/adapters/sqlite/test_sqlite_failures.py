"""A disk that is full, read-only or faulty: a refused commit changes nothing, and writing resumes by itself."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
from contextlib import closing

import pytest

from portd.adapters.sqlite import writing
from portd.adapters.sqlite.schema import wal_of
from portd.adapters.sqlite.store import SqliteStore
from portd.core.errors import StateUnusable, StoreLost, StoreUnavailable
from tests.adapters.sqlite.nouns import a_lease, an_event, granted
from tests.adapters.sqlite.stores import opened


def on_failing_disk(disk, tmp_path, scenario):
    directory = tmp_path / "state"
    directory.mkdir()
    faults = tmp_path / "faults"
    child = disk.start(
        "failing.py", scenario, str(directory / "portd.db"), str(faults), directory=directory, faults=faults
    )
    with child:
        try:
            assert child.communicate(timeout=30)[0] == ""
        finally:
            child.kill()
    assert child.returncode == 0


def test_refused_writes_change_nothing_and_the_store_recovers(disk, tmp_path):
    on_failing_disk(disk, tmp_path, "writes_refused")


def test_after_failed_sync_store_refuses_everything_and_leaves_files_alone(disk, tmp_path):
    on_failing_disk(disk, tmp_path, "sync_failed")


def test_a_failed_checkpoint_loses_nothing_and_is_repeated_later(disk, tmp_path):
    on_failing_disk(disk, tmp_path, "checkpoint_failed")


def fill(place):
    """Take all the space that is left; returns the file to give back."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filler


def test_a_full_disk_refuses_commits_and_keeps_every_acknowledged_one(small_disk):
    async def run():
        async with opened(small_disk / "portd.db") as store:
            await store.load()
            filler = fill(small_disk)
            kept = 0
            while kept < 1000:
                try:
                    await store.commit(granted([kept + 1]))
                except StoreUnavailable:
                    break
                kept += 1
            assert store.condition()["problem"] == "the disk is full"
            assert len((await store.load()).live) == kept
            filler.unlink()
            await store.commit(granted([kept + 1]))
            assert store.condition()["problem"] is None
        async with opened(small_disk / "portd.db") as store:
            assert len((await store.load()).live) == kept + 1

    asyncio.run(run())


def test_start_on_a_full_disk_reads_and_later_writes(small_disk):
    async def run():
        async with opened(small_disk / "portd.db") as store:
            await store.load()
            await store.commit(granted(range(1, 50)))
        filler = fill(small_disk)
        async with opened(small_disk / "portd.db") as store:
            assert len((await store.load()).live) == 49
            with pytest.raises(StoreUnavailable, match="the disk is full"):
                await store.commit(granted([50]))
            filler.unlink()
            await store.commit(granted([50]))

    asyncio.run(run())


def test_new_store_on_a_full_disk_is_made_later(small_disk):
    async def run():
        filler = fill(small_disk)
        with pytest.raises(StateUnusable, match="can't be used"):
            await SqliteStore.open(small_disk / "portd.db", "full")
        filler.unlink()
        await (await SqliteStore.open(small_disk / "portd.db", "full")).close()

    asyncio.run(run())


def test_start_on_read_only_disk_says_so_and_changes_nothing(small_disk):
    async def run():
        await (await SqliteStore.open(small_disk / "portd.db", "full")).close()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(StateUnusable, match="Read-only"):
            await SqliteStore.open(small_disk / "portd.db", "full")
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        await (await SqliteStore.open(small_disk / "portd.db", "full")).close()

    asyncio.run(run())


def test_a_place_where_no_store_can_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StateUnusable, match="file can't be used for the store: "):
        asyncio.run(SqliteStore.open(tmp_path / "file" / "portd.db", "full"))


def test_locked_database_is_unavailable_until_it_is_unlocked(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BUSY_TIMEOUT_S", 0.05)

    async def run():
        async with opened(tmp_path / "portd.db") as store:
            await store.load()
            with closing(sqlite3.connect(tmp_path / "portd.db", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(StoreUnavailable, match="locked"):
                    await store.commit(granted([1]))
                assert (await store.load()).live == [], "reads don't wait for whoever writes"
                other.execute("ROLLBACK")
                await store.commit(granted([1]))

    asyncio.run(run())


def test_cancelled_commit_that_waits_for_disk_is_written_all_same(tmp_path):
    async def run():
        async with opened(tmp_path / "portd.db") as store:
            with closing(sqlite3.connect(tmp_path / "portd.db", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")  # the commit can't be done before it is cancelled
                commit = asyncio.create_task(store.commit(granted([1])))
                asyncio.get_running_loop().call_soon(commit.cancel)
                with pytest.raises(asyncio.CancelledError):
                    await commit
                other.execute("ROLLBACK")
        # closing finishes what is under way
        async with opened(tmp_path / "portd.db") as store:
            assert [lease.id for lease in (await store.load()).live] == ["lease-000001"]

    asyncio.run(run())


def test_a_revision_given_twice_stops_the_store(tmp_path):
    async def run():
        async with opened(tmp_path / "portd.db") as store:
            await store.commit(granted([1, 2]))
            with pytest.raises(StoreLost, match="UNIQUE"):
                await store.commit(granted([2, 3]))
        async with opened(tmp_path / "portd.db") as store:
            assert [event.revision for event in (await store.load()).events] == [1, 2]

    asyncio.run(run())


def test_unstorable_value_leaves_nothing_of_its_batch(tmp_path):
    async def run():
        async with opened(tmp_path / "portd.db") as store:
            with pytest.raises(StoreLost):
                await store.commit([*granted([1]), an_event(2, a_lease(2, address="\ud800"))])
        async with opened(tmp_path / "portd.db") as store:
            assert (await store.load()).live == []
            await store.commit(granted([1]))

    asyncio.run(run())


@pytest.fixture
def small_log(monkeypatch):
    """Checkpoint early, so that a test need not write 64 MB."""
    monkeypatch.setattr(writing, "CHECKPOINT_PAGES", 50)
    monkeypatch.setattr(writing, "CAP_PAGES", 400)
    monkeypatch.setattr(writing, "BUSY_TIMEOUT_S", 0.01)


FRAME_BYTES = 4096 + 24


@pytest.mark.usefixtures("small_log")
def test_the_log_stays_small_however_long_the_load_lasts(tmp_path):
    async def run():
        async with opened(tmp_path / "portd.db") as store:
            largest = 0
            for batch in range(300):
                await asyncio.gather(
                    store.commit(granted(range(batch * 10 + 1, batch * 10 + 11))), store.history(20001), store.ended()
                )
                largest = max(largest, store.condition()["wal_bytes"])
            assert largest < writing.CAP_PAGES * FRAME_BYTES
            assert (tmp_path / "portd.db").stat().st_size > 2 * largest
        assert wal_of(tmp_path / "portd.db").stat().st_size == 0

    asyncio.run(run())


@pytest.mark.usefixtures("small_log")
def test_a_log_that_grows_under_a_foreign_reader_is_reported(tmp_path):
    async def run():
        async with opened(tmp_path / "portd.db") as store:
            revision = 0

            async def commit_until(condition):
                nonlocal revision
                for _ in range(500):
                    revision += 1
                    await store.commit(granted([revision]))
                    if condition():
                        return
                pytest.fail(f"not in 500 commits: {store.condition()}")

            with closing(sqlite3.connect(tmp_path / "portd.db", isolation_level=None)) as other:
                other.execute("BEGIN")
                other.execute("SELECT count(*) FROM events").fetchone()
                await commit_until(lambda: "keeps reading" in (store.condition()["problem"] or ""))
                other.execute("COMMIT")
            await commit_until(lambda: store.condition()["problem"] is None)
            await commit_until(lambda: store.condition()["wal_bytes"] < writing.CAP_PAGES * FRAME_BYTES)

    asyncio.run(run())
