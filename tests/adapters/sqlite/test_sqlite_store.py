"""What the store on disk promises beyond the contract: one daemon, private files, commits that get in between."""

from __future__ import annotations

import asyncio
import inspect
import os
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import aiosqlite
import pytest

from portd.adapters.sqlite.store import SqliteStore
from portd.adapters.sqlite.writing import PRUNE_STEP
from portd.core.errors import StateInUse
from tests.adapters.sqlite.disk import ROOT
from tests.adapters.sqlite.nouns import a_lease, an_event, ended, granted
from tests.adapters.sqlite.stores import opened


def test_store_id_stays_with_database_and_is_its_own(tmp_path):
    async def store_id(name):
        async with opened(tmp_path / name) as store:
            return (await store.load()).store_id

    first = asyncio.run(store_id("first.db"))
    assert len(first) == 16
    assert asyncio.run(store_id("first.db")) == first
    assert asyncio.run(store_id("second.db")) != first


def test_the_one_private_name_of_aiosqlite_is_still_there():
    assert inspect.iscoroutinefunction(aiosqlite.Connection._execute)
    assert list(inspect.signature(aiosqlite.Connection._execute).parameters) == ["self", "fn", "args", "kwargs"]


def test_second_daemon_is_refused_with_the_pid_of_the_first(tmp_path):
    path, acked = tmp_path / "portd.db", tmp_path / "acked"
    command = [sys.executable, str(Path(__file__).with_name("committing.py")), str(path), "full", str(acked), "1000000"]
    os.mkfifo(acked)  # opening it waits until the child has the store
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as first:
        with acked.open("rb"), pytest.raises(StateInUse, match=f"pid {first.pid}"):
            asyncio.run(SqliteStore.open(path, "full"))
        first.kill()
    asyncio.run(open_and_close(path))


def test_two_stores_of_one_process_are_refused_alike(tmp_path):
    async def run():
        async with opened(tmp_path / "portd.db") as store:
            with pytest.raises(StateInUse, match=f"pid {os.getpid()}"):
                await SqliteStore.open(tmp_path / "portd.db", "full")
            await store.commit(granted([1]))
        await open_and_close(tmp_path / "portd.db")

    asyncio.run(run())


async def open_and_close(path):
    await (await SqliteStore.open(path, "full")).close()


def test_nobody_else_can_read_the_files(tmp_path):
    async def run():
        async with opened(tmp_path / "made" / "portd.db") as store:
            await store.commit(granted([1]))
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "made").iterdir()}
            assert modes == dict.fromkeys(["portd.db", "portd.db-wal", "portd.db-shm", "portd.db.lock"], 0o600)
            assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700

    mask = os.umask(0)
    try:
        asyncio.run(run())
    finally:
        os.umask(mask)


@pytest.mark.parametrize("name", ["with space.db", "percent%20.db", "question?mode=memory.db", "hash#.db", "naïve.db"])
def test_any_file_name_is_the_file_that_is_used(tmp_path, name):
    async def run():
        async with opened(tmp_path / name) as store:
            await store.load()
            await store.commit(granted([1]))
        async with opened(tmp_path / name) as store:
            assert len((await store.load()).live) == 1

    asyncio.run(run())
    assert (tmp_path / name).stat().st_size > 0


def test_each_commit_reports_its_time_and_events(tmp_path):
    commits = []

    async def run():
        async with opened(tmp_path / "portd.db", "full", lambda *commit: commits.append(commit)) as store:
            await store.commit(granted([1, 2]))
            await store.commit(granted([3]))
            condition = store.condition()
            assert store.size_bytes() == condition["size_bytes"] + condition["wal_bytes"] > 0
            assert condition == condition | {"path": str(tmp_path / "portd.db"), "durability": "full", "problem": None}
            assert condition["last_commit_ms"] == pytest.approx(commits[-1][0] * 1000, abs=0.001)

    asyncio.run(run())
    assert [count for _, count in commits] == [2, 1]


def test_commits_get_in_between_the_steps_of_pruning(tmp_path):
    count = 20 * PRUNE_STEP

    async def run():
        async with opened(tmp_path / "portd.db", "fast") as store:
            await store.commit([an_event(n, ended(a_lease(n), 1e9), "ended") for n in range(1, count + 1)])
            pruning = asyncio.create_task(store.prune(2e9, 1))
            while (await store.lease(f"lease-{1:06d}")) is not None:  # until the first step is done
                assert not pruning.done()
            await store.commit(granted([count + 1]))
            assert not pruning.done()
            assert await pruning == 2 * count - 1  # every lease that ended, every event but the newest at that time

    asyncio.run(run())


def revisions_kept(path):
    with closing(sqlite3.connect(path)) as database:
        return {revision for (revision,) in database.execute("SELECT revision FROM events")}


def test_event_that_holds_a_live_lease_is_kept(tmp_path):
    path = tmp_path / "portd.db"

    async def run():
        async with opened(path) as store:
            await store.commit(granted(range(1, 201)))
            assert await store.prune(0.0, 1) == 0
            assert revisions_kept(path) == set(range(1, 201))
            assert [event.revision for event in (await store.load()).events] == [200]
            await store.commit(
                [
                    *(an_event(200 + n, ended(a_lease(n), 1e9), "ended") for n in range(1, 81)),
                    *(an_event(200 + n, a_lease(n, drain=True), "draining") for n in range(81, 121)),
                    *granted([321]),
                ]
            )
            before = await store.load()
            assert await store.prune(0.0, 1) == 200
            assert revisions_kept(path) == {*range(121, 201), *range(281, 322)}
            after = await store.load()
            assert (after.live, after.remembered) == (before.live, before.remembered)
            assert [event.revision for event in after.events] == [321]

    asyncio.run(run())


def test_interrupted_pruning_is_finished_by_the_next(tmp_path):
    path = tmp_path / "portd.db"

    async def run():
        async with opened(path) as store:
            await store.commit([an_event(n, ended(a_lease(n), 1e9), "ended") for n in range(1, 201)])
            await store._writing.run(store._writer.set_pruned_to, 150)
            await store._writing.run(store._writer.delete_events, range(21, 71))
        async with opened(path) as store:
            assert [event.revision for event in (await store.load()).events] == list(range(151, 201))
            assert await store.prune(0.0, 100) == 100
            assert [event.revision for event in (await store.load()).events] == list(range(151, 201))
        assert revisions_kept(path) == set(range(151, 201))

    asyncio.run(run())


def test_change_during_a_load_is_seen_whole_or_not(tmp_path):
    async def run():
        async with opened(tmp_path / "portd.db", "fast") as store:
            for batch in range(50):
                events = granted(range(batch * 20 + 1, batch * 20 + 21))
                _, loaded = await asyncio.gather(store.commit(events), store.load())
                assert len(loaded.live) == len(loaded.events)
                assert len(loaded.live) % 20 == 0

    asyncio.run(run())
