"""Calls and routes: what a handler receives and returns. Routes are data, so that the dispatcher and the OpenAPI
document read the same table."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

import msgspec
from aiohttp import web
from msgspec import Struct

from portd.adapters.http.problems import InvalidQuery, RequestTimeout, UnsupportedMediaType
from portd.core.errors import InvalidRequest, TooLarge
from portd.core.rights import Caller
from portd.core.validation import explain

BODY_MAX_BYTES: Final = 256 * 1024
"""The largest body: an array of 256 requests with generous metadata fits."""

_encoder = msgspec.json.Encoder()
encode = _encoder.encode


class Call(Struct, frozen=True, gc=False):
    """One request, decoded and validated."""

    request: web.Request
    caller: Caller
    query: Any
    body: Any

    @property
    def path(self) -> Any:
        """Return the variables of the path."""
        return self.request.match_info


class Answer(NamedTuple):
    """What is sent back: `body` is encoded as JSON, `Rows` a slice at a time; None means no body at all.

    `revision` is the one that the body shows, None where that is the newest one when it is sent.
    """

    body: Any
    status: int = 200
    headers: dict[str, str] = {}
    revision: int | None = None


Handler = Callable[[Call], Awaitable[Answer | web.StreamResponse]]


class Route(NamedTuple):
    """One line of the API. `answers` maps statuses to types; `access` says who may call from elsewhere with no token
    of the configuration (`lease`: whoever shows a lease's token)."""

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    handler: Handler
    summary: str
    answers: dict[int, Any]
    query: type[Struct] | None = None
    body: Any = None
    body_required: bool = True
    refusals: tuple[str, ...] = ()
    access: Literal["known", "lease", "anybody"] = "known"
    media_type: str = "application/json"


_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]")


class NoQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """A call without query parameters."""


class Reader:
    """Decodes the query and the body of one route."""

    def __init__(self, route: Route) -> None:
        self._query_type = route.query or NoQuery
        self._lists = {
            field.encode_name for field in msgspec.structs.fields(self._query_type) if isinstance(field.default, tuple)
        }
        self._type = route.body
        self._decode = None if route.body is None else msgspec.json.Decoder(route.body).decode
        self._required = route.body_required
        self._no_body = None if route.body is None or route.body_required else route.body()

    def query(self, request: web.Request) -> Any:
        """Validate the query; raises InvalidQuery for an unknown, doubled or malformed parameter."""
        raw: dict[str, Any] = {}
        for name, value in request.query.items():
            if name in self._lists:
                raw.setdefault(name, []).append(value)
            elif name in raw:
                raise InvalidQuery(f"parameter {name!r} is given twice", pointer=f"/{name}")
            else:
                raw[name] = value
        try:
            query = msgspec.convert(raw, self._query_type, strict=False)
        except msgspec.ValidationError as error:
            what, pointer = explain(error)
            raise InvalidQuery(what, pointer=pointer) from None
        if null := next((given for given in raw if getattr(query, given) is None), None):
            raise InvalidQuery("a query has no null: leave the parameter out", pointer=f"/{null}")
        for name, text in raw.items():  # lenient decoding reads a number as seconds since the epoch
            if isinstance(getattr(query, name), datetime) and not _DATE.match(text):
                raise InvalidQuery(f"{name} {text!r} is not a time as in RFC 3339", pointer=f"/{name}")
        return query

    async def body(self, request: web.Request, timeout_s: float) -> Any:
        """Read and validate the body; raises what is wrong with it."""
        if self._decode is None:
            return None
        data = await read_body(request, timeout_s)
        if not data and not self._required:
            return self._no_body
        content_type = request.headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
        if content_type != "application/json" and not content_type.endswith("+json"):
            raise UnsupportedMediaType(f"the body is {content_type}: send JSON as application/json")
        return decode_body(self._decode, self._type, data)


def decode_body(decode: Callable[[bytes], Any], kind: Any, data: bytes) -> Any:
    """Decode JSON; raises InvalidRequest with a pointer to the field at fault."""
    try:
        try:
            return decode(data)
        except msgspec.ValidationError:
            # 158.0 and 1.58e2 are integers by JSON Schema (draft 2020-12, validation, section 6.1.1), none to msgspec.
            return msgspec.convert(_with_integers(msgspec.json.decode(data)), kind)
    except msgspec.ValidationError as error:
        what, pointer = explain(error)
        raise InvalidRequest(what, pointer=pointer) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}", pointer="") from None


def _with_integers(value: Any) -> Any:
    """Turn numbers without a fraction into integers, wherever in the value they are."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _with_integers(item) for key, item in value.items()}
    return [_with_integers(item) for item in value] if isinstance(value, list) else value


async def read_body(request: web.Request, timeout_s: float) -> bytes:
    """Read the whole body, within bounds of size and time."""
    if (request.content_length or 0) > BODY_MAX_BYTES:
        raise TooLarge(f"the body has {request.content_length} bytes; {BODY_MAX_BYTES} are allowed")
    try:
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {timeout_s:g} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise TooLarge(f"the body has more than {BODY_MAX_BYTES} bytes") from None
