"""Files that another program deletes, replaces or overwrites are noticed; remains of a store are no first start."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from portd.adapters.sqlite.schema import wal_of
from portd.adapters.sqlite.store import SqliteStore
from portd.core.errors import StoreDamaged, StoreUnavailable
from tests.adapters.sqlite.nouns import granted
from tests.adapters.sqlite.stores import opened


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(512))


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.rename(path)


DEEDS: dict[str, Callable[[Path], None]] = {
    "was deleted": Path.unlink,
    "was replaced": replace,
    "was truncated": lambda path: os.truncate(path, 4096),
    "was changed": overwrite,
}


async def filled(store: SqliteStore) -> None:
    await store.load()
    for number in range(1, 51):
        await store.commit(granted([number]))


@pytest.mark.parametrize("of", [lambda path: path, wal_of], ids=["database", "log"])
@pytest.mark.parametrize("deed", DEEDS)
async def test_a_foreign_change_is_noticed_at_the_next_commit(tmp_path, of, deed):
    path = tmp_path / "portd.db"
    async with opened(path) as store:
        await filled(store)
        DEEDS[deed](of(path))
        left = {file.name: file.read_bytes() for file in tmp_path.iterdir() if not file.name.endswith(".lock")}
        with pytest.raises(StoreUnavailable, match=deed):
            await store.commit(granted([51]))
        assert deed in store.condition()["problem"]
    assert {name: (tmp_path / name).read_bytes() for name in left} == left, "closing overwrites nothing either"


async def test_a_file_that_is_put_back_is_used_again(tmp_path):
    path = tmp_path / "portd.db"
    async with opened(path) as store:
        await filled(store)
        path.rename(tmp_path / "aside")
        with pytest.raises(StoreUnavailable, match="was deleted"):
            await store.commit(granted([51]))
        (tmp_path / "aside").rename(path)
        await store.commit(granted([51]))
        assert store.condition()["problem"] is None
    async with opened(path) as store:
        assert len((await store.load()).live) == 51


async def test_damage_that_a_query_meets_stops_commits(tmp_path):
    async with opened(tmp_path / "portd.db") as store:
        await filled(store)
        await store._writing.run(store._writer.checkpoint, "TRUNCATE")
        size = (tmp_path / "portd.db").stat().st_size
        (tmp_path / "portd.db").write_bytes((tmp_path / "portd.db").read_bytes()[:4096] + bytes(size - 4096))
        with pytest.raises(StoreUnavailable):
            await store.ended()
        assert "is damaged" in store.condition()["problem"]
        with pytest.raises(StoreUnavailable, match="is damaged"):
            await store.commit(granted([51]))


@pytest.mark.parametrize("emptied", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["missing", "empty"])
@pytest.mark.parametrize("remains", ["-wal", "-shm"])
def test_remains_of_a_store_are_no_first_start(tmp_path, emptied, remains):
    path = tmp_path / "portd.db"

    async def run():
        async with opened(path) as store:
            await filled(store)

    asyncio.run(run())
    emptied(path)
    for suffix in {"-wal", "-shm"} - {remains}:
        path.with_name(path.name + suffix).unlink()
    with pytest.raises(StoreDamaged, match="a database that was in use"):
        asyncio.run(run())


def test_an_emptied_database_whose_lock_file_is_left_is_refused(tmp_path):
    path = tmp_path / "portd.db"

    async def run():
        async with opened(path) as store:
            await filled(store)

    asyncio.run(run())
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink()
    path.write_bytes(b"")
    with pytest.raises(StoreDamaged, match="is empty"):
        asyncio.run(run())


async def test_a_store_that_is_gone_whole_is_reported(tmp_path):
    path = tmp_path / "portd.db"
    async with opened(path) as store:
        await filled(store)
        assert store.notes == []
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink()
    async with opened(path) as store:
        assert [note for note in store.notes if "is missing, and an empty one was made" in note]
        await store.load()
    async with opened(path) as store:
        assert store.notes == []


async def test_a_store_that_was_deleted_while_in_use_is_reported(tmp_path):
    async with opened(tmp_path / "portd.db") as store:
        await filled(store)
        for file in tmp_path.iterdir():
            file.unlink()
    async with opened(tmp_path / "portd.db") as store:
        assert [note for note in store.notes if "is missing, and an empty one was made" in note]


async def test_a_log_lost_after_a_crash_is_reported(tmp_path):
    path, crashed = tmp_path / "portd.db", tmp_path / "crashed" / "portd.db"
    crashed.parent.mkdir()
    async with opened(path) as store:
        await filled(store)
        for suffix in ("", ".lock"):
            shutil.copy(path.with_name(path.name + suffix), crashed.with_name(path.name + suffix))
    async with opened(crashed) as store:
        assert [note for note in store.notes if "portd.db-wal is missing after a crash" in note]
    async with opened(path) as store:
        assert store.notes == [], "a clean stop leaves an empty log"
