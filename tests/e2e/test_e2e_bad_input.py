"""Whatever is sent, a problem document comes back: with a code, and with the pointer to the field at fault."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from typing import Any

import pytest

from tests.e2e.harness import Daemon, Reply, dial

LEASES = "/v1/leases"
DEEP = 20_000
BODIES: list[tuple[bytes | Any, str | None]] = [
    # what is no JSON at all
    (b"", ""),
    (b"{", ""),
    (b"nonsense", ""),
    (b'{"service": "a"', ""),
    (b'{"service": "a"}}', ""),
    (b"\xff\xfe", ""),
    (b'{"service": "\xff"}', ""),
    (b"\0", ""),
    (b'{"service": NaN}', ""),
    (b"{'service': 'a'}", ""),
    (b"[" * DEEP, None),
    (b'{"metadata":' * DEEP, None),
    (b'{"a":' * DEEP + b"1" + b"}" * DEEP, None),
    # the wrong kind of thing
    (None, ""),
    (1, ""),
    ("text", ""),
    (True, ""),
    ([], ""),
    ([1], "/0"),
    ([[{"service": "a"}]], "/0"),
    ({}, "/service"),
    ({"service": None}, "/service"),
    ({"service": 1}, "/service"),
    ({"service": ["a"]}, "/service"),
    ({"service": {"a": "b"}}, "/service"),
    ([{"service": "a"}, {"service": 1}], "/1/service"),
    ([{"service": "a", "ttl": 60}] * 257, ""),
    ({"service": "a", "unknown": 1}, "/unknown"),
    ({"service": "a", "a/b~c": 1}, "/a~1b~0c"),
    ({"service": "a", "": 1}, "/"),
    # names
    *(
        ({"service": name}, "/service")
        for name in ("", "A", "a_b", "-a", "a-", "a.b", "a b", "a\n", "a\0", "ä", "x" * 64, "../../etc")
    ),
    ({"service": "\ud800"}, None),
    ({"service": "a", "instance": "A"}, "/instance"),
    ({"service": "a", "endpoint": ""}, "/endpoint"),
    # ports and other numbers
    *(
        ({"service": "a", "port": port}, "/port")
        for port in (0, -1, 65536, 10**30, 1.5, "80-", "90-80", True, [], 2**63, -(2**63) - 1)
    ),
    (b'{"service": "a", "port": 1e400}', None),
    (b'{"service": "a", "ttl": 1e400}', None),
    (b'{"service": "a", "port": ' + b"9" * 5000 + b"}", None),
    *(({"service": "a", "ttl": ttl}, "/ttl") for ttl in (0, -1, 0.01, 10**12, "60", True, [])),
    *(({"service": "a", "pid": pid}, "/pid") for pid in (0, -1, 10**9, "1", 1.5)),
    # enumerations, addresses, pools
    ({"service": "a", "protocol": "sctp"}, "/protocol"),
    ({"service": "a", "protocol": "TCP"}, "/protocol"),
    ({"service": "a", "hold": "tight"}, "/hold"),
    ({"service": "a", "exact": 1}, "/exact"),
    ({"service": "a", "exact": True}, "/exact"),
    ({"service": "a", "protocol": "udp", "hold": "shared"}, "/hold"),
    *(
        ({"service": "a", "address": address}, "/address")
        for address in (
            "",
            "localhost.lan",
            "127.0.0.1:80",
            "256.0.0.1",
            "1.2.3",
            "224.0.0.1",
            "::ffff:127.0.0.1",
            "fe80::1%eth0",
            "203.0.113.1",
            "2001:db8::1",
            "127.0.0.1\0",
            "x" * 65,
            0,
        )
    ),
    ({"service": "a", "pool": "nowhere"}, "/pool"),
    ({"service": "a", "pool": ""}, "/pool"),
    # tags, metadata; of an object with names of the caller's choice the pointer names the object
    ({"service": "a", "tags": "blue"}, "/tags"),
    ({"service": "a", "tags": [1]}, "/tags/0"),
    ({"service": "a", "tags": [""]}, "/tags/0"),
    ({"service": "a", "tags": ["a", "b\0"]}, "/tags/1"),
    ({"service": "a", "tags": ["a"] * 65}, "/tags"),
    ({"service": "a", "tags": ["x" * 129]}, "/tags/0"),
    ({"service": "a", "metadata": []}, "/metadata"),
    ({"service": "a", "metadata": {"a": 1}}, "/metadata"),
    ({"service": "a", "metadata": {"a": "x" * 513}}, "/metadata"),
    ({"service": "a", "metadata": {str(n): "" for n in range(65)}}, "/metadata"),
    # checks
    ({"service": "a", "check": {}}, "/check/kind"),
    ({"service": "a", "check": {"kind": "magic"}}, "/check/kind"),
    ({"service": "a", "check": "http"}, "/check"),
    ({"service": "a", "check": {"kind": 1}}, "/check/kind"),
    ({"service": "a", "check": {"kind": "http", "path": "no-slash"}}, "/check/path"),
    ({"service": "a", "check": {"kind": "http", "path": "/\r\nX: y"}}, "/check/path"),
    ({"service": "a", "check": {"kind": "http", "headers": {"A": "b\r\nC: d"}}}, "/check/headers"),
    ({"service": "a", "check": {"kind": "http", "expect_status": [99]}}, "/check/expect_status/0"),
    ({"service": "a", "check": {"kind": "tcp", "interval": 0}}, "/check/interval"),
    ({"service": "a", "check": {"kind": "tcp", "rise": 1000}}, "/check/rise"),
    ({"service": "a", "check": {"kind": "tcp", "path": "/"}}, "/check/path"),
    ({"service": "a", "check": {"kind": "command", "command": ["/bin/true"]}}, "/check/command/0"),
    ({"service": "a", "check": {"kind": "command", "command": []}}, "/check/command"),
    ({"service": "a", "protocol": "udp", "check": {"kind": "tcp"}}, "/check/kind"),
    ({"service": "a", "port": [0]}, "/port/0"),
    # announcements
    ({"service": "a", "announce": 1}, "/announce"),
    ({"service": "a", "announce": {"port": 1}}, "/announce/port"),
    ({"service": "a", "address": "0.0.0.0", "announce": {"type": "nonsense"}}, "/announce/type"),
]


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_every_wrong_grant_gets_a_pointer_and_leaves_nothing_behind(daemon: Daemon, over: str) -> None:
    wrong = []
    with daemon.connect(over) as connection:
        for body, pointer in BODIES:
            reply = connection.call("POST", LEASES, body if isinstance(body, bytes) else json.dumps(body).encode())
            said = (reply.status, reply.code, reply.body.get("pointer"))
            if said[:2] != (400, "invalid_request") or pointer not in (None, said[2]):
                wrong.append((str(body)[:80], pointer, said, reply.body.get("detail")))
    assert not wrong, "\n".join(map(str, wrong))
    assert daemon.leases() == {}


def test_a_problem_is_whole(daemon: Daemon) -> None:
    reply = daemon.call("POST", LEASES, {"service": "a", "port": 0})
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.body == {
        "type": "urn:portd:problem:invalid_request",
        "title": reply.body["title"],
        "status": 400,
        "detail": reply.body["detail"],
        "code": "invalid_request",
        "pointer": "/port",
    }
    assert all(reply.body.values())


@pytest.mark.parametrize(
    ("path", "pointer"),
    [
        (f"{LEASES}?unknown=1", "/unknown"),
        (f"{LEASES}?port=0", "/port"),
        (f"{LEASES}?port=x", "/port"),
        (f"{LEASES}?port=", "/port"),
        (f"{LEASES}?port=1&port=2", "/port"),
        (f"{LEASES}?limit=0", "/limit"),
        (f"{LEASES}?limit=10001", "/limit"),
        (f"{LEASES}?limit=1e9", "/limit"),
        (f"{LEASES}?cursor=x", "/cursor"),
        (f"{LEASES}?cursor=%FF", "/cursor"),
        (f"{LEASES}?cursor=" + "A" * 600, "/cursor"),
        (f"{LEASES}?state=open", "/state"),
        (f"{LEASES}?service=A", "/service"),
        (f"{LEASES}?service=a&service=b", "/service"),
        (f"{LEASES}?tag=", "/tag/0"),
        (f"{LEASES}?pid=-1", "/pid"),
        (f"{LEASES}?uid=4294967296", "/uid"),
        (f"{LEASES}?service=%00", "/service"),
        (f"{LEASES}?service=%", "/service"),
        (f"{LEASES}?service=%zz", "/service"),
        ("/v1/events?after=-1", "/after"),
        ("/v1/events?after=x", "/after"),
        ("/v1/events?after=99999999999999999999", "/after"),
        ("/v1/services/a?wait=601", "/wait"),
        ("/v1/services/a?wait=nan", "/wait"),
        ("/v1/services/a?wait=-1", "/wait"),
        ("/v1/services/a?passing=maybe", "/passing"),
        ("/v1/services/a?scope=world", "/scope"),
        ("/v1/ports/0", "/port"),
        ("/v1/ports/65536", "/port"),
        ("/v1/ports/x", "/port"),
        ("/v1/ports/-1", "/port"),
        ("/v1/ports/%31%30x", "/port"),
        ("/v1/ports/%D9%A3", "/port"),
        ("/v1/ports/80?protocol=both", "/protocol"),
        ("/v1/ports/80/history?at=yesterday", "/at"),
        ("/v1/ports/80/history?at=0.5", "/at"),
        ("/v1/ports/80/history?at=2026-01-31T12:00:00", "/at"),
        ("/v1/lan?type=http", "/type"),
        ("/v1/ports/80/history?limit=-1", "/limit"),
        ("/v1/status?verbose=1", "/verbose"),
        ("/openapi.json?x=1", "/x"),
    ],
)
def test_every_wrong_query_gets_a_pointer(daemon: Daemon, path: str, pointer: str) -> None:
    reply = raw(daemon, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert (reply.status, reply.code, reply.body["pointer"]) == (400, "invalid_request", pointer), reply


@pytest.mark.parametrize(
    "lease_id",
    ["none", "%00", "a" * 4000, "..%2f..%2fetc", "%F0%9F%98%80", "%ff", "0" * 24, "';%20DROP%20TABLE%20leases"],
)
@pytest.mark.parametrize(
    ("method", "rest", "body"),
    [
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/renew", None),
        ("POST", "/decline", None),
        ("POST", "/drain", None),
        ("PATCH", "", {"tags": []}),
        ("PUT", "/health", {"status": "passing"}),
    ],
)
def test_a_lease_that_never_was_is_not_found(daemon: Daemon, method: str, rest: str, body: Any, lease_id: str) -> None:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {LEASES}/{lease_id}{rest} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    reply = raw(daemon, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    assert (reply.status, reply.code) == (404, "not_found"), reply


def test_every_wrong_change_gets_a_pointer_and_changes_nothing(daemon: Daemon) -> None:
    lease = daemon.lease("steady", ttl=600, check={"kind": "report"})
    path = f"{LEASES}/{lease['id']}"
    before = daemon.show(lease["id"])
    for method, rest, body, pointer in [
        ("POST", "/renew", {"seconds": 0}, "/seconds"),
        ("POST", "/renew", {"ttl": 5}, "/ttl"),
        ("POST", "/renew", [], ""),
        ("POST", "/renew", {"seconds": 100_000}, "/seconds"),
        ("POST", "/drain", {"drain": "yes"}, "/drain"),
        ("POST", "/drain", 1, ""),
        ("PATCH", "", {"port": 1}, "/port"),
        ("PATCH", "", {"tags": None}, "/tags"),
        ("PATCH", "", b"", ""),
        ("PATCH", "", {"metadata": {"": "x"}}, "/metadata"),
        ("PATCH", "", {"check": {"kind": "x"}}, "/check/kind"),
        ("PUT", "/health", {}, "/status"),
        ("PUT", "/health", {"status": "unknown"}, "/status"),
        ("PUT", "/health", {"status": "passing", "note": "x" * 5000}, "/note"),
    ]:
        reply = daemon.call(method, path + rest, body)
        assert (reply.status, reply.code, reply.body["pointer"]) == (400, "invalid_request", pointer), (method, body)
    after = daemon.show(lease["id"])
    assert (after["revision"], after["renewed_at"]) == (before["revision"], before["renewed_at"])
    refused = daemon.call("PATCH", path, {"announce": True})
    assert (refused.status, refused.code) == (422, "announce_unreachable")
    daemon.call("DELETE", path)


def test_wrong_methods_and_paths_get_their_status(daemon: Daemon) -> None:
    for method, path, allowed in (
        ("PUT", LEASES, "GET, POST"),
        ("DELETE", "/v1/status", "GET"),
        ("POST", "/openapi.json", "GET"),
        ("PATCH", "/v1/events", "GET"),
        ("TRACE", "/healthz", "GET"),
        ("OPTIONS", LEASES, "GET, POST"),
    ):
        reply = daemon.call(method, path)
        assert (reply.status, reply.code) == (405, "method_not_allowed"), (method, path)
        assert reply.headers["allow"] == allowed
    for path in ("/v1", "/v2/leases", "/v1/leases/", "//v1/leases", "/v1/leases/x/y/z", "/v1/ports/1/2", "/%00"):
        assert daemon.call("GET", path).code == "not_found", path


def test_body_of_another_media_type_is_refused(daemon: Daemon) -> None:
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "nonsense"):
        reply = daemon.call("POST", LEASES, b'{"service": "a", "ttl": 60}', Content_Type=media_type)
        assert (reply.status, reply.code) == (415, "unsupported_media_type"), media_type
    for media_type in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/merge-patch+json"):
        reply = daemon.call("POST", LEASES, {"service": "media", "ttl": 60}, Content_Type=media_type)
        assert reply.status == 201, media_type
        daemon.call("DELETE", f"{LEASES}/{reply.body['id']}")


def raw(daemon: Daemon, data: bytes) -> Reply:
    """Send bytes and read until the daemon closes: one answer."""
    said = b""
    with contextlib.closing(dial(daemon.socket)) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65536):
                said += more
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1."), said
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(int(status.split(" ")[1]), headers, json.loads(body) if body else "")


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n: empty\r\n\r\n",
        b"GET / HTTP/1.1\r\nA\0: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\0c\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 100_000 + b"\r\n",
        b"POST /v1/leases HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/leases HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/leases HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /v1/leases HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/leases HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"POST /v1/leases HTTP/1.1\r\nConnection: close\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_bytes_that_are_no_http_get_a_problem_document(daemon: Daemon, data: bytes) -> None:
    reply = raw(daemon, data)
    assert 400 <= reply.status < 500, reply
    assert reply.code, reply


@pytest.mark.parametrize(
    ("expect", "begins"),
    [("100-continue", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 "), ("the-impossible", b"HTTP/1.1 400 ")],
)
def test_an_expectation_is_met_or_ignored(daemon: Daemon, expect: str, begins: bytes) -> None:
    head = f"POST {LEASES} HTTP/1.1\r\nHost: a\r\nExpect: {expect}\r\nConnection: close\r\nContent-Length: 2\r\n\r\n"
    with contextlib.closing(dial(daemon.socket)) as connection:
        connection.sendall(head.encode())
        if expect == "100-continue":
            assert connection.recv(100, socket.MSG_PEEK).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.startswith(begins), said
    assert b'"pointer":"/service"' in said


def test_random_bytes_do_no_harm(daemon: Daemon) -> None:
    chance = random.Random(7)
    valid = b'POST /v1/leases HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\n\r\n{"service": "A"}'
    for _ in range(300):
        data = bytearray(valid)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.closing(dial(daemon.socket)) as connection:
            connection.sendall(data)
    assert daemon.call("GET", "/healthz").status == 200


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Basic eDp5", "x" * 7000])
def test_malformed_authorization_is_refused(daemon: Daemon, value: str) -> None:
    reply = daemon.call("GET", LEASES, Authorization=value)
    assert (reply.status, reply.code) == (401, "unauthenticated")
    assert reply.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 17, "\u0663".encode().decode("latin-1")])
def test_malformed_last_event_id_is_refused(daemon: Daemon, last: str) -> None:
    reply = daemon.call("GET", "/v1/events", Last_Event_ID=last)
    assert (reply.status, reply.code, reply.body["pointer"]) == (400, "invalid_request", "/Last-Event-ID")
