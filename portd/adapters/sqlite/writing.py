"""The one connection that writes: batches, forgetting, and folding the log into the database. Runs in its own thread.

Nothing else may write or fold: before 3.51.3 SQLite could lose pages when one connection folded the log while another
wrote (https://www.sqlite.org/wal.html#walresetbug), and most systems carry such a version.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal

from portd.adapters.sqlite.schema import MIGRATIONS
from portd.core.errors import PortdError, StoreLost, StoreUnavailable
from portd.core.model import Event, encode_lease

logger = logging.getLogger(__name__)

Durability = Literal["full", "fast"]
Row = tuple[Any, ...]

BUSY_TIMEOUT_S: Final = 2.0
"""Seconds to wait for a lock that another program (a backup, a curious shell) has on the database."""
CACHE_KIB: Final = 4 << 10
"""Pages in memory: what 500 ends in one commit touch, each a page of its own of `ended_by_port`. Half of it costs them
a fifth of their speed; grants need a fraction."""
FOLD_FRAMES: Final = 1000
"""Pages in the log (4 MB) that make it worth folding: 3 to 10 ms, after the answer. The log's file stays this large and
is written over: syncing a file that grows takes twice as long."""
CAP_FRAMES: Final = 16 * FOLD_FRAMES
"""Pages in the log (64 MB) past which folding waits for readers (BUSY_TIMEOUT_S) rather than go on beside them."""
PRUNE_STEP: Final = 50
"""Rows that go at a time: a millisecond or two between two commits, in a history of 200,000 leases."""

ROWS_MAX: Final = 64
"""Rows in one statement. Each statement gives the GIL up and waits to have it back, while the loop's thread wants it
too, so a statement a row costs both. More rows than this gain nothing."""

_APPEND_EVENTS: Final = "INSERT INTO events (revision, at, type, body) VALUES {rows}"
_SET_LIVE: Final = "INSERT OR REPLACE INTO live (id, port, revision) VALUES {rows}"
_END_LIVE: Final = "DELETE FROM live WHERE id IN (VALUES {rows})"
_APPEND_ENDED: Final = """
    INSERT INTO ended (revision, id, service, instance, endpoint, protocol, address, port, uid, created_at, ended_at,
        body) VALUES {rows}"""
_RESUME_ENDED: Final = "DELETE FROM ended WHERE id IN (VALUES {rows})"
"""An ended lease that passed to another process is live again, under its id."""
_FORGET_ENDED: Final = f"""
    DELETE FROM ended WHERE revision IN
        (SELECT revision FROM ended WHERE ended_at < ? ORDER BY ended_at LIMIT {PRUNE_STEP})"""
_FORGET_EVENTS: Final = "DELETE FROM events WHERE revision IN (VALUES {rows})"

_NOTHING_WRITTEN: Final = {
    "SQLITE_FULL": "the disk is full",
    "SQLITE_IOERR_WRITE": "the disk refuses writes (read-only, over quota, or failing)",
    "SQLITE_READONLY": "the database is read-only",
    "SQLITE_BUSY": "another program has the database locked",
    "SQLITE_LOCKED": "the database is locked",
    "SQLITE_CANTOPEN": "a file of the database can't be opened",
    "SQLITE_PERM": "no permission to write",
}
"""Errors after which surely nothing counts, by prefix: the page that makes a transaction count is the last one written,
and nothing is written after it but the sync."""


def connect(path: Path, durability: Durability) -> sqlite3.Connection:
    """Open the database for writing. `full` syncs the log at every commit, `fast` only while folding it: a power cut
    then takes the newest commits, and never more (https://www.sqlite.org/pragma.html#pragma_synchronous)."""
    database = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S
    )
    try:
        database.execute(f"PRAGMA synchronous = {'FULL' if durability == 'full' else 'NORMAL'}")
        database.execute("PRAGMA wal_autocheckpoint = 0")  # the store folds, after the answer
        database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        database.execute("BEGIN IMMEDIATE")  # tells now whether it can be written at all
        database.execute("ROLLBACK")
    except BaseException:
        database.close()
        raise
    return database


