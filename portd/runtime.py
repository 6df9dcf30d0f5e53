"""The Python runtime of a long-lived server: its event loop and its garbage collector. Knows nothing of leases."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Coroutine
from typing import Any, Final

logger = logging.getLogger("portd")

GC_THRESHOLDS: Final = (10_000, 20, 20)
"""Thresholds of the three generations. Python's default (700, 10, 10) costs a twentieth of a grant's time, and most
objects are freed by their reference count."""


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on uvloop, or on asyncio's own loop (slower, with a warning) where uvloop is not installed."""
    try:
        import uvloop
    except ImportError as error:
        logger.warning("uvloop can't be loaded (%s): asyncio's slower event loop is used; pip install uvloop", error)
        asyncio.run(main)
    else:
        uvloop.run(main)


def tune_gc() -> None:
    """Freeze the objects of the start and collect less often. Call it once, when the start is complete."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
