"""How portd logs: one line an event of interest, in the form that its reader wants, with fields to search by.

For the journal a record is sent by the journal's own protocol, so that `journalctl PORT=20000` finds it; elsewhere
lines go to stderr. A client's fault is told at info, ours at error.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from typing import Any, Final, Literal

from portd.core.model import Event

JOURNAL: Final = "/run/systemd/journal/socket"
MESSAGE_MAX_CHARS: Final = 16_384
"""What is kept of a message: a datagram must fit into the socket's buffer."""

logger = logging.getLogger("portd.leases")

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))


class _Text(logging.Formatter):
    """Plain text for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")


class _Journal(logging.Handler):
    """Sends records to the journal with their fields (systemd.io/JOURNAL_NATIVE_PROTOCOL); it knows time and unit."""

    def __init__(self) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self.setFormatter(logging.Formatter("%(message)s"))
        self._lines = _Prefixed()

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; where the journal does not take it, stderr does, which leads there too."""
        fields = {"MESSAGE": self.format(record)[:MESSAGE_MAX_CHARS], "PRIORITY": _priority(record),
                  "SYSLOG_IDENTIFIER": "portd", "LOGGER": record.name,
                  **{name.upper(): value for name, value in getattr(record, "fields", {}).items()}}
        try:
            self._socket.sendto(b"".join(_journal_field(name, str(value)) for name, value in fields.items()), JOURNAL)
        except OSError:
            print(self._lines.format(record), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


class _Prefixed(logging.Formatter):
    """A line with its priority in front, as the journal reads it from stderr (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        """Put the priority in front of every line."""
        return "\n".join(f"<{_priority(record)}>{line}" for line in super().format(record).splitlines())


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
    """Log to the journal or to stderr; may be called again, and then replaces what was there."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_Json())
    elif form == "auto" and os.environ.get("JOURNAL_STREAM"):
        handler = _Journal()
    else:
        handler.setFormatter(_Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("aiosqlite", "asyncio", "aiohttp.access", "zeroconf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_event(event: Event) -> None:
    """Log what has happened to a lease: what people look for at info, what is every lease's way at debug."""
    lease = event.lease
    level = logging.DEBUG
    text: str = event.type
    if event.type == "conflict":
        stranger = lease.stranger
        level = logging.WARNING
        text = f"listened on by a stranger, pid {stranger and stranger.pid}, {stranger and stranger.exe}"
    elif event.type == "health":
        level, text = logging.INFO, f"{lease.health}: {lease.health_note}" if lease.health_note else lease.health
    elif event.type == "declined":
        level, text = logging.INFO, "leased in place of a port that somebody else had"
    elif event.type == "ended":
        text = f"ended: {lease.ended_because}"
        if lease.ended_because in {"expired", "revoked", "host_rebooted"}:
            level = logging.INFO
    if logger.isEnabledFor(level):
        fields: dict[str, Any] = {"lease": lease.id, "service": lease.service, "instance": lease.instance,
                                  "endpoint": lease.endpoint, "port": lease.port, "event": event.type}
        logger.log(level, "%s (%s) on port %d: %s", lease.instance, lease.endpoint, lease.port, text,
                   extra={"fields": fields})


def _priority(record: logging.LogRecord) -> int:
    """Return a record's priority by syslog(3)."""
    return next((number for level, number in _PRIORITIES if record.levelno >= level), 7)


def _journal_field(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
