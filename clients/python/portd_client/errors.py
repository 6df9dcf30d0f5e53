"""Everything that the client raises on purpose. `Problem` is the daemon's answer; the rest is about reaching it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class PortdError(Exception):
    """The root of all errors that this package raises."""


class InvalidUrl(PortdError, ValueError):
    """PORTD_URL, or the `url` of a client, is no URL of a daemon."""


class DaemonUnavailable(PortdError):
    """No daemon answers. `tried` lists (url, reason) pairs, in the order in which they were tried."""

    def __init__(self, tried: Sequence[tuple[str, str]]) -> None:
        self.tried = tuple(tried)
        places = ", ".join(f"{url} ({reason})" for url, reason in self.tried)
        super().__init__(
            f"no portd answers at {places}; start one with 'portd serve --user', or name a running one in PORTD_URL"
        )


class NoAnswerInTime(DaemonUnavailable):
    """A daemon is there, and does not answer. Whether it did what was requested is unknown."""

    def __init__(self, url: str, limit_s: float) -> None:
        super().__init__([(url, f"no answer within {limit_s:g} s")])


class ProtocolError(PortdError):
    """What answered does not speak the protocol: cut off in the middle, or something else listens there."""


class NoInstances(PortdError):
    """No instance of the service serves now, or fewer than were waited for."""


class Problem(PortdError):
    """The daemon's refusal (RFC 9457).

    `code` is stable. `pointer` (RFC 6901) names the field at fault or is None; `within` is "query" where it points into
    the query, else None. `document` is all of it.
    """

    def __init__(self, document: dict[str, Any], status: int) -> None:
        self.document = document
        self.status = status
        self.code: str = str(document.get("code", "unknown"))
        self.detail: str = str(document.get("detail") or document.get("title") or f"HTTP status {status}")
        self.pointer: str | None = document.get("pointer")
        self.within: str | None = document.get("in")
        super().__init__(f"{self.detail} ({self.code})")


class PortTaken(Problem):
    """Somebody else has exactly the port that was asked for."""


class LeaseLost(Problem):
    """There is no such lease (any more): it ended, or the daemon lost it."""


class NotOwner(Problem):
    """The lease belongs to somebody else."""


class PoolExhausted(Problem):
    """The pool has no free port."""


class Retryable(Problem):
    """The server is busy, or its store accepts no writes: nothing has changed, and the same call may succeed later."""


_CLASSES: dict[str, type[Problem]] = {
    "port_taken": PortTaken,
    "port_reserved": PortTaken,
    "not_found": LeaseLost,
    "lease_ended": LeaseLost,
    "not_owner": NotOwner,
    "pool_exhausted": PoolExhausted,
    "busy": Retryable,
    "store_unavailable": Retryable,
}


def problem(document: dict[str, Any], status: int) -> Problem:
    """Make the exception that belongs to a problem document; a code that is not known here makes a plain Problem."""
    return _CLASSES.get(str(document.get("code")), Problem)(document, status)
