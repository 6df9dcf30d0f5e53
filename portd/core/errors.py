"""Everything that can be refused, as exceptions with stable codes.

`Refusal` is theirs: the caller can do something about it, and it becomes a problem document. `Fault` is ours: the
daemon can't go on, and says so to its operator. This module must not know HTTP: codes are mapped to statuses elsewhere.
"""

from __future__ import annotations

from typing import ClassVar


class PortdError(Exception):
    """The root of all errors that portd raises on purpose."""


class Refusal(PortdError):
    """A request that is answered with a problem. `detail` says what failed, for which port and owner, and what to do.

    `pointer` is a JSON pointer (RFC 6901) to the field at fault, where one is.
    """

    code: ClassVar[str]

    def __init__(self, detail: str, *, pointer: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer


class InvalidRequest(Refusal):
    code = "invalid_request"


class Unauthenticated(Refusal):
    code = "unauthenticated"


class NotOwner(Refusal):
    code = "not_owner"


class ForbiddenOrigin(Refusal):
    code = "forbidden_origin"


class NotFound(Refusal):
    code = "not_found"


class PortTaken(Refusal):
    code = "port_taken"


class PortReserved(Refusal):
    code = "port_reserved"


class NoClock(Refusal):
    code = "no_clock"


class NotDeclinable(Refusal):
    code = "not_declinable"


class LeaseEnded(Refusal):
    code = "lease_ended"


class RevisionGone(Refusal):
    code = "revision_gone"


class TooLarge(Refusal):
    code = "too_large"


class OtherNetwork(Refusal):
    code = "other_network"


class AnnounceUnreachable(Refusal):
    code = "announce_unreachable"


class QuotaExceeded(Refusal):
    code = "quota_exceeded"


class PoolExhausted(Refusal):
    code = "pool_exhausted"


FILE_LIMIT = "portd is at its file limit: raise LimitNOFILE of its unit (see 'portd doctor')"


class Busy(Refusal):
    """Too much at once: the same request may succeed after `retry_after` seconds."""

    code = "busy"

    def __init__(self, detail: str, *, retry_after: int = 1) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class StoreUnavailable(Refusal):
    """The store wrote nothing, surely: a full disk, a read-only or locked file. Nothing has changed."""

    code = "store_unavailable"


class Fault(PortdError):
    """Ours: the daemon must stop, and its operator must know. The message says the way out."""


class StoreLost(Fault):
    """Nobody knows whether a commit reached the disk: stop, and recover from what the disk says."""


class StoreDamaged(Fault):
    """The database is not what it should be (damaged, newer, not ours). It was left exactly as it is."""


class StateUnusable(Fault):
    """A directory, file or socket that the daemon needs can't be made or written; nothing was changed."""


class StateInUse(Fault):
    """Another daemon, or another program, has this state directory, socket or port."""


class ConfigError(Fault):
    """The configuration can't be used; the message names the file, the place in it, and the rule it breaks."""
