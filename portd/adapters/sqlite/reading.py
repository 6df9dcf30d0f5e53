"""What the store is asked for, as functions over a connection that only reads. They run in the reader's thread.

They raise sqlite3.Error, and msgspec.DecodeError for a body that is no lease.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Final

from portd.core.errors import StoreDamaged
from portd.core.model import Event, Lease, Protocol, decode_lease
from portd.leasing.seams import REVISION_GAP, Loaded

EVENTS_LOADED: Final = 10_000
"""The newest events that a start reads: as many as followers may resume from."""

SURPLUS_READ: Final = 10_000
"""Events that are looked up at a time to be forgotten: some milliseconds of this thread."""

_PRUNED_TO: Final = "(SELECT value FROM meta WHERE key = 'pruned_to')"
_LIVE: Final = "SELECT id, revision, body FROM live LEFT JOIN events USING (revision)"
# With max() the other columns are those of the row that has it (https://www.sqlite.org/lang_select.html#bareagg).
_NEWEST_ENDED: Final = "SELECT revision FROM (SELECT revision, max(ended_at) FROM ended GROUP BY {})"
_REMEMBERED: Final = f"""
    SELECT body FROM ended WHERE revision IN
        ({_NEWEST_ENDED.format("service, instance, endpoint")} UNION {_NEWEST_ENDED.format("port")})"""
_EVENTS: Final = f"""
    SELECT revision, type, at, body FROM events WHERE revision > {_PRUNED_TO} ORDER BY revision DESC LIMIT ?"""
_LEASE: Final = """
    SELECT body FROM live JOIN events USING (revision) WHERE id = ?1
    UNION ALL SELECT body FROM ended WHERE id = ?1"""
# All that live there, whenever they began: the tables that are written at a grant tell a port and no more.
_HISTORY: Final = """
    SELECT body FROM live JOIN events USING (revision) WHERE port = :port
    UNION ALL SELECT body FROM (
        SELECT body FROM ended WHERE port = :port{where} ORDER BY created_at DESC LIMIT :limit)"""
_ENDED: Final = "SELECT body FROM ended{where} ORDER BY ended_at DESC LIMIT :limit"
_SURPLUS: Final = """
    SELECT revision FROM events WHERE revision > ? AND revision <= ? AND revision NOT IN (SELECT revision FROM live)
    ORDER BY revision LIMIT ?"""


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
        live_rows = database.execute(_LIVE).fetchall()
        remembered = _leases(database, _REMEMBERED)
        event_rows = database.execute(_EVENTS, (EVENTS_LOADED,)).fetchall()
        pruned_to = database.execute(f"SELECT {_PRUNED_TO}").fetchone()[0]
        started = database.execute("SELECT value FROM meta WHERE key = 'started_after'").fetchone()
        number = database.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchone()
    events = [Event(revision, kind, at, decode_lease(body)) for revision, kind, at, body in reversed(event_rows)]
    revision = events[-1].revision if events else 0
    ahead = max((lease.revision for lease in remembered), default=0)
    if ahead > revision:  # the newest event is never pruned
        raise StoreDamaged(f"events are missing: a lease ended at revision {ahead}, the newest event is {revision}")
    remembered.sort(key=lambda lease: lease.ended_at or 0.0)  # here, since SQLite would sort the bodies
    first = max(started[0], revision) + REVISION_GAP if started else 0
    complete_after = pruned_to if len(events) < EVENTS_LOADED else events[0].revision - 1
    return Loaded(_live(live_rows, events), remembered, events, first, complete_after, f"{number[0]:016x}")


def lease(database: sqlite3.Connection, lease_id: str) -> Lease | None:
    """Read one lease, live or ended."""
    found = _leases(database, _LEASE, (lease_id,))
    return found[0] if found else None


def history(
    database: sqlite3.Connection, port: int, protocol: Protocol | None, at: float | None, limit: int
) -> list[Lease]:
    """Read who had the port, newest first; a lease of `both` protocols is found by either, and finds either."""
    where = ""
    if protocol == "both":
        protocol = None  # any
    if protocol is not None:
        where += " AND protocol IN (:protocol, 'both')"
    if at is not None:
        where += " AND created_at <= :at AND ended_at > :at"
    found = [
        lease
        for lease in _leases(
            database, _HISTORY.format(where=where), {"port": port, "protocol": protocol, "at": at, "limit": limit}
        )
        if protocol in (None, *lease.protocols) and (at is None or lease.created_at <= at)
    ]
    return sorted(found, key=lambda lease: (lease.created_at, lease.id), reverse=True)[:limit]


def ended(database: sqlite3.Connection, service: str | None, limit: int) -> list[Lease]:
    """Read ended leases, newest end first."""
    where = "" if service is None else " WHERE service = :service"
    return _leases(database, _ENDED.format(where=where), {"service": service, "limit": limit})


def last_surplus_revision(database: sqlite3.Connection, events_kept: int) -> int:
    """Return the revision up to which events are news no more. The newest one always is: it carries the revision on."""
    row = database.execute(
        f"SELECT revision FROM events WHERE revision > {_PRUNED_TO} ORDER BY revision DESC LIMIT 1 OFFSET ?",
        (max(1, events_kept),),
    ).fetchone()
    return int((row or database.execute(f"SELECT {_PRUNED_TO}").fetchone())[0])


def surplus_events(database: sqlite3.Connection, after: int, last: int) -> list[int]:
    """Return the revisions after one and up to another that no live lease needs, the first SURPLUS_READ of them.

    None of them will be needed again: what a lease becomes is an event of its own.
    """
    return [revision for (revision,) in database.execute(_SURPLUS, (after, last, SURPLUS_READ)).fetchall()]


def _live(rows: list[tuple[str, int, bytes | None]], events: list[Event]) -> list[Lease]:
    """Make the live leases, oldest first. One that an event has already is not made again."""
    leases = {event.revision: event.lease for event in events}
    live = []
    for lease_id, revision, body in rows:
        lease = leases.get(revision) or (decode_lease(body) if body else None)
        if lease is None or lease.id != lease_id:
            raise StoreDamaged(f"events are missing: there is none of revision {revision}, which left {lease_id}")
        live.append(lease)
    return sorted(live, key=lambda lease: lease.created_at)


def _leases(database: sqlite3.Connection, statement: str, values: Any = ()) -> list[Lease]:
    return [decode_lease(body) for (body,) in database.execute(statement, values).fetchall()]
