"""The one connection that writes: batches, pruning, and checkpoints. Runs in its own thread.

Nothing else may write or checkpoint: before 3.51.3 SQLite could lose pages when one connection ran a checkpoint while
another wrote (https://www.sqlite.org/wal.html#walresetbug), and most systems carry such a version.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal

from portd.adapters.sqlite.lock import StateLock
from portd.adapters.sqlite.schema import MIGRATIONS, wal_of
from portd.adapters.sqlite.watching import FileWatch
from portd.core.errors import PortdError, StoreLost, StoreUnavailable
from portd.core.failpoints import failpoint
from portd.core.model import Event, encode_lease
from portd.core.transitions import stint_of

logger = logging.getLogger(__name__)

Durability = Literal["full", "fast"]
Row = tuple[Any, ...]

BUSY_TIMEOUT_S: Final = 2.0
"""Seconds to wait for a lock that another program (a backup, a curious shell) has on the database."""
CACHE_KIB: Final = 4 << 10
"""Pages in memory: what 500 ends in one commit touch, each a page of its own of `ended_by_port`. Half of it costs them
a fifth of their speed; grants need a fraction."""
PAGE_BYTES: Final = 4096
CHECKPOINT_PAGES: Final = 1000
"""Pages in the log (4 MB) after which a checkpoint pays: 3 to 10 ms, after the answer. The log's file stays this large
and is overwritten: syncing a file that grows takes twice as long."""
CHECKPOINT_PAGES_MIN: Final = 16
"""On a small disk a checkpoint comes earlier: the log uses at most a quarter of the free space."""
CAP_PAGES: Final = 16 * CHECKPOINT_PAGES
"""Pages in the log (64 MB) past which a checkpoint waits for readers (BUSY_TIMEOUT_S) rather than go on beside them."""
COMMIT_PAGES: Final = 4
"""Pages that a commit writes at least: the leaves of `events` and `live`, and what is above them. An estimate: SQLite
says how long the log really is only at a checkpoint."""
PRUNE_STEP: Final = 50
"""Rows deleted at a time: a millisecond or two between two commits, in a history of 200,000 leases."""

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
"""An ended lease that passed to another process is live again, under its id; one may end twice where the disk wrote an
end after its request was refused."""
_APPEND_MOVED: Final = """
    INSERT INTO moved (revision, id, protocol, port, uid, since, ended_at, body)
    VALUES (?1, ?2, ?3, ?4, ?5, ifnull((SELECT max(ended_at) FROM moved WHERE id = ?2), ?6), ?7, ?8)"""
_DELETE_MOVED: Final = f"""
    DELETE FROM moved WHERE revision IN
        (SELECT revision FROM moved WHERE ended_at < ? ORDER BY ended_at LIMIT {PRUNE_STEP})"""
_DELETE_ENDED: Final = f"""
    DELETE FROM ended WHERE revision IN
        (SELECT revision FROM ended WHERE ended_at < ? ORDER BY ended_at LIMIT {PRUNE_STEP})"""
_DELETE_OLDEST: Final = f"""
    DELETE FROM ended WHERE revision IN (SELECT revision FROM ended ORDER BY ended_at LIMIT {PRUNE_STEP})"""
_DELETE_OLDEST_OF_USER: Final = f"""
    DELETE FROM ended WHERE revision IN
        (SELECT revision FROM ended WHERE uid IS ? ORDER BY ended_at LIMIT {PRUNE_STEP})"""
_DELETE_EVENTS: Final = "DELETE FROM events WHERE revision IN (VALUES {rows})"
_OLDEST_SURPLUS: Final = f"""
    SELECT revision FROM events
    WHERE revision < (SELECT max(revision) FROM events) AND revision NOT IN (SELECT revision FROM live)
    ORDER BY revision LIMIT {PRUNE_STEP}"""

_NOTHING_WRITTEN: Final = {
    "SQLITE_FULL": "the disk is full",
    "SQLITE_IOERR_WRITE": "the disk refuses writes (read-only, over quota, or failing)",
    "SQLITE_READONLY": "the database is read-only",
    "SQLITE_BUSY": "another program has the database locked",
    "SQLITE_LOCKED": "the database is locked",
    "SQLITE_CANTOPEN": "a file of the database can't be opened",
    "SQLITE_PERM": "no permission to write",
}
"""Errors that mean the transaction did not commit, by prefix: SQLite writes the commit frame last, then only syncs."""
FULL: Final = _NOTHING_WRITTEN["SQLITE_FULL"]
OBSERVED: Final = frozenset({"bound", "unbound", "conflict", "health", "announced", "passed"})
"""Events that nobody requested: they have happened, whether the disk is full or not."""
_DAMAGE: Final = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


def connect(path: Path, durability: Durability) -> sqlite3.Connection:
    """Open the database for writing. `full` syncs the log at every commit, `fast` only at a checkpoint: a power cut
    then loses the newest commits, and never more (https://www.sqlite.org/pragma.html#pragma_synchronous)."""
    database = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S
    )
    try:
        database.execute(f"PRAGMA synchronous = {'FULL' if durability == 'full' else 'NORMAL'}")
        database.execute("PRAGMA wal_autocheckpoint = 0")  # the store checkpoints, after the answer
        database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        database.execute("BEGIN IMMEDIATE")  # fails now if it can't be written at all
        database.execute("ROLLBACK")
    except BaseException:
        database.close()
        raise
    return database


