"""Logging: one line for each event of interest, in the format of the reader, with fields to search by.

For the journal a record is sent by the journal's own protocol, so that `journalctl PORT=20000` finds it; elsewhere
lines go to stderr. A client's error is logged at info, portd's own at error. What other users choose (paths of
programs, notes of checks) can neither forge a line nor move a terminal's cursor: what is not printable is escaped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Literal

from portd.core.errors import Refusal
from portd.core.model import Event, EventType, Lease, Owner

JOURNAL: Final = "/run/systemd/journal/socket"
MESSAGE_MAX_CHARS: Final = 16_384
"""What is kept of a message: a datagram must fit into the socket's buffer."""

LINES_PER_S: Final = 300
"""Lines about leases, and about refusals, in a second. The journal drops all that a service writes past 10,000 in 30 s,
its errors too (RateLimitBurst=, journald.conf(5)); and a line costs 25 µs of the loop, with up to 10,000 grants/s."""
LOGGED_REFUSALS: Final = frozenset(
    {
        "unauthenticated",
        "not_owner",
        "forbidden_origin",
        "service_taken",
        "lease_differs",
        "port_taken",
        "port_reserved",
        "no_clock",
        "not_declinable",
    }
)
"""Refusals that are logged: 401, 403 and 409. What is merely malformed, or comes too often, is the client's to see."""

logger = logging.getLogger("portd.leases")

_LEVELS: Final[dict[EventType, int]] = {
    "conflict": logging.WARNING,
    "updated": logging.DEBUG,
    "announced": logging.DEBUG,
}

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))


class _Clean(logging.Formatter):
    """Escapes what is not printable: in the message all of it, in a traceback all but its line breaks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        """Return the line without anything that is not printable."""
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return the traceback, line by line without anything that is not printable."""
        return "\n".join(escaped(line) for line in super().formatException(ei).split("\n"))