class Writer:
    """The work of the writing thread, and what it learned about the disk.

    `sealed` is None, or why nothing may be written any more; `log_frames` counts the pages in the log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # SQLite keeps POSIX locks on this file, and closing any descriptor of it would drop them: closed last of all.
        self._shared_memory = os.open(path.with_name(path.name + "-shm"), os.O_RDONLY | os.O_CLOEXEC)
        self._fold_at = FOLD_FRAMES
        self._write_problem: str | None = None
        self._fold_problem: str | None = None
        self.sealed: str | None = None
        self.log_frames = 0
        self._count_frames()

    @property
    def problem(self) -> str | None:
        """Say in one sentence what is wrong, or None."""
        return self.sealed or self._write_problem or self._fold_problem

    @property
    def wants_fold(self) -> bool:
        """Tell whether the log is worth folding."""
        return self.log_frames >= self._fold_at and self.sealed is None

    def write(self, database: sqlite3.Connection, events: Sequence[Event]) -> None:
        """Write events and the leases that they leave, in one transaction; without any, a page as it was.

        Raises StoreUnavailable when surely nothing was written, StoreLost when nobody knows, and ever after.
        """
        self._refuse_if_sealed()
        committing = False
        try:
            rows = [(event.revision, event.at, event.type, encode_lease(event.lease)) for event in events]
            live, ended = _lease_rows(events, rows)
            database.execute("BEGIN IMMEDIATE")
            _for_all(database, _APPEND_EVENTS, rows)
            _for_all(database, _SET_LIVE, live)
            _for_all(database, _END_LIVE, [row[1:2] for row in ended])
            _for_all(database, _RESUME_ENDED, [(event.lease.id,) for event in events if event.type == "passed"])
            _for_all(database, _APPEND_ENDED, ended)
            if not events:
                database.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            committing = True
            database.execute("COMMIT")
        except (sqlite3.Error, ValueError, OverflowError) as error:  # the latter two: a value that can't be stored
            raise self._failure(database, error, committing=committing) from error
        self._written()

    def reserve(self, database: sqlite3.Connection, revision: int) -> None:
        """Record the revision after which this start takes its own up. Raises as `write` does."""
        self._run(database, "INSERT OR REPLACE INTO meta (key, value) VALUES ('started_after', ?)", revision)
        self.fold(database)  # syncs whatever the durability, and is done with what a crash has left in the log

    def forget_ended(self, database: sqlite3.Connection, before: float) -> int:
        """Delete the PRUNE_STEP leases that ended first, of those that ended before a time; returns how many these
        were. Raises as `write` does."""
        return self._run(database, _FORGET_ENDED, before)

    def end_news(self, database: sqlite3.Connection, revision: int) -> None:
        """Record the revision up to which events are news no more, before the first of them goes. Raises as `write`
        does."""
        self._run(database, "UPDATE meta SET value = ?1 WHERE key = 'pruned_to' AND value < ?1", revision)

    def forget_events(self, database: sqlite3.Connection, revisions: Sequence[int]) -> int:
        """Delete events; returns how many. Raises as `write` does."""
        return self._run(database, _for_rows(_FORGET_EVENTS, 1, len(revisions)), *revisions)

    def fold(self, database: sqlite3.Connection, mode: Literal["PASSIVE", "TRUNCATE"] = "PASSIVE") -> None:
        """Copy the log's pages into the database, so that the log starts over. A failure loses nothing: the log still
        has all of it, and folding is tried again when as much has come on top."""
        if self.sealed is not None:
            return
        if self.log_frames >= CAP_FRAMES:
            mode = "TRUNCATE"
        problem = None
        try:
            database.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        except sqlite3.Error as error:
            problem = f"the log can't be folded into the database: {_reason(error) or error}"
        self._fold_at = self.log_frames + FOLD_FRAMES
        self._count_frames()
        if problem is None and self.log_frames >= CAP_FRAMES:
            problem = "another program keeps reading the database, so its log grows"
        if problem is not None and problem != self._fold_problem:
            logger.warning("%s: %s", self._path, problem)
        self._fold_problem = problem

    def release(self) -> None:
        """Close what the writer has open. To be called once, after every connection of this process is closed."""
        os.close(self._shared_memory)

    def seal(self, why: str) -> None:
        """Write nothing from now on: what the disk has can't be trusted, or may not be touched."""
        self.sealed = why

    def _refuse_if_sealed(self) -> None:
        if self.sealed is not None:
            raise StoreLost(f"{self._path} is not trusted any more: {self.sealed}; start over from the disk")

    def _run(self, database: sqlite3.Connection, statement: str, *values: float) -> int:
        """Run a statement that is a transaction by itself; returns how many rows it changed."""
        self._refuse_if_sealed()
        try:
            changed = database.execute(statement, values).rowcount
        except sqlite3.Error as error:
            raise self._failure(database, error, committing=True) from error
        self._written()
        return changed

    def _failure(self, database: sqlite3.Connection, error: Exception, *, committing: bool) -> PortdError:
        """Roll back, and say what is known: the connection can be used again, or the store is sealed."""
        reason = _reason(error)
        if reason is None and not committing and _name(error).startswith("SQLITE_IOERR"):
            reason = "the disk reports errors"
        try:
            if database.in_transaction:
                database.execute("ROLLBACK")
        except sqlite3.Error:
            reason = None
        if reason is None:
            self.seal(f"{error} ({_name(error)})")
            return StoreLost(f"{self._path}: {self.sealed}: whether the last commit reached the disk is not known")
        self._write_problem = reason
        return StoreUnavailable(
            f"{reason} ({self._path}): nothing has changed, and portd goes on by itself when that is mended"
        )

    def _written(self) -> None:
        self._write_problem = None
        self._count_frames()

    def _count_frames(self) -> None:
        # mxFrame of the WAL-index header, native order (https://www.sqlite.org/walformat.html#the_wal_index_header):
        # the file's size does not tell, since the log is written over.
        frames = int.from_bytes(os.pread(self._shared_memory, 4, 16), sys.byteorder)
        if frames < self.log_frames:  # folded whole, it has started over
            self._fold_at = FOLD_FRAMES
        self.log_frames = frames


