"""A database as portd wrote it with schema 1, by the text of that time: for the tests of what becomes of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import msgspec

from portd.core.model import Event

SCHEMA_1 = """
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
    PRAGMA application_id = 0x706F7274;
    PRAGMA user_version = 1;
    PRAGMA journal_mode = WAL;
"""
UPSERT_1 = """
    INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET address = excluded.address, port = excluded.port, state = excluded.state,
        uid = excluded.uid, ended_at = excluded.ended_at, revision = excluded.revision, body = excluded.body"""


def make_schema_1(path: Path, events: Iterable[Event], *, pruned_to: int = 0, started_after: int = 0) -> None:
    """Make a database in which these events were committed, and all up to `pruned_to` forgotten again."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript(SCHEMA_1)
        database.execute("INSERT INTO meta VALUES ('started_after', ?)", (started_after,))
        for event in events:
            lease = event.lease
            # Every field was written then, those with their defaults too.
            body = msgspec.msgpack.encode(msgspec.structs.asdict(lease))
            database.execute(
                UPSERT_1,
                (
                    lease.id,
                    lease.service,
                    lease.instance,
                    lease.endpoint,
                    lease.protocol,
                    lease.address,
                    lease.port,
                    lease.state,
                    lease.owner.uid,
                    lease.created_at,
                    lease.ended_at,
                    lease.revision,
                    body,
                ),
            )
            database.execute(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?)", (event.revision, event.at, event.type, lease.id, body)
            )
        database.execute("DELETE FROM events WHERE revision <= ?", (pruned_to,))
