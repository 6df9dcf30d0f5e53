"""SqliteStore: leases and events in one SQLite file, one thread that writes and one that reads.

A commit is one transaction in one hop to the writing thread, synced before it returns where durability is `full`.
Readers see the newest commit and never wait for the writer (WAL: https://www.sqlite.org/wal.html). This module orders
the threads' work and bounds how long it is waited for; `reading` and `writing` have the SQL.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, TypeVar

import msgspec

from portd.adapters.sqlite import reading
from portd.adapters.sqlite.connection import Connection
from portd.adapters.sqlite.lock import LastRun, StateLock
from portd.adapters.sqlite.schema import prepare, wal_of
from portd.adapters.sqlite.writing import PRUNE_STEP, Durability, Writer, connect
from portd.core.errors import StateUnusable, StoreDamaged, StoreLost, StoreUnavailable
from portd.core.model import Event, Lease, Protocol
from portd.leasing.seams import Loaded

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")
OnCommit = Callable[[float, int], None]
"""Called after each commit, with its duration in seconds and its number of events."""

READ_TIMEOUT_S: Final = 2.0
"""Seconds that a caller waits for a query: a disk that hangs is answered as one that fails."""
REGAIN_S: Final = 0.5
"""Seconds between two tries to reserve space again on a full disk."""
BYTES_PER_PRUNE: Final = 64 << 20
"""Bytes of events after which pruning should not wait for its time."""


class History(NamedTuple):
    """Bounds of the ended leases on the disk, in bytes: in all, and for one user. None: no bound."""

    total_bytes: int | None = None
    user_bytes: int | None = None


class SqliteStore:
    """Implements `LeaseStore`. Made by `open`; `close` before the loop ends.

    `store_id` is the random id of the database, known after `load`; `notes` are sentences about what the start found.
    """

    def __init__(
        self,
        path: Path,
        durability: Durability,
        lock: StateLock,
        writing: Connection,
        reader: Connection,
        writer: Writer,
        history: History,
        notes: list[str],
    ) -> None:
        self._path = path
        self._durability = durability
        self._lock = lock
        self._writing = writing
        self._reading = reader
        self._writer = writer
        self._history = history
        self.store_id = ""
        self.notes = notes
        self._stuck: asyncio.Future[Any] | None = None
        self._on_commit: OnCommit = lambda seconds, count: None
        self._checkpointing: asyncio.Task[None] | None = None
        self._regaining: asyncio.Task[None] | None = None
        self._last_commit_s = 0.0

    @classmethod
    async def open(cls, path: Path, durability: Durability, history: History = History()) -> SqliteStore:  # noqa: B008
        """Open or make the database.

        Raises StateInUse when another daemon has it, StoreDamaged when it must not be touched, StateUnusable when the
        disk does not let portd use it; the message says which, and the way out.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = StateLock(path)
        except OSError as error:
            raise StateUnusable(
                f"{error.filename or path.parent} can't be used for the store: {error.strerror}; see [store] path"
            ) from error
        async with AsyncExitStack() as undo:
            undo.callback(lock.release)
            try:
                notes = _notes(path, lock.last_run)
                await asyncio.to_thread(prepare, path, was_used=bool(lock.last_run.store_id))
                writing = await Connection.open(partial(connect, path, durability))
                undo.push_async_callback(writing.close)
                # Opened last and closed last: while it is open the writer's closing runs no checkpoint.
                reader = await Connection.open(partial(reading.connect, path))
                undo.push_async_callback(reader.close)
                writer = Writer(path, lock)
                store = cls(path, durability, lock, writing, reader, writer, history, notes)
            except (sqlite3.Error, OSError) as error:
                raise StateUnusable(f"{path} can't be used for the store: {error}; no lease was changed") from error
            undo.pop_all()
        return store

    def subscribe(self, on_commit: OnCommit) -> None:
        """Have `on_commit` called after every commit."""
        self._on_commit = on_commit

    # --- the seam ---

    async def load(self) -> Loaded:
        """Read what the daemon starts from.

        Raises StoreDamaged when that can't be read or does not fit together; nothing is written then.
        """
        try:
            loaded = await self._read(reading.load)
        except (StoreUnavailable, StoreDamaged) as error:
            self._writer.fail_stop(str(error))
            raise StoreDamaged(
                f"{error}; nothing was changed. Restore a copy, or move {self._path} aside together "
                "with its -wal and -shm"
            ) from error
        self.store_id = loaded.store_id
        try:
            await self._writing.run(self._writer.start, loaded.revision)
        except StoreUnavailable as error:
            # Reads go on. Only an event that is reported and not written before a crash could have its revision again.
            logger.warning("starting on a store that accepts no writes: %s", error)
        else:
            self._lock.mark(self.store_id, is_open=True)
        return loaded

    async def commit(self, events: Sequence[Event]) -> None:
        """Write events and the leases that they leave, in one transaction."""
        started = time.perf_counter()
        await self._writing.run(self._writer.write, events)
        self._last_commit_s = time.perf_counter() - started
        self._on_commit(self._last_commit_s, len(events))
        if self._writer.is_short and (self._regaining is None or self._regaining.done()):
            self._regaining = asyncio.create_task(self._regain_reserve())
        self._checkpoint_if_due()

    async def lease(self, lease_id: str) -> Lease | None:
        """Read one lease, live or ended."""
        return await self._query(reading.lease, lease_id)

    async def history(
        self, port: int, *, protocol: Protocol | None = None, at: float | None = None, limit: int = 100
    ) -> list[Lease]:
        """Read who had the port, newest first; `at` (epoch seconds) asks for one moment."""
        return await self._query(reading.history, port, protocol, at, limit)

    async def ended(self, service: str | None = None, limit: int = 1000) -> list[Lease]:
        """Read ended leases, newest end first."""
        return await self._query(reading.ended, service, limit)

    async def prune(self, ended_before: float, events_kept: int) -> int:
        """Delete leases that ended before `ended_before` (epoch seconds) or exceed the bounds of the history, and all
        but the newest events (one always stays), PRUNE_STEP rows at a time; returns how many rows these were."""
        self._writer.unpruned_bytes = 0
        last, total = await self._read(reading.last_surplus_revision, events_kept), 0
        while gone := await self._delete(self._writer.delete_ended, ended_before):
            total += gone
        while gone := await self._delete(self._writer.delete_moved, ended_before):
            total += gone
        total += await self._prune_history()
        await self._writing.run(self._writer.set_pruned_to, last)
        surplus = [0]
        while surplus := await self._read(reading.surplus_events, surplus[-1], last):
            for start in range(0, len(surplus), PRUNE_STEP):
                total += await self._delete(self._writer.delete_events, surplus[start : start + PRUNE_STEP])
        return total

    async def close(self) -> None:
        """Finish the commits under way, checkpoint the log unless that is unsafe, let another daemon start.

        The log and its index stay behind, empty: with them a daemon can start, and read, on a full disk.
        """
        if self._regaining is not None:
            self._regaining.cancel()
        await self._writing.run(self._writer.checkpoint, "TRUNCATE")
        await self._writing.close()
        await self._reading.close()
        if self._writer.problem is None and self.store_id:
            self._lock.mark(self.store_id, is_open=False)
        self._lock.release()

    # --- condition ---

    def size_bytes(self) -> int:
        """Return the size of the database and its log."""
        return sum(self._writer.sizes)

    @property
    def wants_pruning(self) -> bool:
        """Return whether so much was written that pruning should not wait for its time."""
        return self._writer.unpruned_bytes >= BYTES_PER_PRUNE

    def condition(self) -> dict[str, Any]:
        """Describe the store for the status page; `problem` is None, or why it accepts no writes. Asks no disk."""
        size_bytes, wal_bytes = self._writer.sizes
        return {
            "id": self.store_id,
            "path": str(self._path),
            "durability": self._durability,
            "size_bytes": size_bytes,
            "wal_bytes": wal_bytes,
            "last_commit_ms": round(self._last_commit_s * 1000, 3),
            "problem": self._writer.problem,
        }

    # --- parts ---

    async def _prune_history(self) -> int:
        """Delete the oldest ended leases of every user beyond its bound, then of all; returns how many these were."""
        total = 0
        while over := self._over_bound(await self._read(reading.usage)):
            for delete in over:
                if not (gone := await self._delete(*delete)):
                    return total  # nothing is left to delete: the bound is smaller than one lease
                total += gone
        return total

    def _over_bound(self, usage: dict[int | None, int]) -> list[tuple[Any, ...]]:
        """List the deletions that bring the history a step closer to its bounds."""
        user_bytes, total_bytes = self._history.user_bytes, self._history.total_bytes
        steps: list[tuple[Any, ...]] = [
            (self._writer.delete_oldest_of_user, uid)
            for uid, size in usage.items()
            if user_bytes is not None and size > user_bytes
        ]
        if not steps and total_bytes is not None and sum(usage.values()) > total_bytes:
            steps.append((self._writer.delete_oldest,))
        return steps

    async def _delete(self, step: Callable[..., int], *which: Any) -> int:
        gone = await self._writing.run(step, *which)
        self._checkpoint_if_due()
        return gone

    def _checkpoint_if_due(self) -> None:
        """Queue a checkpoint behind the commit that made it due: its answer does not wait."""
        if self._writer.wants_checkpoint and (self._checkpointing is None or self._checkpointing.done()):
            self._checkpointing = asyncio.create_task(self._writing.run(self._writer.checkpoint))

    async def _regain_reserve(self) -> None:
        while not await self._writing.run(self._writer.regain_reserve):  # noqa: ASYNC110  # the disk notifies nobody
            await asyncio.sleep(REGAIN_S)

    async def _query(
        self, work: Callable[Concatenate[sqlite3.Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """Read for a caller who waits READ_TIMEOUT_S at most; while a query hangs others are refused at once."""
        refusal = f"{self._path} can't be read: the disk has not answered for {READ_TIMEOUT_S:g} s; try again later"
        if self._stuck is not None and not self._stuck.done():
            raise StoreUnavailable(refusal)
        query = asyncio.ensure_future(self._read(work, *args, **kwargs))
        query.add_done_callback(lambda late: late.cancelled() or late.exception())  # also where nobody waits any more
        done, _ = await asyncio.wait({query}, timeout=READ_TIMEOUT_S)
        if not done:
            self._stuck = query
            raise StoreUnavailable(refusal)
        return query.result()

    async def _read(
        self, work: Callable[Concatenate[sqlite3.Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        if self._writer.failure is not None:
            raise StoreLost(f"{self._path} is not trusted any more: {self._writer.failure}; start over from the disk")
        try:
            return await self._reading.run(work, *args, **kwargs)
        except (sqlite3.Error, msgspec.DecodeError) as error:
            if isinstance(error, sqlite3.Error):
                self._writer.report_damage(error)
            raise StoreUnavailable(f"{self._path} can't be read: {error}") from error


def _notes(path: Path, last: LastRun) -> list[str]:
    """Say what is not as the last run left it, a sentence each. To be called before the database is opened."""
    if not last.store_id:
        return []
    wal = wal_of(path)
    if not path.exists() and not wal.exists():
        return [f"the leases of store {last.store_id} are gone: {path} is missing, and an empty one was made"]
    if last.is_open and not (wal.exists() and wal.stat().st_size):
        return [f"{wal} is missing after a crash: grants and releases since the last checkpoint may be lost"]
    return []
