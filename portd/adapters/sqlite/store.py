"""SqliteStore: leases and events in one SQLite file, written in batches by one thread.

A commit is one transaction in one hop to aiosqlite's thread. With `full` durability the WAL is synced before the
commit returns (PRAGMA synchronous=FULL: https://www.sqlite.org/pragma.html#pragma_synchronous), so what it wrote
survives a power cut; with `fast` it survives the daemon's death alone, since the kernel has it.

Checkpoints run on a connection of their own, beside the commits; past a cap on the WAL's size a commit waits for one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import aiosqlite
import msgspec

from portd.adapters.sqlite.lock import StateLock
from portd.adapters.sqlite.schema import judge, migrate
from portd.core.errors import StoreDamaged, StoreLost, StoreUnavailable
from portd.core.model import Event, Lease, Protocol, decode_lease, encode_lease
from portd.seams import Loaded

logger = logging.getLogger(__name__)

CHECKPOINT_BYTES: Final = 4 << 20
"""The WAL's size that starts a checkpoint beside the commits: four thousand grants."""
WAL_MAX_BYTES: Final = 64 << 20
"""The WAL's size that makes a commit wait for one: without a cap it grows for as long as the load lasts."""
REMEMBERED_MAX: Final = 50_000
"""Ended leases that are read at the start: half a second at the most."""
EVENTS_LOADED: Final = 10_000
PRUNE_STEP: Final = 500
"""Rows that one step of pruning deletes: a millisecond between two commits."""
BUSY_TIMEOUT_MS: Final = 2_000

_UPSERT: Final = """
    INSERT INTO leases (id, service, port, protocol, live, created_at, ended_at, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET port = excluded.port, live = excluded.live, ended_at = excluded.ended_at,
        body = excluded.body"""
_INSERT_EVENT: Final = "INSERT INTO events (revision, at, type, body) VALUES (?, ?, ?, ?)"
_FORGET_LEASES: Final = """
    DELETE FROM leases WHERE rowid IN
        (SELECT rowid FROM leases WHERE live = 0 AND ended_at < ? ORDER BY ended_at LIMIT ?)"""
_FORGET_EVENTS: Final = """
    DELETE FROM events WHERE revision IN (SELECT revision FROM events WHERE revision <=
        (SELECT revision FROM events ORDER BY revision DESC LIMIT 1 OFFSET ?) LIMIT ?)"""
_SURE: Final = {"SQLITE_FULL": "the disk is full", "SQLITE_READONLY": "the database is read-only",
                "SQLITE_BUSY": "another program has the database locked", "SQLITE_LOCKED": "the database is locked",
                "SQLITE_CANTOPEN": "a file of the database can't be opened", "SQLITE_PERM": "no permission to write"}
"""Errors after which surely nothing was written: the transaction is rolled back."""

OnCommit = Callable[[float, int], None]
"""Is told of each commit: seconds, and how many events."""
Result = TypeVar("Result")


