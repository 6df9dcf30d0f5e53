"""Pruning: how often the store deletes old events and ended leases. The store finds what is old enough."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from portd.adapters.sqlite.store import SqliteStore
from portd.config import Store
from portd.core.errors import StoreUnavailable
from portd.core.table import LeaseTable
from portd.leasing.feed import EVENTS_KEPT
from portd.leasing.journal import Journal

POLL_S: Final = 10.0
POLLS_MAX: Final = 360
"""Polls between two rounds of pruning where little happens: an hour."""
PRUNE_EVENTS: Final = 10 * EVENTS_KEPT
"""Events after which a round starts early, about 50 MB: ten seconds of nothing but grants."""
DAY_S: Final = 86_400.0


async def prune_regularly(store: SqliteStore, journal: Journal, table: LeaseTable, settings: Store) -> None:
    """Prune the store for as long as the daemon runs."""
    while True:
        pruned_at = table.revision
        try:
            await store.prune(time.time() - settings.history_days * DAY_S, EVENTS_KEPT)
        except StoreUnavailable as error:
            journal.mark_unwritable(error.detail)
        for _ in range(POLLS_MAX):
            await asyncio.sleep(POLL_S)
            if store.wants_pruning or table.revision - pruned_at >= PRUNE_EVENTS:
                break
