"""A SQLite connection in a thread of its own (aiosqlite's), for functions that run whole in it. Knows no SQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import aiosqlite

P = ParamSpec("P")
Result = TypeVar("Result")


class Connection:
    """A connection that is lent to one function after the other. Made by `open`; `close` before the loop ends."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._thread = aiosqlite.Connection(self._connected, iter_chunk_size=1)

    @classmethod
    async def open(cls, connect: Callable[[], sqlite3.Connection]) -> Connection:
        """Start the thread and have `connect` called in it; raises what that raises."""
        connection = cls(connect)
        await connection._thread
        return connection

    async def run(
        self, work: Callable[Concatenate[sqlite3.Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """Run a function in the thread, after all that came before it: one hop, where aiosqlite's public methods cost
        one a statement.

        A cancelled caller gives up the waiting, not the work: it is in the thread's queue before the first await.
        """
        # The one private name of aiosqlite that portd uses (0.22, pinned in pyproject.toml; a test fails when it goes).
        result: Result = await self._thread._execute(  # type: ignore[no-untyped-call]  # noqa: SLF001
            work, self._database, *args, **kwargs
        )
        return result

    async def close(self) -> None:
        """Close the connection after all that came before, and end the thread."""
        await self._thread.close()

    def _connected(self) -> sqlite3.Connection:
        self._database = self._connect()
        return self._database
