"""What the store is asked for, as functions over a connection that only reads. They run in the reader's thread.

They raise sqlite3.Error, and msgspec.DecodeError for a body that is no lease.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Final

from portd.core.errors import StoreDamaged
from portd.core.model import Event, Lease, Protocol, decode_lease
from portd.seams import REVISION_GAP, Loaded

EVENTS_LOADED: Final = 10_000
"""The newest events that a start reads: as many as followers may resume from."""

_LIVE: Final = "SELECT body FROM leases WHERE ended_at IS NULL ORDER BY created_at"
# With max() the other columns are those of the row that has it (https://www.sqlite.org/lang_select.html#bareagg).
_NEWEST_ENDED: Final = "SELECT rowid FROM (SELECT rowid, max(ended_at) FROM leases WHERE ended_at >= 0 GROUP BY {})"
_REMEMBERED: Final = f"""
    SELECT body FROM leases WHERE rowid IN
        ({_NEWEST_ENDED.format("service, instance, endpoint")} UNION {_NEWEST_ENDED.format("port")})
    ORDER BY ended_at"""
_EVENTS: Final = "SELECT revision, type, at, body FROM events ORDER BY revision DESC LIMIT ?"


def connect(path: Path) -> sqlite3.Connection:
    """Open the database for reading alone."""
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    try:
        database.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # SQLite opens and locks the file only now
    except BaseException:
        database.close()
        raise
    return database


def load(database: sqlite3.Connection) -> Loaded:
    """Read what the daemon starts from, as of one moment. Raises StoreDamaged when it does not fit together."""
    with database:  # ends the transaction
        database.execute("BEGIN")
        live = _leases(database, _LIVE)
        remembered = _leases(database, _REMEMBERED)
        rows = database.execute(_EVENTS, (EVENTS_LOADED,)).fetchall()
        started = database.execute("SELECT value FROM meta WHERE key = 'started_after'").fetchone()
    events = [Event(revision, kind, at, decode_lease(body)) for revision, kind, at, body in reversed(rows)]
    revision = events[-1].revision if events else 0
    ahead = max((lease.revision for lease in (*live, *remembered)), default=0)
    if ahead > revision:  # the newest event is never pruned
        raise StoreDamaged(f"events are missing: a lease has revision {ahead}, the newest event {revision}")
    return Loaded(live, remembered, events, max(started[0], revision) + REVISION_GAP if started else 0)


def lease(database: sqlite3.Connection, lease_id: str) -> Lease | None:
    """Read one lease, live or ended."""
    found = _leases(database, "SELECT body FROM leases WHERE id = ?", lease_id)
    return found[0] if found else None


def history(database: sqlite3.Connection, port: int, protocol: Protocol | None, at: float | None,
            limit: int) -> list[Lease]:
    """Read who had the port, newest first; a lease of `both` protocols is found by either, and finds either."""
    where, values = "port = ?", [port]  # type: tuple[str, list[Any]]
    if protocol is not None and protocol != "both":
        where += " AND protocol IN (?, 'both')"
        values.append(protocol)
    if at is not None:
        where += " AND created_at <= ? AND (ended_at IS NULL OR ended_at > ?)"
        values += [at, at]
    return _leases(database, f"SELECT body FROM leases WHERE {where} ORDER BY created_at DESC, rowid DESC LIMIT ?",
                   *values, limit)


def ended(database: sqlite3.Connection, service: str | None, limit: int) -> list[Lease]:
    """Read ended leases, newest end first."""
    where, values = ("", []) if service is None else (" AND service = ?", [service])
    return _leases(database, f"SELECT body FROM leases WHERE ended_at >= 0{where} ORDER BY ended_at DESC LIMIT ?",
                   *values, limit)


def last_pruned_revision(database: sqlite3.Connection, events_kept: int) -> int:
    """Return the revision up to which events may go; 0 when all are kept. The newest one always stays: it carries the
    revision on."""
    row = database.execute("SELECT revision FROM events ORDER BY revision DESC LIMIT 1 OFFSET ?",
                           (max(1, events_kept),)).fetchone()
    return int(row[0]) if row else 0


def _leases(database: sqlite3.Connection, statement: str, *values: Any) -> list[Lease]:
    return [decode_lease(body) for body, in database.execute(statement, values).fetchall()]