class Writer:
    """The work of the writing thread, and what it learned about the disk.

    `failure` is None, or why nothing may be written any more (fail-stop). `is_short`: the disk is too full for
    grants; the reserved space may be in use.
    """

    def __init__(self, path: Path, lock: StateLock) -> None:
        self._path = path
        self._lock = lock
        self._watch = FileWatch(path, wal_of(path))
        self._write_problem: str | None = None
        self._damage: str | None = None
        self._checkpoint_problem: str | None = None
        self._pages = 0
        self._checkpoint_at = _checkpoint_at(path)
        self.is_short = False
        self._is_own_doing = False  # portd's own files fill the disk
        self.failure: str | None = None
        self.unpruned_bytes = 0

    @property
    def problem(self) -> str | None:
        """Say in one sentence what is wrong, or None."""
        full = FULL if self.is_short else None
        return self.failure or self._damage or self._write_problem or full or self._checkpoint_problem

    @property
    def wants_checkpoint(self) -> bool:
        """Return whether enough has been written since the last checkpoint."""
        return self._pages >= self._checkpoint_at and self.failure is None

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the sizes of the database and its log in bytes; asks no disk."""
        return self._watch.sizes

    def write(self, database: sqlite3.Connection, events: Sequence[Event]) -> None:
        """Write events and the leases that they leave, in one transaction; without any, a page as it was.

        On a full disk, observations (an owner has exited) may use the reserved space, and a disk that portd
        filled itself can be emptied by releasing. Raises StoreUnavailable when surely nothing was written, StoreLost
        when nobody knows, and ever after.
        """
        try:
            rows = [(event.revision, event.at, event.type, encode_lease(event.lease)) for event in events]
        except (ValueError, OverflowError) as error:
            raise self._failure(database, error, committing=False) from error
        if not self.regain_reserve(database):
            self._is_own_doing = self._fills_disk()
        if self.is_short and not all(map(self._may_use_reserve, events)):
            raise StoreUnavailable(f"{FULL} ({self._path}): nothing has changed; free some space")
        try:
            self._write_rows(database, events, rows)
        except StoreUnavailable as error:
            if not _is_full(error) or not self._relieve(database, events):
                raise
            self._write_rows(database, events, rows)
        if self.is_short and self._is_own_doing:
            self._delete_surplus(database)  # so that the next release finds free pages

    def regain_reserve(self, database: sqlite3.Connection) -> bool:
        """Reserve space again if the reserve was used; False while the disk is too full for grants."""
        if self.is_short:
            self.is_short = False
            self._run_checkpoint(database, "PASSIVE")  # may find the disk full again
            self.is_short = not self._lock.reserve_space() or self.is_short
        return not self.is_short

    def start(self, database: sqlite3.Connection, revision: int) -> None:
        """Record the revision after which this start gives its own. Raises as `write` does."""
        self._run(database, "INSERT OR REPLACE INTO meta (key, value) VALUES ('started_after', ?)", revision)
        self.checkpoint(database)  # syncs whatever the durability, and empties the log that a crash has left

    def delete_ended(self, database: sqlite3.Connection, before: float) -> int:
        """Delete the PRUNE_STEP oldest leases that ended before a time (epoch seconds); returns how many these were.
        Raises as `write` does."""
        return self._run(database, _DELETE_ENDED, before)

    def delete_moved(self, database: sqlite3.Connection, before: float) -> int:
        """Delete the PRUNE_STEP oldest moves before a time (epoch seconds); returns how many these were. Raises as
        `write` does."""
        return self._run(database, _DELETE_MOVED, before)

    def delete_oldest(self, database: sqlite3.Connection) -> int:
        """Delete the PRUNE_STEP leases that ended first; returns how many these were. Raises as `write` does."""
        return self._run(database, _DELETE_OLDEST)

    def delete_oldest_of_user(self, database: sqlite3.Connection, uid: int | None) -> int:
        """Delete the PRUNE_STEP leases of a user that ended first; returns how many. Raises as `write` does."""
        return self._run(database, _DELETE_OLDEST_OF_USER, uid)

    def set_pruned_to(self, database: sqlite3.Connection, revision: int) -> None:
        """Persist the prune watermark before deleting events up to it. Raises as `write` does."""
        self._run(database, "UPDATE meta SET value = ?1 WHERE key = 'pruned_to' AND value < ?1", revision)

    def delete_events(self, database: sqlite3.Connection, revisions: Sequence[int]) -> int:
        """Delete events; returns how many. Raises as `write` does."""
        return self._run(database, _for_rows(_DELETE_EVENTS, 1, len(revisions)), *revisions)

    def checkpoint(self, database: sqlite3.Connection, mode: Literal["PASSIVE", "TRUNCATE"] = "PASSIVE") -> None:
        """Copy the log's pages into the database, so that the log starts over.

        A failure loses nothing: the log still has all of it, and the next checkpoint comes when as much was written
        again. Does nothing where the files are not the writer's own any more.
        """
        problem = self._run_checkpoint(database, mode)
        if problem is not None and problem != self._checkpoint_problem:
            logger.warning("%s: %s", self._path, problem)
        self._checkpoint_problem = problem
        if problem is None:
            self._lock.reserve_space()

    def _run_checkpoint(self, database: sqlite3.Connection, mode: Literal["PASSIVE", "TRUNCATE"]) -> str | None:
        """Run a checkpoint where the files are the writer's own; returns what failed, or None."""
        if self.failure is not None or self._damage is not None or self._watch.problem() is not None:
            return self._checkpoint_problem
        if self._pages >= CAP_PAGES:
            mode = "TRUNCATE"
        problem = None
        failpoint("store.checkpoint")
        try:
            _, in_log, copied = database.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        except sqlite3.Error as error:
            problem = f"the checkpoint of the log failed: {_reason(error) or error}"
            # What is in the log must still fit into the database with the reserve's help.
            self.is_short = _reason(error) == FULL or self.is_short
        else:
            self._pages = max(0, in_log - copied)
        if problem is None and self._pages >= CAP_PAGES:
            problem = "another program keeps reading the database, so its log grows"
        self._checkpoint_at = self._pages + _checkpoint_at(self._path)
        self._watch.record()
        return problem

    def fail_stop(self, why: str) -> None:
        """Write nothing from now on: the content of the disk can't be trusted, or must not be touched."""
        self.failure = why

    def report_damage(self, error: sqlite3.Error) -> bool:
        """Write nothing more if a read shows that the database is damaged; return whether it does."""
        if _name(error).startswith(_DAMAGE):
            self._damage = f"{self._path} is damaged ({error}): stop portd and restore a copy"
        return self._damage is not None

    def _relieve(self, database: sqlite3.Connection, events: Sequence[Event]) -> bool:
        """Make space on a full disk for these events, as far as they may have it; False where they may not."""
        self._is_own_doing = self._fills_disk()
        may_use_reserve = all(map(self._may_use_reserve, events))
        if may_use_reserve:
            self.is_short = self._lock.release_space() or self.is_short
        if self._is_own_doing:
            self._run_checkpoint(database, "PASSIVE")  # the log starts over
        if self._is_own_doing and may_use_reserve:
            self._delete_surplus(database)  # the database has free pages again
        return may_use_reserve or self._is_own_doing

    def _delete_surplus(self, database: sqlite3.Connection) -> None:
        """Delete the oldest history and events that nothing live needs, as far as the disk lets it."""
        try:
            database.execute("BEGIN IMMEDIATE")
            database.execute(_DELETE_OLDEST)
            surplus = [revision for (revision,) in database.execute(_OLDEST_SURPLUS).fetchall()]
            if surplus:
                database.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'pruned_to'", surplus[-1:])
                database.execute(_for_rows(_DELETE_EVENTS, 1, len(surplus)), surplus)
            database.execute("COMMIT")
        except sqlite3.Error as error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            logger.debug("%s: nothing could be deleted on the full disk: %s", self._path, error)
        self._watch.record()

    def _fills_disk(self) -> bool:
        """Return whether portd's own files are most of what is on the disk."""
        return 2 * sum(self._watch.sizes) >= _used_bytes(self._path)

    def _may_use_reserve(self, event: Event) -> bool:
        if event.type == "ended":
            return self._is_own_doing or event.lease.ended_because != "released"
        return event.type in OBSERVED

    def _write_rows(self, database: sqlite3.Connection, events: Sequence[Event], rows: Sequence[Row]) -> None:
        self._check_files()
        committing = False
        try:
            live, ended = _lease_rows(events, rows)
            database.execute("BEGIN IMMEDIATE")
            failpoint("store.begun")
            _for_all(database, _APPEND_EVENTS, rows)
            _for_all(database, _SET_LIVE, live)
            _for_all(database, _END_LIVE, [row[1:2] for row in ended])
            _for_all(database, _RESUME_ENDED, [(event.lease.id,) for event in events if event.type == "passed"])
            _for_all(database, _RESUME_ENDED, [row[1:2] for row in ended])
            _for_all(database, _APPEND_ENDED, ended)
            for moved in _moved_rows(events):
                database.execute(_APPEND_MOVED, moved)
            if not events:
                database.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            committing = True
            failpoint("store.written")
            database.execute("COMMIT")
            failpoint("store.committed")
        except (sqlite3.Error, ValueError, OverflowError) as error:  # the latter two: a value that can't be stored
            raise self._failure(database, error, committing=committing) from error
        size = sum(len(row[3]) for row in rows)
        self.unpruned_bytes += size
        self._written(COMMIT_PAGES + 2 * size // PAGE_BYTES + 2 * len(ended))

    def _check_files(self) -> None:
        """Raise StoreLost after a fail-stop, StoreUnavailable where the files are not the writer's own any more."""
        if self.failure is not None:
            raise StoreLost(f"{self._path} is not trusted any more: {self.failure}; start over from the disk")
        if self._damage is not None:
            raise StoreUnavailable(self._damage)
        if (problem := self._watch.problem()) is not None:
            self._write_problem = f"{problem}: stop portd, put the file back or restore a copy, then start portd"
            raise StoreUnavailable(self._write_problem)

    def _run(self, database: sqlite3.Connection, statement: str, *values: float | None) -> int:
        """Run a statement that is a transaction by itself; returns how many rows it changed."""
        self._check_files()
        try:
            changed = database.execute(statement, values).rowcount
        except sqlite3.Error as error:
            raise self._failure(database, error, committing=True) from error
        self._written(COMMIT_PAGES + max(0, changed))
        return changed

    def _failure(self, database: sqlite3.Connection, error: Exception, *, committing: bool) -> PortdError:
        """Roll back, and return what is known: the connection can be used again, or the store fails for good."""
        reason = _reason(error)
        if reason is None and not committing and _name(error).startswith("SQLITE_IOERR"):
            reason = "the disk reports errors"
        if reason is None and isinstance(error, sqlite3.Error) and not committing and self.report_damage(error):
            reason = self._damage
        try:
            if database.in_transaction:
                database.execute("ROLLBACK")
        except sqlite3.Error:
            reason = None
        if reason is None:
            self.fail_stop(f"{error} ({_name(error)})")
            return StoreLost(f"{self._path}: {self.failure}: whether the last commit reached the disk is not known")
        self._watch.record()  # a transaction that was rolled back may have written to the log
        self._write_problem = reason
        return StoreUnavailable(
            f"{reason} ({self._path}): nothing has changed, and portd goes on by itself when that is fixed"
        )

    def _written(self, pages: int) -> None:
        self._write_problem = None
        self._pages += pages
        self._watch.record()


def _checkpoint_at(path: Path) -> int:
    """Return after how many pages a checkpoint pays, on the disk as it is now."""
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return CHECKPOINT_PAGES
    free_pages = disk.f_bavail * disk.f_frsize // PAGE_BYTES
    return max(CHECKPOINT_PAGES_MIN, min(CHECKPOINT_PAGES, free_pages // 4))


def _used_bytes(path: Path) -> int:
    disk = os.statvfs(path.parent)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def _is_full(error: StoreUnavailable) -> bool:
    return _name(error.__cause__).startswith("SQLITE_FULL") if error.__cause__ is not None else False


def _lease_rows(events: Sequence[Event], rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Make the rows of the leases that are live after these events, and of those that have ended.

    Of several changes of one lease in a batch the last is what the lease is now.
    """
    last = {event.lease.id: (event.lease, row) for event, row in zip(events, rows, strict=True)}
    live, ended = [], []
    for lease, (revision, _, _, body) in last.values():
        assert (lease.ended_at is None) == (lease.state != "ended"), (
            "the store recognizes live leases by their open end"
        )
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


def _moved_rows(events: Sequence[Event]) -> list[Row]:
    """Make the rows of the ports that leases moved away from by these events."""
    return [
        (
            event.revision,
            left.id,
            left.protocol,
            left.port,
            left.uid,
            left.created_at,
            left.ended_at,
            encode_lease(left),
        )
        for event in events
        if event.type == "declined" and (left := stint_of(event)) is not None
    ]


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


def _name(error: BaseException) -> str:
    return getattr(error, "sqlite_errorname", None) or type(error).__name__
