"""The store's queries, as functions over a connection that only reads. They run in the reader's thread.

They raise sqlite3.Error, and msgspec.DecodeError for a body that is no lease.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Final

from portd.core.errors import StoreDamaged
from portd.core.model import Event, EventType, Lease, Protocol, decode_lease
from portd.leasing.seams import REVISION_GAP, Loaded

EVENTS_LOADED: Final = 10_000
"""The newest events that a start reads: as many as followers may resume from."""

EVENTS_BYTES: Final = 16 << 20
"""Bytes of the events that a start reads, and that pruning keeps: large events are kept for a shorter time."""
ENDED_LOADED: Final = 4_000
"""The newest ended leases that a start reads: names and ports beyond them begin anew. A start reads no more, however
long the history is."""
SURPLUS_READ: Final = 10_000
"""Events that are read at a time to be deleted: some milliseconds of this thread."""

_PRUNED_TO: Final = "(SELECT value FROM meta WHERE key = 'pruned_to')"
_LIVE: Final = "SELECT id, revision, body FROM live LEFT JOIN events USING (revision)"
_NEWEST_ENDED: Final = "SELECT service, instance, endpoint, port, body FROM ended ORDER BY ended_at DESC LIMIT ?"
_EVENTS: Final = f"""
    SELECT revision, type, at, body FROM events WHERE revision > {_PRUNED_TO} ORDER BY revision DESC LIMIT ?"""
_EVENT_SIZES: Final = f"""
    SELECT revision, length(body) FROM events WHERE revision > {_PRUNED_TO} ORDER BY revision DESC LIMIT ?"""
_USAGE: Final = "SELECT uid, bytes FROM usage"
_LEASE: Final = """
    SELECT body FROM live JOIN events USING (revision) WHERE id = ?1
    UNION ALL SELECT body FROM ended WHERE id = ?1"""
# All that live there, whenever they began: the tables that are written at a grant name a port and no more. A lease that
# moved to the port has it since then; `since` is null where that is its grant.
_HISTORY: Final = """
    SELECT (SELECT max(ended_at) FROM moved WHERE moved.id = live.id) AS since, body
        FROM live JOIN events USING (revision) WHERE port = :port
    UNION ALL SELECT * FROM (
        SELECT (SELECT max(ended_at) FROM moved WHERE moved.id = ended.id) AS since, body
            FROM ended WHERE port = :port{where} ORDER BY created_at DESC LIMIT :limit)"""
_MOVED: Final = """
    SELECT since, body FROM moved WHERE port = :port{where} ORDER BY since DESC LIMIT :limit"""
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
        remembered = _remembered(database)
        event_rows, is_cut = _newest_events(database)
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
    complete_after = events[0].revision - 1 if is_cut else pruned_to
    return Loaded(_live(live_rows, events), remembered, events, first, complete_after, f"{number[0]:016x}")


def lease(database: sqlite3.Connection, lease_id: str) -> Lease | None:
    """Read one lease, live or ended."""
    found = _leases(database, _LEASE, (lease_id,))
    return found[0] if found else None


def history(
    database: sqlite3.Connection, port: int, protocol: Protocol | None, at: float | None, limit: int
) -> list[Lease]:
    """Read who had the port, newest first; a lease of `both` protocols is found by either, and finds either.

    The time that a lease was here before it moved to another port is an ended lease without a reason.
    """
    where = ""
    if protocol == "both":
        protocol = None  # any
    if protocol is not None:
        where += " AND protocol IN (:protocol, 'both')"
    if at is not None:
        where += " AND {began} <= :at AND ended_at > :at"
    values = {"port": port, "protocol": protocol, "at": at, "limit": limit}
    rows = [
        *database.execute(_HISTORY.format(where=where.format(began="created_at")), values).fetchall(),
        *database.execute(_MOVED.format(where=where.format(began="since")), values).fetchall(),
    ]
    leases = ((since, decode_lease(body)) for since, body in rows)
    found = [(lease.created_at if since is None else since, lease) for since, lease in leases]
    found = [
        (since, lease) for since, lease in found if protocol in (None, *lease.protocols) and (at is None or since <= at)
    ]
    found.sort(key=lambda each: (each[0], each[1].id), reverse=True)
    return [lease for _, lease in found[:limit]]


def ended(database: sqlite3.Connection, service: str | None, limit: int) -> list[Lease]:
    """Read ended leases, newest end first."""
    where = "" if service is None else " WHERE service = :service"
    return _leases(database, _ENDED.format(where=where), {"service": service, "limit": limit})


def last_surplus_revision(database: sqlite3.Connection, events_kept: int) -> int:
    """Return the revision up to which events are no longer kept: beyond `events_kept`, or beyond EVENTS_BYTES.

    The newest event always stays: it carries the revision on.
    """
    total = 0
    for count, (revision, size) in enumerate(database.execute(_EVENT_SIZES, (max(1, events_kept) + 1,))):
        total += size
        if count and (count >= events_kept or total > EVENTS_BYTES):
            return int(revision)
    return int(database.execute(f"SELECT {_PRUNED_TO}").fetchone()[0])


def surplus_events(database: sqlite3.Connection, after: int, last: int) -> list[int]:
    """Return the revisions after one and up to another that no live lease needs, the first SURPLUS_READ of them.

    None of them will be needed again: what a lease becomes is an event of its own.
    """
    return [revision for (revision,) in database.execute(_SURPLUS, (after, last, SURPLUS_READ)).fetchall()]


def usage(database: sqlite3.Connection) -> dict[int | None, int]:
    """Return how many bytes of history each user has, by uid (None: leases without one)."""
    return {None if uid == -1 else uid: size for uid, size in database.execute(_USAGE)}


def _remembered(database: sqlite3.Connection) -> list[Lease]:
    """Read the newest end of every name and of every port, of the ENDED_LOADED newest ends, newest first."""
    names: set[tuple[str, str, str]] = set()
    ports: set[int] = set()
    found = []
    for service, instance, endpoint, port, body in database.execute(_NEWEST_ENDED, (ENDED_LOADED,)):
        name = (service, instance, endpoint)
        if name not in names or port not in ports:
            found.append(decode_lease(body))
            names.add(name)
            ports.add(port)
    return found


def _newest_events(database: sqlite3.Connection) -> tuple[list[tuple[int, EventType, float, bytes]], bool]:
    """Read the newest events within EVENTS_LOADED and EVENTS_BYTES, newest first, and whether there are older ones."""
    rows: list[tuple[int, EventType, float, bytes]] = []
    total = 0
    for row in database.execute(_EVENTS, (EVENTS_LOADED + 1,)):
        total += len(row[3])
        if rows and (len(rows) == EVENTS_LOADED or total > EVENTS_BYTES):
            return rows, True
        rows.append(row)
    return rows, False


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
