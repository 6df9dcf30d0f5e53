"""Everything that portd refuses or fails at, as exceptions; refusals have stable codes.

A `Refusal` is the caller's to act on and becomes a problem document. A `Fault` is portd's own: the daemon can't go on
and reports it to its operator. This module must not know HTTP: `adapters/http/problems.py` maps codes to statuses.
"""

from __future__ import annotations

from typing import ClassVar

from portd.core.bindings import Binding


class PortdError(Exception):
    """The root of all errors that portd raises on purpose."""


class Refusal(PortdError):
    """A request that is answered with a problem document.

    `detail` says what failed, on which value, and what to do. `pointer` is a JSON pointer (RFC 6901) to the field at
    fault, None where no single field is. `retry_after_s` is the number of seconds after which the same request may
    succeed, None where that time is unknown.
    """

    code: ClassVar[str]

    def __init__(self, detail: str, *, pointer: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer
        self.retry_after_s = retry_after_s


class InvalidRequest(Refusal):
    """A field or parameter of the request breaks a rule."""

    code = "invalid_request"


class Unauthenticated(Refusal):
    """The caller is anonymous, and the request needs one who is known."""

    code = "unauthenticated"


class NotOwner(Refusal):
    """The lease is another user's."""

    code = "not_owner"


class ServiceTaken(Refusal):
    """The service name is another user's."""

    code = "service_taken"


class LeaseDiffers(Refusal):
    """The same owner's lease exists already, and the request differs from it in a field that can't be replaced."""

    code = "lease_differs"


class ForbiddenOrigin(Refusal):
    """A browser page of another origin could have sent the request, or its Host is no name of this daemon."""

    code = "forbidden_origin"


class NotFound(Refusal):
    """There is no such lease or path."""

    code = "not_found"


class PortTaken(Refusal):
    """Another process has the port, or another owner has the instance.

    `foreign` is the binding of a process without a lease; None for any other cause.
    """

    code = "port_taken"

    def __init__(
        self,
        detail: str,
        *,
        pointer: str | None = None,
        retry_after_s: float | None = None,
        foreign: Binding | None = None,
    ) -> None:
        super().__init__(detail, pointer=pointer, retry_after_s=retry_after_s)
        self.foreign = foreign


class PortReserved(Refusal):
    """The port is another service's static port, or privileged."""

    code = "port_reserved"


class NoClock(Refusal):
    """The lease lasts as long as its process: there is nothing to renew."""

    code = "no_clock"


class NotDeclinable(Refusal):
    """The lease is for exactly this port and can't move."""

    code = "not_declinable"


class LeaseEnded(Refusal):
    """The lease has ended."""

    code = "lease_ended"


class RevisionGone(Refusal):
    """The events after this revision are no longer kept, or the revision is of another store."""

    code = "revision_gone"


class TooLarge(Refusal):
    """The request exceeds a bound in bytes."""

    code = "too_large"


class OtherNetwork(Refusal):
    """The process is in another network namespace."""

    code = "other_network"


class AnnounceUnreachable(Refusal):
    """Hosts of the LAN can't reach the lease's address."""

    code = "announce_unreachable"


class QuotaExceeded(Refusal):
    """The user has as many leases as one user may have."""

    code = "quota_exceeded"


class PoolExhausted(Refusal):
    """No port of the pool is free."""

    code = "pool_exhausted"


FILE_LIMIT = "portd is at its file limit: raise LimitNOFILE of its unit (see 'portd doctor')"


class Busy(Refusal):
    """A bound on concurrent work is reached: the same request may succeed after `retry_after_s` seconds."""

    code = "busy"

    def __init__(self, detail: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)


class StoreUnavailable(Refusal):
    """The store wrote nothing, for certain: a full disk, a read-only or locked file. Nothing has changed."""

    code = "store_unavailable"


class Fault(PortdError):
    """A fault of portd's own: the daemon must stop. The message tells the operator what to do."""


class StoreLost(Fault):
    """Whether a commit reached the disk is unknown: stop, and recover from the disk."""


class StoreDamaged(Fault):
    """The database is damaged, newer than this portd, or not portd's. It was left exactly as it is."""


class StateUnusable(Fault):
    """A directory, file or socket that the daemon needs can't be made or written; nothing was changed."""


class StateInUse(Fault):
    """Another daemon, or another program, has this state directory, socket or port."""


class ConfigError(Fault):
    """The configuration can't be used; the message names the file, the place in it, and the rule it breaks."""
