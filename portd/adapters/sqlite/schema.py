"""The schema of the database, its numbered migrations, and the inspection that decides whether to touch a file at all.

A file that is damaged, newer than this portd or not portd's is left exactly as it is: `inspect` reads the header by
itself and opens the file read-only, before anything could write to it. This module knows no lease.
"""

from __future__ import annotations

import os
import sqlite3
import struct
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from portd.core.errors import StoreDamaged

APPLICATION_ID: Final = 0x706F7274
""""port": distinguishes portd's files from other programs' (https://www.sqlite.org/fileformat.html, section 1.3)."""
CHECK_MAX_BYTES: Final = 256 << 20
"""A larger file is not checked page by page at the start: SQLite checks about 2 GB/s."""
ROW_BYTES: Final = 300
"""What an ended lease takes on the disk beside its body. Part of schema 4: never changes."""
MOVES_MAX: Final = 500
"""Moves of a user's leases to other ports that are kept, the newest: at most 10 MB. Part of schema 5: never changes."""

MIGRATIONS: Final[Sequence[str]] = (
    # 1. `body` is the lease whole; the other columns are there to be searched, and for whoever opens the file by hand.
    # A live lease has no `ended_at`. Every index costs each grant: `leases_by_end` serves the live (NULL comes first),
    # the remembered and the forgetting, and holds all that these compare, so that none of them reads a body in vain.
    # With rowids: leases in the order of a random id would write three times as many pages. `meta` has
    # `started_after`: the revision after which the newest start took its own up.
    """
    CREATE TABLE leases (
        id TEXT NOT NULL PRIMARY KEY,
        service TEXT NOT NULL,
        instance TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        protocol TEXT NOT NULL,
        address TEXT NOT NULL,
        port INTEGER NOT NULL,
        state TEXT NOT NULL,
        uid INTEGER,
        created_at REAL NOT NULL,
        ended_at REAL,
        revision INTEGER NOT NULL,
        body BLOB NOT NULL
    ) STRICT;
    CREATE INDEX leases_by_port ON leases (port, created_at);
    CREATE INDEX leases_by_end ON leases (ended_at, created_at, service, instance, endpoint, port);
    CREATE TABLE events (
        revision INTEGER NOT NULL PRIMARY KEY,
        at REAL NOT NULL,
        type TEXT NOT NULL,
        lease_id TEXT NOT NULL,
        body BLOB NOT NULL
    ) STRICT;
    CREATE TABLE meta (
        key TEXT NOT NULL PRIMARY KEY,
        value INTEGER NOT NULL
    ) STRICT;
    """,
    # 2. Grants come by the thousand, so a grant appends to two tables only: `events`, which alone has the body of a
    # live lease, and `live`, which names that event. An ended lease is in `ended`, whole: its key is the revision of
    # the end, so that the table grows only at its end, and the indexes cover the columns that loading and pruning
    # compare, so that neither reads a body in vain. Events up to `pruned_to` (in `meta`) are history: most are deleted,
    # except those that hold the body of a live lease. Where that was deleted too, an event is made here from the lease;
    # its revision lies below `pruned_to`, so that no follower ever receives it.
    """
    CREATE TABLE live (
        id TEXT NOT NULL PRIMARY KEY,
        port INTEGER NOT NULL,
        revision INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE ended (
        revision INTEGER NOT NULL PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        service TEXT NOT NULL,
        instance TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        protocol TEXT NOT NULL,
        address TEXT NOT NULL,
        port INTEGER NOT NULL,
        uid INTEGER,
        created_at REAL NOT NULL,
        ended_at REAL NOT NULL,
        body BLOB NOT NULL
    ) STRICT;
    CREATE INDEX ended_by_port ON ended (port, created_at, ended_at);
    CREATE INDEX ended_by_end ON ended (ended_at, service, instance, endpoint, port);
    INSERT INTO live SELECT id, port, revision FROM leases WHERE ended_at IS NULL ORDER BY id;
    INSERT INTO ended SELECT revision, id, service, instance, endpoint, protocol, address, port, uid, created_at,
        ended_at, body FROM leases WHERE ended_at IS NOT NULL ORDER BY revision;
    INSERT INTO meta SELECT 'pruned_to', ifnull(min(revision) - 1, 0) FROM events;
    ALTER TABLE events DROP COLUMN lease_id;
    INSERT OR IGNORE INTO events SELECT revision, created_at, 'updated', body FROM leases WHERE ended_at IS NULL;
    DROP TABLE leases;
    """,
    # 3. `store_id` names this database among all others, so that a revision is never mistaken for one of another.
    "INSERT INTO meta SELECT 'store_id', random() & 9223372036854775807;",
    # 4. History is bounded in bytes, in all and per user (-1: no uid). Triggers keep `usage` up to date, whatever
    # deletes or inserts; its column `bytes` counts the bodies, and ROW_BYTES for the columns and index entries of each
    # lease. A start reads the newest ends and no more, so `ended_by_end` need not hold what names a lease.
    f"""
    CREATE TABLE usage (
        uid INTEGER NOT NULL PRIMARY KEY,
        leases INTEGER NOT NULL,
        bytes INTEGER NOT NULL
    ) STRICT;
    INSERT INTO usage SELECT ifnull(uid, -1), count(*), sum(length(body) + {ROW_BYTES}) FROM ended GROUP BY 1;
    CREATE TRIGGER ended_inserted AFTER INSERT ON ended BEGIN
        INSERT INTO usage VALUES (ifnull(new.uid, -1), 1, length(new.body) + {ROW_BYTES})
            ON CONFLICT (uid) DO UPDATE SET leases = leases + 1, bytes = bytes + excluded.bytes;
    END;
    CREATE TRIGGER ended_deleted AFTER DELETE ON ended BEGIN
        UPDATE usage SET leases = leases - 1, bytes = bytes - length(old.body) - {ROW_BYTES}
            WHERE uid = ifnull(old.uid, -1);
    END;
    DROP INDEX ended_by_end;
    CREATE INDEX ended_by_end ON ended (ended_at, service);
    CREATE INDEX ended_by_user ON ended (uid, ended_at);
    """,
    # 5. The time that a lease had a port before it moved to another one: from `since` (its grant, or its last move) to
    # `ended_at`. `body` is the lease as it was there. Moves are few, and a user's newest are kept.
    f"""
    CREATE TABLE moved (
        revision INTEGER NOT NULL PRIMARY KEY,
        id TEXT NOT NULL,
        protocol TEXT NOT NULL,
        port INTEGER NOT NULL,
        uid INTEGER,
        since REAL NOT NULL,
        ended_at REAL NOT NULL,
        body BLOB NOT NULL
    ) STRICT;
    CREATE INDEX moved_by_port ON moved (port, since, ended_at);
    CREATE INDEX moved_by_lease ON moved (id, ended_at);
    CREATE INDEX moved_by_user ON moved (uid, revision);
    CREATE INDEX moved_by_end ON moved (ended_at);
    CREATE TRIGGER moved_inserted AFTER INSERT ON moved BEGIN
        DELETE FROM moved WHERE uid IS new.uid AND revision <= (
            SELECT revision FROM moved WHERE uid IS new.uid ORDER BY revision DESC LIMIT 1 OFFSET {MOVES_MAX});
    END;
    """,
)

