"""What an older portd wrote is taken over whole, in one step or not at all."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from portd.adapters.sqlite import schema
from portd.core.errors import StoreDamaged
from portd.leasing.seams import REVISION_GAP
from tests.adapters.sqlite.disk import Platters, read_journal
from tests.adapters.sqlite.nouns import a_lease, an_event, ended, granted
from tests.adapters.sqlite.schema1 import make_schema_1
from tests.adapters.sqlite.stores import opened

LATER = (*schema.MIGRATIONS, "ALTER TABLE ended ADD COLUMN zone TEXT;", "CREATE TABLE notes (note TEXT) STRICT;")
"""The schema as later versions of portd might have it."""

FORTY = granted(range(1, 41))
TEN_ENDS = [an_event(40 + n, ended(a_lease(n), 1_700_001_000.0 + n), "ended") for n in range(1, 11)]
TEN_BOUND = [an_event(50 + n, a_lease(30 + n, state="bound"), "bound") for n in range(1, 11)]
HISTORY = [*FORTY, *TEN_ENDS, *TEN_BOUND]
"""Leases 1 to 10 have ended, 11 to 30 are as they were granted, 31 to 40 are bound."""


def dump(path: Path) -> tuple[int, list[str]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("PRAGMA user_version").fetchone()[0], list(database.iterdump())


@pytest.mark.parametrize("pruned_to", [0, 20, 45, 59], ids="pruned to {}".format)
def test_a_store_of_schema_1_is_as_it_was(tmp_path, pruned_to):
    path = tmp_path / "portd.db"
    make_schema_1(path, HISTORY, pruned_to=pruned_to, started_after=7)

    async def run():
        async with opened(path) as store:
            loaded = await store.load()
            assert loaded.live == [event.lease for event in HISTORY[10:30] + TEN_BOUND]
            assert loaded.remembered == [event.lease for event in TEN_ENDS]
            assert loaded.events == HISTORY[pruned_to:], "what was forgotten is no news, for a lease that lives either"
            assert loaded.revision == 60 + REVISION_GAP
            assert await store.history(20001) == [TEN_ENDS[0].lease]
            assert await store.history(20011) == [FORTY[10].lease]
            assert await store.lease("lease-000005") == TEN_ENDS[4].lease
            assert await store.lease("lease-000025") == FORTY[24].lease
            assert await store.ended("orders") == [event.lease for event in reversed(TEN_ENDS)]

    asyncio.run(run())
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_store_of_schema_1_goes_on(tmp_path):
    path = tmp_path / "portd.db"
    make_schema_1(path, HISTORY, pruned_to=45)

    async def run():
        async with opened(path) as store:
            first = (await store.load()).revision + 1
            await store.commit(
                [
                    an_event(first, ended(a_lease(11), 1_700_002_000.0), "ended"),
                    an_event(first + 1, a_lease(12, drain=True), "draining"),
                    an_event(first + 2, a_lease(41)),
                ]
            )
        async with opened(path) as store:
            assert await store.prune(1_700_001_500.0, events_kept=1) > 0
            loaded = await store.load()
            assert [lease.id for lease in loaded.live] == [f"lease-{number:06d}" for number in range(12, 42)]
            assert [lease.drain for lease in loaded.live] == [True] + [False] * 29
            assert [lease.id for lease in loaded.remembered] == ["lease-000011"]
            assert [event.lease.id for event in loaded.events] == ["lease-000041"]

    asyncio.run(run())


def test_an_empty_store_of_schema_1_is_an_empty_store(tmp_path):
    make_schema_1(tmp_path / "portd.db", [])

    async def run():
        async with opened(tmp_path / "portd.db") as store:
            assert (await store.load())[:5] == ([], [], [], REVISION_GAP, 0)

    asyncio.run(run())


def test_migrated_store_has_the_schema_of_a_new_one(tmp_path):
    make_schema_1(tmp_path / "old.db", HISTORY)
    schema.prepare(tmp_path / "old.db")
    schema.prepare(tmp_path / "new.db")

    def shape(name):
        with closing(sqlite3.connect(tmp_path / name)) as database:
            return database.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY type, name").fetchall()

    assert shape("old.db") == shape("new.db")


def test_migration_from_schema_1_is_atomic(tmp_path):
    path = tmp_path / "portd.db"
    make_schema_1(path, HISTORY, pruned_to=45)
    before = dump(path)
    with pytest.raises(sqlite3.Error):
        schema.prepare(path, (*schema.MIGRATIONS, "CREATE TABLE live (again TEXT);"))
    assert dump(path) == before


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_power_cut_while_schema_1_is_taken_over_loses_nothing(disk, tmp_path, kept):
    directory = tmp_path / "state"
    directory.mkdir()
    make_schema_1(directory / "portd.db", HISTORY, pruned_to=45)
    platters = Platters(directory)
    child = disk.start("migrating.py", str(directory / "portd.db"), directory=directory, journal=tmp_path / "journal")
    assert child.communicate()[0] == ""
    assert child.returncode == 0
    chance, versions = random.Random(5), set()
    for index, entry in enumerate(read_journal(tmp_path / "journal")):
        platters.ask(entry)
        after = tmp_path / f"after-{index}"
        platters.cut_power(after, chance, kept)
        versions.add(schema.inspect(after / "portd.db"))
        loaded = asyncio.run(load(after / "portd.db"))
        assert loaded.live == [event.lease for event in HISTORY[10:30] + TEN_BOUND]
        assert loaded.remembered == [event.lease for event in TEN_ENDS]
        assert loaded.events == HISTORY[45:]
    assert versions == {1, len(schema.MIGRATIONS)}


async def load(path):
    async with opened(path) as store:
        return await store.load()


@pytest.mark.parametrize("older", range(1, len(LATER)))
def test_every_older_schema_migrates_without_loss(tmp_path, older):
    path = tmp_path / "portd.db"
    schema.prepare(path, LATER[:older])
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("INSERT INTO meta VALUES ('started_after', 4711)")
    schema.prepare(path, LATER)
    version, statements = dump(path)
    assert version == len(LATER)
    assert any("zone TEXT" in statement for statement in statements)
    assert any("notes" in statement for statement in statements)
    assert any("4711" in statement for statement in statements)
    # The header tells it by itself, with no log beside it: an older portd can inspect it unopened.
    assert path.read_bytes()[60:64] == len(LATER).to_bytes(4, "big")


def test_an_older_portd_refuses_what_this_one_wrote(tmp_path):
    path = tmp_path / "portd.db"
    make_schema_1(path, HISTORY)
    schema.prepare(path)
    before = path.read_bytes()
    with pytest.raises(StoreDamaged, match="newer"):
        schema.prepare(path, schema.MIGRATIONS[:1])
    assert path.read_bytes() == before


def test_a_migration_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "portd.db"
    schema.prepare(path)
    before = dump(path)
    with pytest.raises(sqlite3.Error):
        schema.prepare(path, (*LATER, "CREATE TABLE ended (again TEXT);"))
    assert dump(path) == before


def test_the_newest_schema_is_not_migrated_again(tmp_path):
    path = tmp_path / "portd.db"
    schema.prepare(path)
    before = path.read_bytes()
    schema.prepare(path)
    assert path.read_bytes() == before