class _Text(_Clean):
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
        self.setFormatter(_Clean("%(message)s"))
        self._lines = _Prefixed()

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; where the journal does not accept it, write it to stderr, which leads there too."""
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


class _Prefixed(_Clean):
    """A line with its priority in front, as the journal reads it from stderr (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record with its priority in front of every line."""
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
        return escaped(json.dumps(entry, ensure_ascii=False))


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


class RateLimit:
    """Lets LINES_PER_S lines a second through, and logs how many others each user had."""

    def __init__(self) -> None:
        self._line_count = 0
        self._left_out: Counter[tuple[str, str]] = Counter()

    def allows(self, kind: str, user: Callable[[], str]) -> bool:
        """Return whether one more line may be written in this second; else count it under its kind and user."""
        if not self._line_count:
            asyncio.get_running_loop().call_later(1.0, self._end_second)
        self._line_count += 1
        if self._line_count <= LINES_PER_S:
            return True
        self._left_out[kind, user()] += 1
        return False

    def _end_second(self) -> None:
        self._line_count = 0
        if self._left_out:
            counts = ", ".join(f"{count} {kind} ({user})" for (kind, user), count in self._left_out.most_common(10))
            logger.info("rate limited: not logged in the last second: %s", counts)
            self._left_out.clear()


class LeaseLog:
    """Logs the events of leases, a line each, within the rate limit.

    A conflict is always logged. What only changes how a lease is found (its tags, its announcement) is logged at debug.
    """

    def __init__(self) -> None:
        self._limit = RateLimit()
        self._never_bound: set[str] = set()
        """Live leases, by id, that were granted since the start and that no owner has listened on yet."""

    def apply(self, event: Event) -> None:
        """Log one event; a watcher of the journal."""
        level = _LEVELS.get(event.type, logging.INFO)
        lease = event.lease
        was_never_bound = lease.id in self._never_bound
        if event.type == "granted" and lease.state == "held":
            self._never_bound.add(lease.id)
        elif was_never_bound and (lease.listening or lease.state == "ended"):
            self._never_bound.discard(lease.id)
        if not logger.isEnabledFor(level):
            return
        if level == logging.INFO and not self._limit.allows(event.type, lambda: _user(lease)):
            return
        owner = lease.owner
        fields = {
            "lease": lease.id,
            "service": lease.service,
            "instance": lease.instance,
            "endpoint": lease.endpoint,
            "port": lease.port,
            "event": event.type,
            "uid": lease.uid,
            "user": lease.user,
            "pid": owner.pid,
        }
        logger.log(
            level,
            "%s (%s) on port %d: %s; %s",
            lease.instance,
            lease.endpoint,
            lease.port,
            _described(event) + (_bind_hint(event) if was_never_bound else ""),
            _whose(lease),
            extra={"fields": fields},
        )


class RefusalLog:
    """Logs refused requests that show an attempt on what is another's: 401, 403 and 409, within the rate limit."""

    def __init__(self) -> None:
        self._limit = RateLimit()

    def record(self, refusal: Refusal, uid: int | None, pid: int | None) -> None:
        """Log one refusal of a caller, None where it is not known."""
        if refusal.code not in LOGGED_REFUSALS:
            return
        caller = f"uid {uid}" if uid is not None else "an unknown caller"
        if self._limit.allows(refusal.code, lambda: caller):
            logger.info(
                "refused %s (pid %s): %s: %s",
                caller,
                pid if pid is not None else "unknown",
                refusal.code,
                refusal.detail,
                extra={"fields": {"event": "refused", "code": refusal.code, "uid": uid, "pid": pid}},
            )


def escaped(text: str) -> str:
    """Replace every character that is not printable (control, bidirectional, unassigned) by its escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    """Write a character as JSON does: UTF-16 code units, each in four hexadecimal digits."""
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _described(event: Event) -> str:
    """Describe an event in a few words."""
    lease = event.lease
    if event.type == "granted":
        return f"leased for {lease.ttl:g} s" if lease.ttl is not None else f"leased to {_named(lease.owner)}"
    if event.type == "conflict":
        return f"listened on by a foreign process, {_named(lease.foreign)}"
    if event.type == "health":
        return f"{lease.health}: {lease.health_note}" if lease.health_note else lease.health
    return {
        "bound": "its owner listens",
        "unbound": "its owner stopped listening",
        "declined": "leased instead of a port that a foreign process has",
        "passed": f"passed from {_named(lease.passed_from)} to {_named(lease.owner)}",
        "ended": f"ended: {lease.ended_because}",
    }.get(event.type, event.type)


def _bind_hint(event: Event) -> str:
    """Explain the end of a lease that was never listened on: its own hold may have kept its owner from binding."""
    lease = event.lease
    may_have_failed = event.type == "ended" and lease.ended_because == "owner_exited" and lease.hold == "shared"
    if not may_have_failed or lease.protocol == "udp":
        return ""
    return " without having listened (if it reported 'address in use': --hold none or --socket)"


def _whose(lease: Lease) -> str:
    pid = lease.owner.pid if lease.owner.pid is not None else "unknown"
    return f"{_user(lease)}, pid {pid}"


def _user(lease: Lease) -> str:
    """Name the user of a lease: uid and name as at the grant, or the token."""
    if lease.uid is None:
        return str(lease.user or "a token of its own")
    name = lease.owner.user if lease.owner.uid == lease.uid else None
    return f"uid {lease.uid} ({name})" if name else f"uid {lease.uid}"


def _named(owner: Owner | None) -> str:
    """Name a process, as far as it is known."""
    if owner is None or owner.pid is None:
        return "an unknown process"
    return f"pid {owner.pid} ({owner.exe})" if owner.exe else f"pid {owner.pid}"


def _priority(record: logging.LogRecord) -> int:
    """Return a record's priority by syslog(3)."""
    return next((number for level, number in _PRIORITIES if record.levelno >= level), 7)


def _journal_field(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