_MAGIC = b"SQLite format 3\0"
_HEADER = struct.Struct(">60xI4xI28x")
"""The header's 100 bytes: the user version at 60, the application id at 68."""


def prepare(path: Path, migrations: Sequence[str] = MIGRATIONS, *, was_used: bool = False) -> None:
    """Make sure that a sound database of the newest schema is at `path`, a new one where there is none.

    `was_used`: the lock file says that portd had a database here. Raises StoreDamaged for a file that must not be
    touched, sqlite3.Error or OSError where the disk refuses.
    """
    version = inspect(path, len(migrations), was_used=was_used)
    if version is None:
        _create(path, migrations)
    elif version < len(migrations):
        # Closing checkpoints the WAL, so the header of the main file has the new number even if no write follows.
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            migrate(database, migrations)


def inspect(path: Path, newest: int = len(MIGRATIONS), *, was_used: bool = False) -> int | None:
    """Return the schema number of a sound database of portd's, None where a new one may be made.

    `was_used`: the lock file says that portd had a database here. Raises StoreDamaged for anything else; the file and
    what lies beside it are left as they are.
    """
    wal = wal_of(path)
    what = "is missing"
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        header = b""
    except OSError as error:
        raise StoreDamaged(f"{path} can't be read: {error.strerror}; nothing was changed") from error
    wal_bytes = wal.stat().st_size if wal.exists() else 0
    if not header:
        if path.exists():
            what = "is empty"
        if wal_bytes:  # SQLite would replay it into whatever database it finds beside it
            raise _damaged(path, f"{what}, and its log {wal.name} is not")
        for remains in (wal, path.with_name(path.name + "-shm")):
            if remains.exists():
                raise _damaged(path, f"{what}, but {remains.name} beside it is from a database that was in use")
        if was_used and path.exists():
            raise _damaged(path, f"{what}, but {path.name}.lock is from a database that was in use")
        return None
    if len(header) < 100 or not header.startswith(_MAGIC):
        raise _damaged(path, "is not a SQLite database")
    version: int
    version, application = _HEADER.unpack(header)
    if application != APPLICATION_ID:
        raise _damaged(path, "belongs to another program")
    if version <= newest:
        version = _check(path, "mode=ro" if wal_bytes else "immutable=1")
    if version > newest:
        raise StoreDamaged(
            f"{path} was written by a newer portd (schema {version}, this one knows {newest}): upgrade "
            "portd, or start with another [store] path; nothing was changed"
        )
    return version


