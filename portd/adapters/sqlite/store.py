"""SqliteStore: leases and events in one SQLite file, one thread that writes and one that reads.

A commit is one transaction in one hop to the writing thread, synced before it returns where durability is `full`.
Readers see the newest commit and never wait for the writer (WAL: https://www.sqlite.org/wal.html). This module orders
the threads' work; SQL is next door.
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
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from portd.adapters.sqlite import reading
from portd.adapters.sqlite.connection import Connection
from portd.adapters.sqlite.lock import StateLock
from portd.adapters.sqlite.schema import prepare, wal_of
from portd.adapters.sqlite.writing import PRUNE_STEP, Durability, Writer, connect
from portd.core.errors import StoreDamaged, StoreLost, StoreUnavailable
from portd.core.model import Event, Lease, Protocol
from portd.leasing.seams import Loaded

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")
OnCommit = Callable[[float, int], None]
"""Called after each commit, with its duration in seconds and its number of events."""


class SqliteStore:
    """Implements `LeaseStore`. Made by `open`; `close` before the loop ends."""

    def __init__(
        self,
        path: Path,
        durability: Durability,
        lock: StateLock,
        writing: Connection,
        reader: Connection,
        writer: Writer,
    ) -> None:
        self._path = path
        self._durability = durability
        self._lock = lock
        self._writing = writing
        self._reading = reader
        self._writer = writer
        self._on_commit: OnCommit = lambda seconds, count: None
        self._folding: asyncio.Task[None] | None = None
        self._last_commit_s = 0.0

    @classmethod
    async def open(cls, path: Path, durability: Durability) -> SqliteStore:
        """Open or make the database.

        Raises StateInUse when another daemon has it, StoreDamaged when it may not be touched or the disk does not let
        portd use it; the message says which, and the way out.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = StateLock(path)
        except OSError as error:
            raise StoreDamaged(
                f"{path.parent} can't be used for the store: {error.strerror}; see [store] path"
            ) from error
        async with AsyncExitStack() as undo:
            undo.callback(lock.release)
            try:
                await asyncio.to_thread(prepare, path)
                writing = await Connection.open(partial(connect, path, durability))
                undo.push_async_callback(writing.close)
                # Opened last and closed last: while it is there the writer's closing can't fold, so `close` decides.
                reader = await Connection.open(partial(reading.connect, path))
                undo.push_async_callback(reader.close)
                store = cls(path, durability, lock, writing, reader, Writer(path))
            except (sqlite3.Error, OSError) as error:
                raise StoreDamaged(f"{path} can't be used for the store: {error}; no lease was changed") from error
            undo.pop_all()
        return store

    def subscribe(self, on_commit: OnCommit) -> None:
        """Have `on_commit` called after every commit."""
        self._on_commit = on_commit

    # --- the seam ---

    async def load(self) -> Loaded:
        """Read what the daemon starts from.

        Raises StoreDamaged when that can't be read or does not fit together; the store is then sealed.
        """
        try:
            loaded = await self._read(reading.load)
        except (StoreUnavailable, StoreDamaged) as error:
            self._writer.seal(str(error))
            raise StoreDamaged(
                f"{error}; nothing was changed. Restore a copy, or move {self._path} aside together "
                "with its -wal and -shm"
            ) from error
        try:
            await self._writing.run(self._writer.reserve, loaded.revision)
        except StoreUnavailable as error:
            # Reads go on. Only what is told and not written before a crash could have its revision given again.
            logger.warning("starting on a store that takes no writes: %s", error)
        return loaded

    async def commit(self, events: Sequence[Event]) -> None:
        """Write events and the leases that they leave, in one transaction."""
        started = time.perf_counter()
        await self._writing.run(self._writer.write, events)
        self._last_commit_s = time.perf_counter() - started
        self._on_commit(self._last_commit_s, len(events))
        self._fold_if_worth_it()

    async def lease(self, lease_id: str) -> Lease | None:
        """Read one lease, live or ended."""
        return await self._read(reading.lease, lease_id)

    async def history(
        self, port: int, *, protocol: Protocol | None = None, at: float | None = None, limit: int = 100
    ) -> list[Lease]:
        """Read who had the port, newest first; `at` (epoch seconds) asks for one moment."""
        return await self._read(reading.history, port, protocol, at, limit)

    async def ended(self, service: str | None = None, limit: int = 1000) -> list[Lease]:
        """Read ended leases, newest end first."""
        return await self._read(reading.ended, service, limit)

    async def prune(self, ended_before: float, events_kept: int) -> int:
        """Forget leases that ended before `ended_before` (epoch seconds) and all but the newest events (one always
        stays), a step of PRUNE_STEP rows at a time; returns how many rows went."""
        last, total = await self._read(reading.last_surplus_revision, events_kept), 0
        while gone := await self._forget(self._writer.forget_ended, ended_before):
            total += gone
        await self._writing.run(self._writer.end_news, last)
        surplus = [0]
        while surplus := await self._read(reading.surplus_events, surplus[-1], last):
            for start in range(0, len(surplus), PRUNE_STEP):
                total += await self._forget(self._writer.forget_events, surplus[start : start + PRUNE_STEP])
        return total

    async def close(self) -> None:
        """Finish what is under way, fold the log into the database unless it is sealed, let another daemon start.

        The log and its index stay behind, empty: with them a daemon can start, and read, on a full disk.
        """
        await self._writing.run(self._writer.fold, "TRUNCATE")
        await self._writing.close()
        await self._reading.close()
        self._writer.release()
        self._lock.release()

    # --- condition ---

    def size_bytes(self) -> int:
        """Return what the database and its log take on the disk."""
        return _size(self._path) + _size(wal_of(self._path))

    def condition(self) -> dict[str, Any]:
        """Describe the store for the status page; `problem` is None, or what stands against writing."""
        return {
            "path": str(self._path),
            "durability": self._durability,
            "size_bytes": _size(self._path),
            "wal_bytes": _size(wal_of(self._path)),
            "last_commit_ms": round(self._last_commit_s * 1000, 3),
            "problem": self._writer.problem,
        }

    # --- parts ---

    async def _forget(self, step: Callable[[sqlite3.Connection, Any], int], which: Any) -> int:
        gone = await self._writing.run(step, which)
        self._fold_if_worth_it()
        return gone

    def _fold_if_worth_it(self) -> None:
        """Queue the folding behind the commit that made it worth it: its answer does not wait."""
        if self._writer.wants_fold and (self._folding is None or self._folding.done()):
            self._folding = asyncio.create_task(self._writing.run(self._writer.fold))

    async def _read(
        self, work: Callable[Concatenate[sqlite3.Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        if self._writer.sealed is not None:
            raise StoreLost(f"{self._path} is not trusted any more: {self._writer.sealed}; start over from the disk")
        try:
            return await self._reading.run(work, *args, **kwargs)
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise StoreUnavailable(f"{self._path} can't be read: {error}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