class SqliteStore:
    """Implements `LeaseStore`. Made by `open`; `close` before the loop ends."""

    def __init__(self, path: Path, durability: Literal["full", "fast"], lock: StateLock, writer: aiosqlite.Connection,
                 reader: aiosqlite.Connection, on_commit: OnCommit) -> None:
        self._path = path
        self._wal = path.with_name(path.name + "-wal")
        self._durability = durability
        self._lock = lock
        self._writer = writer
        self._reader = reader
        self._on_commit = on_commit
        self._checkpoint: asyncio.Task[None] | None = None
        self._lost = False
        self._problem: str | None = None
        self._last_commit_s = 0.0

    @classmethod
    async def open(cls, path: Path, durability: Literal["full", "fast"],
                   on_commit: OnCommit = lambda seconds, count: None) -> SqliteStore:
        """Open or make the database.

        Raises StateInUse when another daemon has it, StoreDamaged when the file may not be touched or can't be made.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = StateLock(path)
        except OSError as error:
            raise StoreDamaged(f"{path.parent} can't be used for the store: {error.strerror}") from error
        try:
            judge(path)
            writer = await cls._connect(path, durability)
            reader = await cls._connect(path, durability)
        except sqlite3.Error as error:
            lock.release()
            raise StoreDamaged(f"{path} can't be opened: {error}; nothing was changed") from error
        except BaseException:
            lock.release()
            raise
        return cls(path, durability, lock, writer, reader, on_commit)

    @staticmethod
    async def _connect(path: Path, durability: Literal["full", "fast"]) -> aiosqlite.Connection:
        connection = await aiosqlite.connect(path, isolation_level=None, cached_statements=64)
        try:
            await _run(connection, _prepare, connection._conn, path, durability)
        except BaseException:
            await connection.close()
            raise
        return connection

    # --- the seam ---

    async def commit(self, events: Sequence[Event]) -> None:
        """Write events and the leases that they leave, in one transaction."""
        if self._lost:
            raise StoreLost("the store is not trusted any more: start over from the disk")
        started = time.perf_counter()
        # Shielded: a cancelled caller gives up the waiting, not the work.
        await asyncio.shield(asyncio.ensure_future(_run(self._writer, self._write, events)))
        self._last_commit_s = time.perf_counter() - started
        self._on_commit(self._last_commit_s, len(events))
        await self._keep_wal_small()

    async def load(self) -> Loaded:
        """Read what the daemon starts from."""
        live = await self._leases("SELECT body FROM leases WHERE live = 1")
        ended = await self._leases("SELECT body FROM leases WHERE live = 0 ORDER BY ended_at DESC LIMIT ?",
                                   REMEMBERED_MAX)
        names, ports, remembered = set(), set(), []
        for lease in ended:
            if lease.name not in names or lease.port not in ports:
                names.add(lease.name)
                ports.add(lease.port)
                remembered.append(lease)
        rows = await self._rows("SELECT revision, type, at, body FROM events ORDER BY revision DESC LIMIT ?",
                                EVENTS_LOADED)
        events = [Event(revision, kind, at, self._decode(body)) for revision, kind, at, body in reversed(rows)]
        revision = max((events[-1].revision if events else 0, *(lease.revision for lease in live)))
        return Loaded(live, remembered[::-1], events, revision)

    async def lease(self, lease_id: str) -> Lease | None:
        """Read one lease."""
        found = await self._leases("SELECT body FROM leases WHERE id = ?", lease_id)
        return found[0] if found else None

    async def history(self, port: int, *, protocol: Protocol | None = None, at: float | None = None,
                      limit: int = 100) -> list[Lease]:
        """Read who had the port, newest first."""
        where, values = "port = ?", [port]  # type: tuple[str, list[Any]]
        if protocol in ("tcp", "udp"):
            where += " AND protocol IN (?, 'both')"
            values.append(protocol)
        elif protocol == "both":
            where += " AND protocol = 'both'"
        if at is not None:
            where += " AND created_at <= ? AND (ended_at IS NULL OR ended_at > ?)"
            values += [at, at]
        return await self._leases(f"SELECT body FROM leases WHERE {where} ORDER BY created_at DESC, rowid DESC LIMIT ?",
                                  *values, limit)

    async def ended(self, service: str | None = None, limit: int = 1000) -> list[Lease]:
        """Read ended leases, newest end first."""
        where, values = ("AND service = ?", [service]) if service is not None else ("", [])
        return await self._leases(f"SELECT body FROM leases WHERE live = 0 {where} ORDER BY ended_at DESC LIMIT ?",
                                  *values, limit)

    async def prune(self, ended_before: float, events_kept: int) -> int:
        """Forget old leases and events, a small step at a time."""
        total = 0
        for statement, bound in ((_FORGET_LEASES, ended_before), (_FORGET_EVENTS, events_kept)):
            gone = PRUNE_STEP
            while gone == PRUNE_STEP:
                gone = await _run(self._writer, self._delete, statement, bound)
                total += gone
        return total

    async def close(self) -> None:
        """Finish what is under way, fold the WAL into the database, let go of the lock."""
        if self._checkpoint is not None:
            await asyncio.wait([self._checkpoint])
        await self._reader.close()
        await self._writer.close()
        self._lock.release()

    # --- condition ---

    def condition(self) -> dict[str, Any]:
        """Describe the store for the status page; `problem` is None, or why it takes no writes."""
        return {"path": str(self._path), "durability": self._durability, "size_bytes": _size(self._path),
                "wal_bytes": _size(self._wal), "last_commit_ms": round(self._last_commit_s * 1000, 3),
                "problem": self._problem}

    # --- in the writer's thread ---

    def _write(self, events: Sequence[Event]) -> None:
        bodies = [(event, encode_lease(event.lease)) for event in events]
        # Of several changes of one lease in a batch the last is what the lease is now.
        leases = {event.lease.id: _row(event.lease, body) for event, body in bodies}
        database = self._writer._conn
        committing = False
        try:
            database.execute("BEGIN IMMEDIATE")
            database.executemany(_UPSERT, leases.values())
            database.executemany(_INSERT_EVENT, [(e.revision, e.at, e.type, body) for e, body in bodies])
            committing = True
            database.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._judge_failure(database, error, committing=committing) from error
        self._problem = None

    def _judge_failure(self, database: sqlite3.Connection, error: sqlite3.Error, *,
                       committing: bool) -> StoreUnavailable | StoreLost:
        name = getattr(error, "sqlite_errorname", "") or ""
        reason = next((text for prefix, text in _SURE.items() if name.startswith(prefix)), None)
        if reason is None and not committing and name.startswith("SQLITE_IOERR"):
            reason = "the disk reports errors"  # before the commit record: nothing of it counts
        try:
            if database.in_transaction:
                database.execute("ROLLBACK")
        except sqlite3.Error:
            reason = None
        if reason is None:
            self._lost = True
            self._problem = f"{name}: {error}"
            return StoreLost(f"{self._path}: {error} ({name}): whether the last commit reached the disk is not known")
        self._problem = reason
        return StoreUnavailable(f"{reason} ({self._path}): nothing has changed, and portd goes on by itself when it is "
                                "mended")

    def _delete(self, statement: str, bound: float) -> int:
        return self._writer._conn.execute(statement, (bound, PRUNE_STEP)).rowcount

    # --- the WAL ---

    async def _keep_wal_small(self) -> None:
        size_bytes = _size(self._wal)
        if size_bytes > CHECKPOINT_BYTES and (self._checkpoint is None or self._checkpoint.done()):
            self._checkpoint = asyncio.create_task(self._fold("PASSIVE", self._reader))
        if size_bytes > WAL_MAX_BYTES:
            await self._fold("TRUNCATE", self._writer)

    @staticmethod
    async def _fold(mode: str, connection: aiosqlite.Connection) -> None:
        try:
            await _run(connection, lambda: connection._conn.execute(f"PRAGMA wal_checkpoint({mode})").fetchall())
        except sqlite3.Error as error:
            logger.warning("a checkpoint failed (the WAL keeps everything meanwhile): %s", error)

    # --- reading ---

    async def _rows(self, statement: str, *values: Any) -> list[Any]:
        def fetch() -> list[Any]:
            return self._reader._conn.execute(statement, values).fetchall()

        try:
            return await _run(self._reader, fetch)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{self._path} can't be read: {error}") from error

    async def _leases(self, statement: str, *values: Any) -> list[Lease]:
        return [self._decode(body) for body, in await self._rows(statement, *values)]

    def _decode(self, body: bytes) -> Lease:
        try:
            return decode_lease(body)
        except msgspec.DecodeError as error:
            raise StoreDamaged(f"{self._path} holds a lease that can't be read: {error}") from error


async def _run(connection: aiosqlite.Connection, work: Callable[..., Result], *args: Any) -> Result:
    """Run a function whole in the connection's thread: one hop, where the public methods cost one a statement.

    `_execute` and `_conn` are aiosqlite's own (0.22, pinned; a test fails when they go).
    """
    result: Result = await connection._execute(work, *args)  # type: ignore[no-untyped-call]
    return result


def _prepare(database: sqlite3.Connection, path: Path, durability: Literal["full", "fast"]) -> None:
    path.chmod(0o600)  # it holds command lines and hashes of tokens
    database.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    # The schema goes into the main file before the WAL exists: its header can then be judged by itself.
    migrate(database)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA wal_autocheckpoint = 0")
    database.execute(f"PRAGMA synchronous = {'FULL' if durability == 'full' else 'NORMAL'}")
    database.execute("PRAGMA temp_store = MEMORY")
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the names of the files are durable too
    finally:
        os.close(directory)


def _row(lease: Lease, body: bytes) -> tuple[Any, ...]:
    return (lease.id, lease.service, lease.port, lease.protocol, lease.state != "ended", lease.created_at,
            lease.ended_at, body)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