def migrate(database: sqlite3.Connection, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Bring a database to the newest schema in one transaction. Raises sqlite3.Error, with nothing changed."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    steps = "".join(migrations[version:])
    database.executescript(
        f"BEGIN IMMEDIATE; {steps} PRAGMA application_id = {APPLICATION_ID}; "
        f"PRAGMA user_version = {len(migrations)}; COMMIT;"
    )


def wal_of(path: Path) -> Path:
    """Return the path of the write-ahead log, where the newest commits are."""
    return path.with_name(path.name + "-wal")


def _create(path: Path, migrations: Sequence[str]) -> None:
    """Make the database under another name and rename it, so that a half-made one is never found at its path."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    fresh.touch(0o600)  # it holds command lines and hashes of tokens; SQLite gives its other files the same mode
    with closing(sqlite3.connect(fresh, isolation_level=None)) as database:
        migrate(database, migrations)
        database.execute("PRAGMA journal_mode = WAL")
    fresh.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # or a power cut takes the name away
    finally:
        os.close(directory)


def _check(path: Path, how: str) -> int:
    """Check every page, the log's too; returns the schema number that the log may have changed."""
    verdict = "ok"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if path.stat().st_size <= CHECK_MAX_BYTES:
                (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        if error.sqlite_errorname.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise _damaged(path, f"is damaged ({error})") from error
        raise
    if verdict != "ok":
        raise _damaged(path, f"is damaged ({' '.join(verdict.split())})")
    return int(version)


def _damaged(path: Path, what: str) -> StoreDamaged:
    return StoreDamaged(
        f"{path} {what}; nothing was changed. Restore a copy, or move {path.name}, {path.name}-wal and "
        f"{path.name}-shm aside together to start with an empty store (running services lease again)"
    )
