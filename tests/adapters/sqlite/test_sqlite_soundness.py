"""A damaged, newer or foreign file is recognized, and left byte for byte as it is."""

from __future__ import annotations

import asyncio
import random
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from portd.adapters.sqlite import reading, schema, writing
from portd.core.errors import StoreDamaged
from tests.adapters.sqlite.nouns import a_lease, an_event, ended, granted
from tests.adapters.sqlite.stores import opened


def contents(path: Path) -> dict[str, bytes]:
    """Read the database and its log; the shared memory and the lock say nothing of leases, nor does an empty log."""
    files = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    return {name: content for name, content in files.items() if content and not name.endswith((".lock", "-shm"))}


def refusal(path: Path) -> str:
    """Open and load the store, which must refuse, and must not have changed a byte; returns what it says."""

    async def start():
        async with opened(path) as store:
            await store.load()

    before = contents(path)
    with pytest.raises(StoreDamaged) as refused:
        asyncio.run(start())
    assert contents(path) == before
    assert str(path.name) in str(refused.value)
    return str(refused.value)


def filled(path: Path) -> Path:
    """Make a database with a thousand leases, closed."""

    async def fill():
        async with opened(path) as store:
            await store.load()
            await store.commit(granted(range(1, 1001)))

    asyncio.run(fill())
    return path


@pytest.fixture
def path(tmp_path):
    return filled(tmp_path / "portd.db")


def crashed(path: Path) -> Path:
    """Leave commits in the log, as a killed daemon does: a copy of the files while they are in use."""
    after = path.parent / "after"

    async def fill():
        async with opened(path) as store:
            await store.load()
            await store.commit(granted(range(2001, 2101)))
            after.mkdir()
            for file in (path, schema.wal_of(path)):
                (after / file.name).write_bytes(file.read_bytes())

    asyncio.run(fill())
    return after / path.name


def test_a_text_file_is_not_a_database(path):
    path.write_text("leases, I hope\n" * 100)
    assert "not a SQLite database" in refusal(path)


def test_a_file_cut_within_its_header_is_not_a_database(path):
    path.write_bytes(path.read_bytes()[:60])
    assert "not a SQLite database" in refusal(path)


def test_a_database_cut_short_is_damaged(path):
    path.write_bytes(path.read_bytes()[:-40960])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("seed", range(5))
