"""The Python runtime of a long-lived server: its event loop and its garbage collector. Knows nothing of leases."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Any, Final

from portd.core import failpoints

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


def arm_failpoints(text: str) -> None:
    """Arm what PORTD_FAILPOINTS says: `NAME=ACTION:COUNT`, comma separated; for tests alone.

    The COUNT-th pass of the step runs the action: `kill` ends the process as a crash does, `fail` raises OSError (EIO).
    Raises ValueError for what is no failpoint.
    """
    for item in filter(None, text.split(",")):
        name, _, action = item.partition("=")
        kind, _, count = action.partition(":")
        if kind not in ("kill", "fail"):
            raise ValueError(f"{item!r} is not NAME=kill:COUNT or NAME=fail:COUNT")
        failpoints.arm(name, partial(_act, kind, iter(range(int(count or 1) - 1, -1, -1))))


def _act(kind: str, left: Iterator[int]) -> None:
    if next(left, -1) != 0:
        return
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.EIO, "a failpoint")


def tune_gc() -> None:
    """Freeze the objects of the start and collect less often. Call it once, when the start is complete."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
