"""How portd logs: one line an event of interest, on stderr, in the form that its reader wants."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Literal

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))


class _Text(logging.Formatter):
    """Plain text for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")


class _Journal(logging.Formatter):
    """A line with its priority in front, as the journal reads it from stderr (sd-daemon(3)); it knows the time."""

    def format(self, record: logging.LogRecord) -> str:
        """Put the priority in front of every line."""
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class _Json(logging.Formatter):
    """One JSON object a line, with the fields that a record carries."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        entry = {"at": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name,
                 "message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up(level: Literal["debug", "info", "warning", "error"], form: Literal["auto", "text", "json"]) -> None:
    """Log to stderr; may be called again, and then replaces what was there."""
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_Json())
    elif form == "auto" and os.environ.get("JOURNAL_STREAM"):
        handler.setFormatter(_Journal())
    else:
        handler.setFormatter(_Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("aiosqlite", "asyncio", "aiohttp.access", "zeroconf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
