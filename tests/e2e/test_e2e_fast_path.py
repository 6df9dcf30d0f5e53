"""The fast path for plain grants answers as the normal path does, whatever is sent and however it arrives."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Daemon, Reply, dial, read_reply, wait_for

GRANTS: list[Any] = [
    {"service": "plain"},
    {"service": "plain", "ttl": 60},
    {"service": "plain", "instance": "plain-x"},
    {"service": "plain", "instance": "plain-x"},  # again, by the same owner
    {"service": "plain", "protocol": "udp"},
    {"service": "plain", "protocol": "both"},
    {"service": "plain", "address": "::1"},
    {"service": "plain", "address": "own", "port": 80},
    {"service": "plain", "tags": ["a"], "metadata": {"b": "c"}, "check": {"kind": "tcp"}},
    [{"service": "many"}, {"service": "many", "endpoint": "other"}],
    [{"service": "many"}],
    # refused
    {"service": "Plain"},
    {"service": "plain", "port": 0},
    {},
    [],
    None,
    {"service": "plain", "unknown": 1},
    {"service": "plain", "pid": 4_194_304},
    {"service": "plain", "pool": "nowhere"},
    {"service": "plain", "address": "203.0.113.1"},
    {"service": "plain", "announce": True},
    {"service": "plain", "ttl": 1e9},
    {"service": "plain", "exact": True},
]
OF_ITS_OWN = {"id", "port", "instance", "address", "token", "revision", "created_at", "expires_at", "renewed_at"}
"""Fields whose values differ from one lease to the next."""


def shape(value: Any) -> Any:
    """Return an answer's body with what belongs to the one lease blanked."""
    if isinstance(value, dict):
        return {key: type(part).__name__ if key in OF_ITS_OWN else shape(part) for key, part in value.items()}
    return [shape(part) for part in value] if isinstance(value, list) else value


@contextlib.contextmanager
def cleared(daemon: Daemon) -> Iterator[None]:
    """Release all leases afterwards."""
    yield
    for lease_id in daemon.leases():
        daemon.call("DELETE", f"/v1/leases/{lease_id}")


