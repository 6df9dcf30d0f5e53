"""Stores that are closed whatever a test finds: the thread of one left open would keep the process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from portd.adapters.sqlite.store import History, OnCommit, SqliteStore
from portd.adapters.sqlite.writing import Durability


@asynccontextmanager
async def opened(
    path: Path,
    durability: Durability = "full",
    on_commit: OnCommit = lambda seconds, count: None,
    history: History = History(),  # noqa: B008
) -> AsyncIterator[SqliteStore]:
    """Open the store, and close it."""
    store = await SqliteStore.open(path, durability, history)
    store.subscribe(on_commit)
    try:
        yield store
    finally:
        await store.close()
