"""What all kinds of check have in common: where they go, and what they bring back."""

from __future__ import annotations

from typing import Final, NamedTuple

from portd import __version__
from portd.core.bindings import ANY, ANY_V4
from portd.core.health import Result
from portd.core.model import Lease

USER_AGENT: Final = f"portd/{__version__}"
NOTE_MAX_BYTES: Final = 4096
"""A note stands in every view and event of its lease: enough for the first page of an error, not for a whole one."""

_LOCAL: Final = {ANY_V4: "127.0.0.1", ANY: "::1"}
_CONTROLS: Final = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
}


class Finding(NamedTuple):
    """One result, and the reason in a few words."""

    result: Result
    note: str


class ProbeFailed(Exception):
    """The check failed; the message is the note."""


def target(lease: Lease) -> tuple[str, int]:
    """Return where the lease's owner is reached: its own address and port, and never elsewhere."""
    return _LOCAL.get(lease.address, lease.address), lease.port


def authority(lease: Lease) -> str:
    """Return the target as `host:port` (RFC 3986 section 3.2)."""
    host, port = target(lease)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def note(text: str | bytes) -> str:
    """Make a note of what a service or program said: cut at 4 KB, safe to print on a terminal."""
    data = text[:NOTE_MAX_BYTES] if isinstance(text, bytes) else text[:NOTE_MAX_BYTES].encode(errors="replace")
    clean = data.decode(errors="replace").translate(_CONTROLS).strip()
    return clean.encode()[:NOTE_MAX_BYTES].decode(errors="ignore")


def describe(error: BaseException) -> str:
    """Say what went wrong, in a few words."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "connection reset"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return note(str(reason))
