"""Refusals as problem documents (RFC 9457): the only place where codes meet HTTP statuses, titles and headers."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from portd.core.errors import InvalidRequest, Refusal

PROBLEM_TYPE: Final = "application/problem+json"

STATUS: Final[dict[str, int]] = {
    "invalid_request": 400,
    "unauthenticated": 401,
    "not_owner": 403,
    "forbidden_origin": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "port_taken": 409,
    "service_taken": 409,
    "lease_differs": 409,
    "port_reserved": 409,
    "no_clock": 409,
    "not_declinable": 409,
    "lease_ended": 410,
    "revision_gone": 410,
    "too_large": 413,
    "unsupported_media_type": 415,
    "other_network": 422,
    "announce_unreachable": 422,
    "quota_exceeded": 429,
    "internal_error": 500,
    "pool_exhausted": 503,
    "busy": 503,
    "store_unavailable": 503,
}

TITLE: Final[dict[str, str]] = {
    "invalid_request": "Invalid request",
    "unauthenticated": "Authentication required",
    "not_owner": "Not the owner of the lease",
    "forbidden_origin": "Cross-origin request rejected",
    "not_found": "Not found",
    "method_not_allowed": "Method not allowed",
    "request_timeout": "Request timeout",
    "port_taken": "Port in use",
    "service_taken": "Service name belongs to another user",
    "lease_differs": "A different lease exists already",
    "port_reserved": "Port reserved",
    "no_clock": "Lease can't be renewed",
    "not_declinable": "Lease can't move to another port",
    "lease_ended": "Lease ended",
    "revision_gone": "Events no longer available",
    "too_large": "Request too large",
    "unsupported_media_type": "Unsupported media type",
    "other_network": "Process in another network namespace",
    "announce_unreachable": "Address not reachable from the LAN",
    "quota_exceeded": "Quota exceeded",
    "internal_error": "Internal error",
    "pool_exhausted": "No free port in the pool",
    "busy": "Server busy",
    "store_unavailable": "Store unavailable",
}


class Problem(Struct, frozen=True, omit_defaults=True):
    """A problem document (RFC 9457)."""

    type: Annotated[str, Meta(description="A URN of the code.", examples=["urn:portd:problem:port_taken"])]
    title: Annotated[str, Meta(description="What the code means, for people.", examples=["Port in use"])]
    status: Annotated[int, Meta(description="The HTTP status.", examples=[409])]
    detail: Annotated[str, Meta(description="What failed, on which value, and what to do.")]
    code: Annotated[str, Meta(description="The stable code, for programs.", examples=["port_taken"])]
    pointer: Annotated[
        str | None, Meta(description="A JSON pointer (RFC 6901) to the field at fault.", examples=["/port"])
    ] = None
    location: Annotated[
        Literal["query"] | None, Meta(description="`query` where the field at fault is a query parameter.")
    ] = msgspec.field(default=None, name="in")


class MethodNotAllowed(Refusal):
    """The path exists and has other methods."""

    code = "method_not_allowed"


class UnsupportedMediaType(Refusal):
    """The Content-Type of the body is not JSON."""

    code = "unsupported_media_type"


class RequestTimeout(Refusal):
    """The body did not arrive in time."""

    code = "request_timeout"


class InvalidQuery(InvalidRequest):
    """A query parameter is at fault; `pointer` names it."""


def problem_of(refusal: Refusal) -> Problem:
    """Make the document of a refusal."""
    return Problem(
        type=f"urn:portd:problem:{refusal.code}",
        title=TITLE[refusal.code],
        status=STATUS[refusal.code],
        detail=refusal.detail,
        code=refusal.code,
        pointer=refusal.pointer,
        location="query" if isinstance(refusal, InvalidQuery) else None,
    )


def headers_of(refusal: Refusal) -> dict[str, str]:
    """Return the headers that go with a refusal: Retry-After in whole seconds (RFC 9110, 10.2.3), WWW-Authenticate."""
    headers = {}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after_s)))
    if refusal.code == "unauthenticated":
        headers["WWW-Authenticate"] = 'Bearer realm="portd"'
    return headers


def internal_error() -> Problem:
    """Make the document of a fault of portd's own: it reveals nothing of the cause, which the log has."""
    return Problem(
        type="urn:portd:problem:internal_error",
        title=TITLE["internal_error"],
        status=STATUS["internal_error"],
        detail="portd failed to answer this request; its log has the cause",
        code="internal_error",
    )


def render_problem(refusal: Refusal) -> Any:
    """Return a refusal's document as plain values, for other protocols that send problems."""
    return msgspec.to_builtins(problem_of(refusal))
