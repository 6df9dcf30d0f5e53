"""What was acknowledged is there after the daemon's death, and after a power cut where durability is `full`."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from portd.core.model import decode_lease
from tests.adapters.sqlite.disk import ROOT, Platters, read_journal
from tests.adapters.sqlite.stores import opened

KILLS = 12
CUTS = 60


async def make_store(path: Path) -> None:
    async with opened(path) as store:
        await store.load()


def newest_revision(path: Path) -> int:
    """Return the newest event's revision, after making sure that the whole database is sound and every batch whole."""
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        newest, count, oldest = database.execute("SELECT max(revision), count(*), min(revision) FROM events").fetchone()
        assert count == 0 or newest - oldest + 1 == count, "an event is missing in the middle"
        live = dict(database.execute("SELECT id, revision FROM live"))
        ended = dict(database.execute("SELECT id, revision FROM ended"))
        bodies = database.execute("SELECT body FROM events ORDER BY revision").fetchall()
    last = {lease.id: lease for lease in (decode_lease(body) for (body,) in bodies)}
    assert live == {lease.id: lease.revision for lease in last.values() if lease.state != "ended"}
    assert ended == {lease.id: lease.revision for lease in last.values() if lease.state == "ended"}
    return newest or 0


def acknowledged(file: Path) -> int:
    """Return the last revision that was acknowledged whole."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return int(lines[-1]) if lines else 0


@pytest.mark.parametrize("durability", ["full", "fast"])
def test_nothing_acknowledged_is_missing_after_kill_9(tmp_path, durability):
    chance = random.Random(7)
    path, acked = tmp_path / "portd.db", tmp_path / "acked"
    for _ in range(KILLS):
        acked.unlink(missing_ok=True)
        command = [
            sys.executable,
            str(Path(__file__).with_name("committing.py")),
            str(path),
            durability,
            str(acked),
            "1000000",
        ]
        with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as child:
            wait_for(acked, chance.randint(1, 100), child)
            child.kill()
        asyncio.run(check_restart(path, durability, acknowledged(acked)))


async def check_restart(path, durability, least):
    async with opened(path, durability) as store:
        loaded = await store.load()
    assert loaded.events[-1].revision >= least > 0
    assert loaded.revision > loaded.events[-1].revision
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def wait_for(acked, count, child):
    deadline = time.monotonic() + 20
    while not acked.exists() or acked.read_bytes().count(b"\n") < count:
        assert child.poll() is None, "the child ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def lost_by_power_cuts(disk, tmp_path, durability, kept):
    """Commit on the disk, then cut the power at many moments of that history: returns what was lost at each.

    Asserts that the database is sound after every one of them.
    """
    directory, journal = tmp_path / "state", tmp_path / "journal"
    path = directory / "portd.db"
    asyncio.run(make_store(path))
    platters = Platters(directory)
    child = disk.start(
        "committing.py", str(path), durability, str(directory / "acked"), "400", directory=directory, journal=journal
    )
    assert child.communicate()[0] == ""
    assert child.returncode == 0
    entries = list(read_journal(journal))
    assert sum(entry.kind == "S" and entry.name == "portd.db" for entry in entries) >= 2, "there was no checkpoint"
    chance = random.Random(11)
    cuts = set(chance.sample(range(len(entries)), CUTS))
    lost, newest = [], 0
    for index, entry in enumerate(entries):
        if entry.name == "acked":
            newest = int(entry.data)
        else:
            platters.ask(entry)
        if index in cuts:
            after = tmp_path / f"after-{index}"
            platters.cut_power(after, chance, kept)
            (after / "acked").unlink(missing_ok=True)
            lost.append(max(0, newest - newest_revision(after / "portd.db")))
    return lost


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_nothing_acknowledged_is_missing_after_a_power_cut(disk, tmp_path, kept):
    assert set(lost_by_power_cuts(disk, tmp_path, "full", kept)) == {0}


def test_fast_durability_loses_only_newest_commits_in_a_power_cut(disk, tmp_path):
    lost = lost_by_power_cuts(disk, tmp_path, "fast", 0.0)
    assert max(lost) > 0, "so it is the sync that keeps them, and the cut that takes them"
