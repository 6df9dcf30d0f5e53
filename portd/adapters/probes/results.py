"""What every kind of check returns: a result and its reason, safe to show."""

from __future__ import annotations

from typing import Final, NamedTuple

from portd import __version__
from portd.core.health import Result

USER_AGENT: Final = f"portd/{__version__}"
NOTE_MAX_BYTES: Final = 4096
"""A note stands in every view and event of its lease: enough for the first page of an error, not for a whole one."""

_CONTROLS: Final = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
}


class CheckResult(NamedTuple):
    """One result, and the reason in a few words."""

    status: Result
    note: str


class ProbeFailed(Exception):
    """The check failed; the message is the note."""


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
