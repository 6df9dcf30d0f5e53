"""How portd logs: one line an event of interest, in the form that its reader wants, with fields to search by.

For the journal a record is sent by the journal's own protocol, so that `journalctl PORT=20000` finds it; elsewhere
lines go to stderr. A client's fault is told at info, ours at error.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from collections import Counter
from typing import Final, Literal

from portd.core.model import Event, EventType, Owner

JOURNAL: Final = "/run/systemd/journal/socket"
MESSAGE_MAX_CHARS: Final = 16_384
"""What is kept of a message: a datagram must fit into the socket's buffer."""

LINES_PER_S: Final = 300
"""Lines of leases in a second. The journal drops all that a service writes past 10,000 in 30 s, its errors too
(RateLimitBurst=, journald.conf(5)); and a line costs 25 µs of the loop, where there may be 10,000 grants."""

logger = logging.getLogger("portd.leases")

_LEVELS: Final[dict[EventType, int]] = {
    "conflict": logging.WARNING,
    "updated": logging.DEBUG,
    "announced": logging.DEBUG,
}

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
        # A burst must fit while the journal is busy: as much as sd_journal_sendv() asks for, which the kernel may cut.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        self.setFormatter(logging.Formatter("%(message)s"))
        self._lines = _Prefixed()

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; where the journal does not take it, stderr does, which leads there too."""
        fields = {
            "MESSAGE": self.format(record)[:MESSAGE_MAX_CHARS],
            "PRIORITY": _priority(record),
            "SYSLOG_IDENTIFIER": "portd",
            "LOGGER": record.name,
            **{name.upper(): value for name, value in getattr(record, "fields", {}).items()},
        }
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
        entry = {
            "at": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
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


class LeaseLog:
    """Logs what happens to leases, a line an event, `LINES_PER_S` a second at the most: of the rest the number is told.

    A conflict is always told. What only changes how a lease is found (its tags, its announcement) is told at debug.
    """

    def __init__(self) -> None:
        self._line_count = 0
        self._untold: Counter[str] = Counter()

    def apply(self, event: Event) -> None:
        """Log one event; a watcher of the journal."""
        level = _LEVELS.get(event.type, logging.INFO)
        if logger.isEnabledFor(level) and (level != logging.INFO or self._may_tell(event.type)):
            lease = event.lease
            fields = {
                "lease": lease.id,
                "service": lease.service,
                "instance": lease.instance,
                "endpoint": lease.endpoint,
                "port": lease.port,
                "event": event.type,
            }
            logger.log(
                level,
                "%s (%s) on port %d: %s",
                lease.instance,
                lease.endpoint,
                lease.port,
                _told(event),
                extra={"fields": fields},
            )

    def _may_tell(self, kind: str) -> bool:
        if not self._line_count:
            asyncio.get_running_loop().call_later(1.0, self._tell_rest)
        self._line_count += 1
        if self._line_count <= LINES_PER_S:
            return True
        self._untold[kind] += 1
        return False

    def _tell_rest(self) -> None:
        """End a second."""
        self._line_count = 0
        if self._untold:
            logger.info(
                "too much at once to tell singly: %s more in this second",
                ", ".join(f"{count} {kind}" for kind, count in self._untold.most_common()),
            )
            self._untold.clear()


def _told(event: Event) -> str:
    """Say what has happened."""
    lease = event.lease
    if event.type == "granted":
        return f"leased for {lease.ttl:g} s" if lease.ttl is not None else f"leased to {_named(lease.owner)}"
    if event.type == "conflict":
        return f"listened on by a foreign process, {_named(lease.foreign)}"
    if event.type == "health":
        return f"{lease.health}: {lease.health_note}" if lease.health_note else lease.health
    return {
        "bound": "its owner listens",
        "unbound": "its owner does not listen any more",
        "declined": "leased in place of a port that somebody else had",
        "ended": f"ended: {lease.ended_because}",
    }.get(event.type, event.type)


def _named(owner: Owner | None) -> str:
    """Name a process, as far as it is known."""
    if owner is None or owner.pid is None:
        return "a process that is not known"
    return f"pid {owner.pid} ({owner.exe})" if owner.exe else f"pid {owner.pid}"


def _priority(record: logging.LogRecord) -> int:
    """Return a record's priority by syslog(3)."""
    return next((number for level, number in _PRIORITIES if record.levelno >= level), 7)


def _journal_field(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