def test_pages_of_noise_are_damage(path, seed):
    chance = random.Random(seed)
    content = bytearray(path.read_bytes())
    page = chance.randrange(1, len(content) // 4096)
    content[page * 4096 : page * 4096 + 4096] = chance.randbytes(4096)
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def test_damage_is_found_behind_a_log_that_a_crash_left(path):
    after = crashed(path)
    content, log = bytearray(after.read_bytes()), schema.wal_of(after).read_bytes()
    logged = {int.from_bytes(log[at : at + 4], "big") for at in range(32, len(log), 24 + 4096)}
    page = next(number for number in range(2, len(content) // 4096) if number not in logged)  # the log would repair it
    content[(page - 1) * 4096 : page * 4096] = random.Random(1).randbytes(4096)
    after.write_bytes(content)
    assert "damaged" in refusal(after)


def test_undecodable_lease_is_damage_and_nothing_is_checkpointed(path):
    after = crashed(path)
    with closing(sqlite3.connect(after, isolation_level=None)) as database:
        database.execute("PRAGMA wal_autocheckpoint = 0")
        database.execute("UPDATE events SET body = x'00' WHERE revision = 7")
        database.execute("BEGIN")
        for_the_copy = {file: file.read_bytes() for file in (after, schema.wal_of(after))}
    for file, content in for_the_copy.items():
        file.write_bytes(content)
    assert schema.wal_of(after).stat().st_size > 0
    assert "can't be read" in refusal(after)


@pytest.mark.parametrize("gone", ["revision = 1", "revision = 500", "revision > 990"])
def test_a_live_lease_whose_event_is_missing_is_damage(path, gone):
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"DELETE FROM events WHERE {gone}")
    assert "events are missing" in refusal(path)


@pytest.mark.parametrize("revision", [8, 5000])
def test_live_lease_without_its_own_event_is_damage(path, revision):
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE live SET revision = ? WHERE id = 'lease-000007'", (revision,))
    assert "events are missing" in refusal(path)


def test_an_end_that_is_newer_than_every_event_is_damage(path):
    async def end():
        async with opened(path) as store:
            await store.commit([an_event(1001, ended(a_lease(1000), 1_700_009_000.0), "ended")])

    asyncio.run(end())
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("DELETE FROM events WHERE revision = 1001")
    assert "events are missing" in refusal(path)


@pytest.mark.parametrize("application_id", [0, 1])
def test_another_programs_database_is_left_alone(tmp_path, application_id):
    path = tmp_path / "portd.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(f"PRAGMA application_id = {application_id}; CREATE TABLE songs (title TEXT);")
    assert "another program" in refusal(path)


def test_newer_database_is_unchanged_and_the_error_says_upgrade(path):
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA user_version = 99")
    assert "upgrade portd" in refusal(path)


def test_a_newer_number_that_only_the_log_has_is_seen(path):
    after = path.parent / "after" / path.name
    after.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA user_version = 99")
        for file in (path, schema.wal_of(path)):
            (after.parent / file.name).write_bytes(file.read_bytes())
    assert b"\0\0\0\x63" not in after.read_bytes()[60:64]
    assert "upgrade portd" in refusal(after)


def test_log_without_its_database_is_not_mixed_with_new_one(path):
    after = crashed(path)
    after.unlink()
    assert "missing" in refusal(after)


def test_an_empty_file_is_a_new_store(tmp_path):
    path = tmp_path / "portd.db"
    path.touch()
    filled(path)


def test_a_half_made_database_is_made_anew(tmp_path):
    (tmp_path / "portd.db.new").write_bytes(b"SQLite format 3\0half of it")
    assert filled(tmp_path / "portd.db").exists()
    assert not (tmp_path / "portd.db.new").exists()


STATEMENTS = {
    "lease": reading._LEASE,
    "history": reading._HISTORY.format(where=" AND created_at <= :at AND ended_at > :at"),
    "moved": reading._MOVED.format(where=" AND since <= :at AND ended_at > :at"),
    "ended": reading._ENDED.format(where=" WHERE service = :service"),
    "events": reading._EVENTS,
    "surplus": reading._SURPLUS,
    "newest ended": reading._NEWEST_ENDED,
    "event sizes": reading._EVENT_SIZES,
    "delete ended": writing._DELETE_ENDED,
    "delete oldest": writing._DELETE_OLDEST,
    "delete oldest of user": writing._DELETE_OLDEST_OF_USER,
    "delete moved": writing._DELETE_MOVED,
    "delete events": writing._DELETE_EVENTS.format(rows="(?)"),
    "end": writing._END_LIVE.format(rows="(?)"),
}


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_queries_of_a_running_daemon_use_their_indexes(path, statement):
    """At most it goes through what is live, or through an index in its order."""
    with closing(sqlite3.connect(path)) as database:
        explained = database.execute("EXPLAIN QUERY PLAN " + re.sub(r"\?|:\w+", "1", statement.replace("?1", "?")))
        plan = " ".join(row[3] for row in explained)
    assert "SEARCH" in plan or "INDEX" in plan, plan
    assert not re.search(r"SCAN (ended|events|moved)(?! USING (COVERING )?INDEX)", plan), plan
    assert "TEMP B-TREE" not in plan, plan


def test_history_and_ends_survive_a_restart(path):
    async def restart():
        async with opened(path) as store:
            revision = (await store.load()).revision
            await store.commit([an_event(revision + 1, ended(a_lease(5), 1_700_009_000.0), "ended")])
        async with opened(path) as store:
            return await store.load()

    loaded = asyncio.run(restart())
    assert len(loaded.live) == 999
    assert [lease.id for lease in loaded.remembered] == ["lease-000005"]