def _lease_rows(events: Sequence[Event], rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Make the rows of the leases that are live after these events, and of those that have ended.

    Of several changes of one lease in a batch the last is what the lease is now.
    """
    last = {event.lease.id: (event.lease, row) for event, row in zip(events, rows, strict=True)}
    live, ended = [], []
    for lease, (revision, _, _, body) in last.values():
        assert (lease.ended_at is None) == (lease.state != "ended"), "the store tells live leases by their open end"
        if lease.ended_at is None:
            live.append((lease.id, lease.port, revision))
        else:
            ended.append(
                (
                    revision,
                    lease.id,
                    lease.service,
                    lease.instance,
                    lease.endpoint,
                    lease.protocol,
                    lease.address,
                    lease.port,
                    lease.uid,
                    lease.created_at,
                    lease.ended_at,
                    body,
                )
            )
    return live, ended


def _for_all(database: sqlite3.Connection, statement: str, rows: Sequence[Row]) -> None:
    start = 0
    while left := len(rows) - start:
        count = min(ROWS_MAX, 1 << left.bit_length() - 1)  # powers of two: few statements to be compiled, and kept
        some = rows[start : start + count]
        database.execute(_for_rows(statement, len(some[0]), count), tuple(chain.from_iterable(some)))
        start += count


@cache
def _for_rows(statement: str, width: int, count: int) -> str:
    row = f"({', '.join('?' * width)})"
    return statement.format(rows=", ".join([row] * count))


def _reason(error: Exception) -> str | None:
    return next((text for prefix, text in _NOTHING_WRITTEN.items() if _name(error).startswith(prefix)), None)


def _name(error: Exception) -> str:
    return getattr(error, "sqlite_errorname", None) or type(error).__name__
