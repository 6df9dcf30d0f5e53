"""What the fast path accepts: exactly what the normal parser accepts too, and nothing that could mean something."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser
from hypothesis import example, given
from hypothesis import strategies as st

from portd.adapters.http.authenticator import Authenticator, ConnectionPeer
from portd.adapters.http.fast_path import HEAD_MAX_BYTES, REQUEST_LINE, FastPath, plain_headers
from portd.adapters.http.leases import LeaseCalls
from portd.leasing.seams import Peer
from portd.testing.world import in_world
from tests.adapters.http.fakes import FakePeers

PLAIN = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 19"
BODY = b'{"service": "a"}   '
NOT_PLAIN = [
    b"Content-Type: application/json\r\nContent-Length: 19",  # no Host
    b"Host:\r\nContent-Length: 19",
    b"Host: localhost\nContent-Length: 19",
    b"Host: localhost\r\nUser-Agent: a\rb\r\nContent-Length: 19",
    b"Host: localhost\r\nUser-Agent: a\nb\r\nContent-Length: 19",
    b"Host: localhost\r\nUser-Agent: a\0b\r\nContent-Length: 19",
    b"Host: localhost\r\nUser-Agent: a\x7fb\r\nContent-Length: 19",
    b"Host: localhost\r\nUser-Agent: \xe9\r\nContent-Length: 19",
    b"Host: localhost\r\nUser-Agent: a\r\n continued\r\nContent-Length: 19",
    b"Host : localhost\r\nContent-Length: 19",
    b" Host: localhost\r\nContent-Length: 19",
    b"Host: localhost\r\nHost: localhost\r\nContent-Length: 19",
    b"Host: localhost\r\nContent-Length: 19\r\nContent-Length: 19",
    b"Host: localhost\r\nContent-Length: +19",
    b"Host: localhost\r\nContent-Length: 019",
    b"Host: localhost\r\nContent-Length: 1_9",
    b"Host: localhost\r\nContent-Length: 99999999",
    b"Host: localhost\r\nContent-Length: 300000",
    b"Host: localhost",
    b"Host: localhost\r\nContent-Length: 19\r\nTransfer-Encoding: chunked",
    b"Host: localhost\r\nContent-Length: 19\r\nAuthorization: Bearer x",
    b"Host: localhost\r\nContent-Length: 19\r\nOrigin: http://localhost",
    b"Host: localhost\r\nContent-Length: 19\r\nExpect: 100-continue",
    b"Host: localhost\r\nContent-Length: 19\r\nConnection: close",
    b"Host: localhost\r\nContent-Length: 19\r\nContent-Type: text/plain",
    b"Host: localhost\r\nContent-Length: 19\r\nContent-Encoding: gzip",
]


def parse(data):
    """Parse a request as aiohttp does; returns its headers, lower case, or None where it is refused."""
    loop = asyncio.new_event_loop()
    try:
        protocol = BaseProtocol(loop)
        parser = HttpRequestParser(protocol, loop, 2**16, max_line_size=8190, max_field_size=8190)
        messages, _, tail = parser.feed_data(data)
        assert (len(messages), tail) == (1, b"")
        return {name.lower(): value for name, value in messages[0][0].raw_headers}
    except Exception:
        return None
    finally:
        loop.close()


def test_a_usual_head_is_plain():
    assert plain_headers(REQUEST_LINE + PLAIN) == {
        b"host": b"localhost",
        b"content-type": b"application/json",
        b"content-length": b"19",
    }


@pytest.mark.parametrize("head", NOT_PLAIN)
def test_what_may_mean_something_is_not_plain(head):
    assert plain_headers(REQUEST_LINE + head) is None


@pytest.mark.parametrize(
    "line", [b"POST /v1/leases HTTP/1.0\r\n", b"post /v1/leases HTTP/1.1\r\n", b"POST /v1/leases?wait=1 HTTP/1.1\r\n"]
)
def test_another_request_line_is_not_plain(line):
    assert plain_headers(line + PLAIN) is None


SEPARATORS = [b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\x80", b"-", b"x"]
LINES = [
    b"Host: localhost",
    b"Accept: */*",
    b"Accept:",
    b"Content-Length: 19",
    b"User-Agent: x",
    b"Connection: keep-alive",
]
PIECES = st.sampled_from([*SEPARATORS, *LINES])


@given(st.lists(PIECES, max_size=12))
@example([b"\r\nHost: a"])
def test_normal_parser_reads_every_plain_head_alike(pieces):
    head = REQUEST_LINE + PLAIN + b"\r\n" + b"".join(pieces)
    headers = plain_headers(head)
    if headers is not None:
        assert parse(head + b"\r\n\r\n" + BODY) == headers


def path_of(world, peer=None):
    peer = peer or Peer(1000, 41, frozenset(), "peercred")
    authenticator = Authenticator(FakePeers(peer), "", {}, [], lambda token: token.encode())
    end = ConnectionPeer(peer, is_local=True, is_unix=True)
    return FastPath(
        authenticator, world.service, LeaseCalls(world.service, world.service), lambda: world.table.revision, "ab"
    ), end


def request(body, head=b""):
    data = json.dumps(body).encode()
    return REQUEST_LINE + b"Host: localhost\r\n%sContent-Length: %d\r\n\r\n" % (head, len(data)) + data


@in_world()
async def test_plain_grant_is_answered_with_lease_and_stores_name(world):
    world.processes.start(41)
    path, end = path_of(world)
    answers = []
    plain = path.accept(end, request({"service": "orders"}), None)
    entry = path.grant(plain, answers.append)
    await entry.wait()
    head, _, body = answers[0].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 201 Created\r\n")
    assert b"X-Portd-Revision: 1\r\nX-Portd-Store: ab\r\n" in head
    assert json.loads(body)["service"] == "orders"


@in_world()
async def test_a_refused_grant_is_answered_with_a_problem(world):
    path, end = path_of(world)
    answers = []
    plain = path.accept(end, request({"service": "orders", "pid": 99}), None)
    assert path.grant(plain, answers.append) is None
    assert b"Content-Type: application/problem+json" in answers[0]


@in_world()
async def test_incomplete_oversized_or_invalid_requests_are_left_to_normal_path(world):
    path, end = path_of(world)
    whole = request({"service": "orders"})
    for data in (
        b"",
        whole[:-1],
        whole + b"P",
        request({"service": "Orders"}),
        request([]),
        request({"service": "orders"}, b"Accept: %s\r\n" % (b"x" * HEAD_MAX_BYTES)),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        assert path.accept(end, data, None) is None


@in_world()
async def test_only_a_known_head_is_not_parsed_again(world):
    path, end = path_of(world)
    first = path.accept(end, request({"service": "orders"}), None)
    assert path.accept(end, request({"service": "orders"}), first.head).head is first.head
    assert path.accept(end, request({"service": "orders"}, b"Origin: http://a\r\n"), first.head) is None
