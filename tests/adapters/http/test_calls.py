"""Queries and bodies as routes get them: decoded, validated, within bounds."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from msgspec import Meta, Struct
from multidict import MultiDict

from portd.adapters.http.calls import Reader, Route, decode_body
from portd.adapters.http.problems import (
    InvalidQuery,
    UnsupportedMediaType,
    headers_of,
    internal_error,
    problem_of,
)
from portd.core.errors import Busy, InvalidRequest, PortTaken, QuotaExceeded, TooLarge, Unauthenticated


class Query(Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of every kind."""

    number: Annotated[int, Meta(ge=1)] = 1
    flag: bool = False
    tag: tuple[str, ...] = ()
    name: str | None = None
    size: int | None = None


class Body(Struct, frozen=True, forbid_unknown_fields=True):
    """A body."""

    port: int = 1


ROUTE = Route("POST", "/x", None, "", {}, query=Query, body=Body)


def query(text, route=ROUTE):
    return Reader(route).query(make_mocked_request("GET", f"/x?{text}"))


def test_parameters_are_converted_by_their_types():
    assert query("number=7&flag=true&tag=a&tag=b&name=") == Query(7, True, ("a", "b"), "")


@pytest.mark.parametrize(
    ("text", "pointer"),
    [
        ("other=1", "/other"),
        ("number=1&number=1", "/number"),
        ("number=x", "/number"),
        ("number=0", "/number"),
        ("flag=maybe", "/flag"),
        ("size=null", "/size"),
        ("Number=1", "/Number"),
    ],
)
def test_wrong_parameter_is_refused_with_its_name(text, pointer):
    with pytest.raises(InvalidQuery) as refusal:
        query(text)
    assert problem_of(refusal.value).pointer == pointer
    assert problem_of(refusal.value).location == "query"


def test_call_without_parameters_refuses_every_one():
    with pytest.raises(InvalidQuery):
        query("x=1", Route("GET", "/x", None, "", {}))


@pytest.mark.parametrize("number", ["158", "158.0", "1.58e2"])
def test_integer_may_be_written_as_json_schema_allows(number):
    decode = msgspec.json.Decoder(Body).decode
    assert decode_body(decode, Body, b'{"port": %s}' % number.encode()) == Body(158)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 5_000, b'{"port": NaN}', b'{"port": 1}x'])
def test_body_that_is_not_json_is_refused(data):
    with pytest.raises(InvalidRequest):
        decode_body(msgspec.json.Decoder(Body).decode, Body, data)


class FakeRequest:
    """A request with a body that arrives, does not arrive, or is too large."""

    def __init__(self, data=b"{}", content_type="application/json", length=None, error=None):
        self.headers = MultiDict({"Content-Type": content_type})
        self.content_length = length
        self.data, self.error = data, error

    async def read(self):
        """Return the body."""
        if self.error is not None:
            raise self.error
        return self.data


def read(request, route=ROUTE):
    return asyncio.run(Reader(route).body(request, 1.0))


def test_body_of_another_media_type_is_refused():
    with pytest.raises(UnsupportedMediaType):
        read(FakeRequest(content_type="text/plain"))
    assert read(FakeRequest(content_type="application/json; charset=utf-8")) == Body()
    assert read(FakeRequest(content_type="application/merge-patch+json")) == Body()


def test_body_beyond_the_bound_is_refused_early():
    for request in (
        FakeRequest(length=10**9),
        FakeRequest(error=web.HTTPRequestEntityTooLarge(max_size=1, actual_size=2)),
    ):
        with pytest.raises(TooLarge):
            read(request)


def test_body_that_may_be_missing_has_its_defaults():
    assert read(FakeRequest(b""), ROUTE._replace(body_required=False)) == Body()


def test_refusals_have_their_headers():
    assert headers_of(Busy("full")) == {"Retry-After": "1"}
    assert headers_of(QuotaExceeded("full", retry_after_s=4.2)) == {"Retry-After": "5"}
    assert headers_of(PortTaken("taken")) == {}
    assert "WWW-Authenticate" in headers_of(Unauthenticated("who?"))


def test_fault_reveals_nothing_of_its_cause():
    assert (internal_error().status, internal_error().code) == (500, "internal_error")