def request(body: Any, head: str = "") -> bytes:
    """Make a grant's bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        f"POST /v1/leases HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode() + data


def ask(connection: socket.socket, data: bytes) -> Reply:
    """Send one request in one packet, and read its answer."""
    connection.sendall(data)
    with contextlib.closing(http.client.HTTPResponse(connection)) as response:
        response.begin()
        return read_reply(response)


def one_path(daemon: Daemon, over: str, bodies: list[Any], head: str) -> list[Reply]:
    """Send each body on a connection of its own."""
    replies = []
    with cleared(daemon):
        for body in bodies:
            place: Path | tuple[str, int] = daemon.socket if over == "unix" else daemon.tcp
            with contextlib.closing(dial(place)) as connection:
                replies.append(ask(connection, request(body, head)))
    return replies


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_both_paths_give_the_same_answers(daemon: Daemon, over: str) -> None:
    bodies = [*GRANTS, b"", b"{", b"\xff", b"[" * 5000, b'{"service": "a"} ', b" " * 10]
    fast = one_path(daemon, over, bodies, "")
    normal = one_path(daemon, over, bodies, "X-Normal-Path: 1\r\n")
    for body, one, other in zip(bodies, fast, normal, strict=True):
        assert one.status == other.status, body
        assert shape(one.body) == shape(other.body), body
        assert one.headers.keys() - {"server"} == other.headers.keys() - {"server"}, body
        assert one.headers["content-type"] == other.headers["content-type"], body
    assert {reply.status for reply in fast} == {200, 201, 400, 422}
    # The fast path sends no Server header: else the comparison compares nothing.
    pairs = [("server" in one.headers, "server" in other.headers) for one, other in zip(fast, normal, strict=True)]
    assert pairs[:11] == [(False, True)] * 11


def test_connection_close_closes_only_its_own_connection(daemon: Daemon) -> None:
    with cleared(daemon), dialed(daemon, "unix") as connection:
        for head in ("", "Connection: keep-alive\r\n", "Connection: Keep-Alive\r\n", "Connection: close\r\n"):
            assert ask(connection, request({"service": "plain"}, head)).status == 201
        assert connection.recv(1) == b""


def read_answers(connection: socket.socket, count: int) -> list[tuple[int, Any]]:
    """Read that many answers of one connection."""
    answers, said = [], b""
    while len(answers) < count:
        head, found, rest = said.partition(b"\r\n\r\n")
        length = next(
            (
                int(line.partition(b":")[2])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            ),
            0,
        )
        if found and len(rest) >= length:
            answers.append((int(head.split(b" ")[1]), json.loads(rest[:length]) if length else None))
            said = rest[length:]
        else:
            data = connection.recv(65536)
            assert data, said
            said += data
    assert said == b""
    return answers


@contextlib.contextmanager
def dialed(daemon: Daemon, over: str) -> Iterator[socket.socket]:
    """Open a stream, and release all leases afterwards."""
    place: Path | tuple[str, int] = daemon.socket if over == "unix" else daemon.tcp
    with cleared(daemon), contextlib.closing(dial(place)) as connection:
        yield connection


@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("count", [2, 30])
def test_pipelined_grants_are_answered_in_order(daemon: Daemon, over: str, count: int) -> None:
    with dialed(daemon, over) as connection:
        connection.sendall(b"".join(request({"service": "piped", "instance": f"piped-{n}"}) for n in range(count)))
        answers = read_answers(connection, count)
    assert [(status, lease["instance"]) for status, lease in answers] == [(201, f"piped-{n}") for n in range(count)]


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_pipelined_requests_of_every_kind_are_answered_in_order(daemon: Daemon, over: str) -> None:
    listing = b"GET /v1/leases?service=mixed HTTP/1.1\r\nHost: localhost\r\n\r\n"
    grant, wrong = request({"service": "mixed"}), request({"service": "Mixed"})
    with dialed(daemon, over) as connection:
        for part in (grant, listing, wrong, grant, listing):  # each in a packet of its own, none waited for
            connection.sendall(part)
        answers = read_answers(connection, 5)
    assert [status for status, _ in answers] == [201, 200, 400, 201, 200]
    assert [len(answers[at][1]["leases"]) for at in (1, 4)] == [1, 2]


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_a_grant_that_arrives_in_pieces_is_the_same_grant(daemon: Daemon, over: str) -> None:
    whole = request({"service": "pieces"})
    with dialed(daemon, over) as connection:
        connection.sendall(whole)
        read_answers(connection, 1)
        for cut in range(1, len(whole), 11):
            connection.sendall(whole[:cut])
            time.sleep(0.001)  # let the pieces arrive apart; nothing hangs on it
            connection.sendall(whole[cut:])
            assert read_answers(connection, 1)[0][0] == 201, cut
        connection.sendall(whole + whole[:50])
        assert read_answers(connection, 1)[0][0] == 201
        connection.sendall(whole[50:])
        assert read_answers(connection, 1)[0][0] == 201


@pytest.mark.parametrize(
    "head",
    [
        "Host: evil.example\r\n",
        "Origin: http://evil.example\r\n",
        "Content-Type: text/plain\r\n",
        "Sec-Fetch-Site: cross-site\r\n",
        "Content-Length: 3\r\n",
        "Transfer-Encoding: chunked\r\n",
    ],
)
def test_longer_head_is_not_mistaken_for_a_known_one(daemon: Daemon, head: str) -> None:
    with dialed(daemon, "tcp") as connection:
        for _ in range(2):
            connection.sendall(request({"service": "before"}))
            assert read_answers(connection, 1)[0][0] == 201
        connection.sendall(request({"service": "after"}, head))
        status, body = read_answers(connection, 1)[0]
        assert 400 <= status < 500, body


def test_a_token_in_a_later_grant_is_seen(daemon: Daemon) -> None:
    with dialed(daemon, "unix") as connection:
        ask(connection, request({"service": "before"}))
        reply = ask(connection, request({"service": "after"}, "Authorization: nonsense\r\n"))
        assert (reply.status, reply.code) == (401, "unauthenticated")


def test_a_connection_that_asks_for_its_end_ends(daemon: Daemon) -> None:
    with dialed(daemon, "unix") as connection:
        connection.sendall(request({"service": "last"}))
        read_answers(connection, 1)
        connection.sendall(request({"service": "last"}, "Connection: close\r\n"))
        assert read_answers(connection, 1)[0][0] == 201
        assert connection.recv(1) == b""


def test_client_that_goes_after_asking_still_leases_for_its_process(daemon: Daemon) -> None:
    with cleared(daemon):
        with contextlib.closing(dial(daemon.socket)) as connection:
            ask(connection, request({"service": "stays", "ttl": 60}))
            connection.sendall(request({"service": "gone", "ttl": 60}))
        wait_for(lambda: daemon.get("/v1/leases?service=gone")["leases"], "the work goes on without its caller")
