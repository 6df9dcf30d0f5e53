"""Refusals as problem documents (RFC 9457), and the one place where codes conflicts HTTP statuses. HTTP sends them, and the
handoff; the command line prints them."""

from __future__ import annotations

import re
from typing import Final

import msgspec
from msgspec import Struct

from portd.core.errors import Busy, InvalidRequest, Refusal

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
    "invalid_request": "The request is not valid",
    "unauthenticated": "Who calls is not known",
    "not_owner": "This belongs to somebody else",
    "forbidden_origin": "A page of another origin may not ask this",
    "not_found": "There is no such thing",
    "method_not_allowed": "This can't be done here",
    "request_timeout": "The request took too long to arrive",
    "port_taken": "The port is taken",
    "port_reserved": "The port is reserved",
    "no_clock": "The lease has no clock",
    "not_declinable": "The lease can't move to another port",
    "lease_ended": "The lease has ended",
    "revision_gone": "Events that far back are not kept",
    "too_large": "The request is too large",
    "unsupported_media_type": "The body must be JSON",
    "other_network": "The process is on another network",
    "announce_unreachable": "The address can't be reached from the LAN",
    "quota_exceeded": "The quota is used up",
    "internal_error": "portd failed",
    "pool_exhausted": "The pool has no free port",
    "busy": "Too much at once",
    "store_unavailable": "The store takes no writes",
}


class Problem(Struct, frozen=True, omit_defaults=True):
    """A problem document. `pointer` (RFC 6901) names the field at fault; `in` says where it stands, if not the body."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    pointer: str | None = None
    location: str | None = msgspec.field(default=None, name="in")


class MethodNotAllowed(Refusal):
    """The resource is there, and has other methods."""

    code = "method_not_allowed"


class UnsupportedMediaType(Refusal):
    """The body is not JSON by its own word."""

    code = "unsupported_media_type"


class RequestTimeout(Refusal):
    """The body did not arrive in time."""

    code = "request_timeout"


class InvalidQuery(InvalidRequest):
    """A query parameter is at fault."""


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
    """Return the headers that go with a refusal."""
    if isinstance(refusal, Busy):
        return {"Retry-After": str(refusal.retry_after)}
    if refusal.code == "unauthenticated":
        return {"WWW-Authenticate": 'Bearer realm="portd"'}
    return {}


_AT = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`(?P<where>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"(?:missing required|contains unknown) field `(?P<name>.*)`", re.DOTALL)


def pointer_of(error: msgspec.ValidationError) -> tuple[str, str]:
    """Split a validation error into what is wrong and a JSON pointer to where."""
    found = _AT.match(str(error))
    assert found is not None
    what, where = found["what"], found["where"] or "$"
    steps = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]|\[(?:\.\.\.)\]", where.removeprefix("$"))
    pointer = "".join(f"/{name or index}" for name, index in steps if name or index)
    if field := _FIELD.search(what):
        pointer += "/" + field["name"].replace("~", "~0").replace("/", "~1")
    return what, pointer
