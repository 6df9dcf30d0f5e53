"""Clients that are slow, silent, endless or deaf are cut off, while others are served as if they were not there.

The daemon's bounds are shortened, each to a second or so: nobody can wait for the real ones.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import Daemon, Stream, dial, wait_for

IMPATIENT = """
import portd.adapters.http.front as front, portd.adapters.http.events as events
front.REQUEST_TIMEOUT_S = front.ANSWER_TIMEOUT_S = 1.0
front.KEEPALIVE_S = 1.5
events.BUFFER_MAX_BYTES = 100_000
events.CATCH_UP_S = 1.0
events.HEARTBEAT_S = 0.5
"""
HEAD = b"POST /v1/leases HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def impatient(make_daemon: MakeDaemon) -> Daemon:
    """A running daemon with short bounds."""
    return make_daemon(prelude=IMPATIENT).start()


@contextlib.contextmanager
def others_are_served(daemon: Daemon) -> Iterator[None]:
    """Lease and release all the time; fails when that was ever refused, or had to wait for the rude ones to be gone."""
    served, wrong, done = 0, [], threading.Event()

    def work() -> None:
        nonlocal served
        while not done.is_set():
            granted = daemon.call("POST", "/v1/leases", {"service": "other", "ttl": 60}, over="tcp")
            released = daemon.call("DELETE", f"/v1/leases/{granted.body.get('id')}")
            if (granted.status, released.status) != (201, 204):
                wrong.append((granted, released))
            served += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not wrong
    assert served >= 3, "others waited"


def is_cut_off(connection: socket.socket) -> bytes:
    """Read until the daemon closes, and return what it said before; the socket's time-out fails when it never does."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            said += data
    return said


def drip(connection: socket.socket, data: bytes, pause_s: float) -> None:
    """Send one byte after another until the other end has had enough."""
    with contextlib.suppress(OSError):
        for byte in data:
            connection.sendall(bytes((byte,)))
            time.sleep(pause_s)


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_silent_and_slow_clients_are_cut_off(impatient: Daemon, over: str) -> None:
    place: Path | tuple[str, int] = impatient.socket if over == "unix" else impatient.tcp
    body = json.dumps({"service": "slow"}).encode()
    with contextlib.ExitStack() as stack, others_are_served(impatient):
        silent, head, trickle, partial, dripping, chunked, idle = (
            stack.enter_context(contextlib.closing(dial(place))) for _ in range(7)
        )
        head.sendall(HEAD)
        partial.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body[:5])
        chunked.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + body[:5] + b"\r\n")
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        dripping.sendall(HEAD + b"Content-Length: 999\r\n\r\n")
        slow = [
            threading.Thread(target=drip, args=(trickle, HEAD * 100, 0.05)),
            threading.Thread(target=drip, args=(dripping, b" " * 999, 0.01)),
        ]
        for thread in slow:
            thread.start()
        assert is_cut_off(silent) == b""
        assert is_cut_off(head) == b""
        assert is_cut_off(trickle) == b""
        for late in (partial, dripping, chunked):
            assert is_cut_off(late).startswith(b"HTTP/1.1 408 ")
        assert is_cut_off(idle).startswith(b"HTTP/1.1 200 ")
        for thread in slow:
            thread.join()
    assert impatient.get("/v1/leases?service=slow")["leases"] == []


def test_client_that_does_not_read_its_answers_is_cut_off(impatient: Daemon) -> None:
    metadata = {f"key{n}": "x" * 500 for n in range(30)}
    for _ in range(8):
        impatient.call("POST", "/v1/leases", [{"service": "big", "ttl": 600, "metadata": metadata}] * 8)
    assert len(impatient.leases()) == 64
    listing = b"GET /v1/leases HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with contextlib.ExitStack() as stack, others_are_served(impatient):
        for many in (1, 2, 4, 6, 20):  # from an answer that the kernel takes whole to what it never does
            for _ in range(3):
                stack.enter_context(contextlib.closing(small_window(impatient))).sendall(listing * many)
        wait_for(lambda: impatient.get("/v1/status")["counts"]["connections"] <= 3, "the deaf are cut off")


def test_client_that_leases_without_reading_is_cut_off(impatient: Daemon) -> None:
    body = json.dumps({"service": "deaf", "instance": "deaf-1"}).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with (
        contextlib.closing(small_window(impatient)) as deaf,
        others_are_served(impatient),
        pytest.raises(ConnectionError),
    ):
        deaf.sendall(request * 500_000)


def small_window(daemon: Daemon) -> socket.socket:
    """Connect with a receive buffer that is soon full."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(daemon.tcp)
    return connection


def test_follower_that_never_reads_is_dropped_alone(impatient: Daemon) -> None:
    seen: list[int] = []
    with contextlib.ExitStack() as stack, impatient.connect() as calling, Stream(impatient) as good:
        reading = threading.Thread(
            target=lambda: seen.extend(event.id for event in good.until(lambda event: event.type == "ended"))
        )
        reading.start()
        deaf = [stack.enter_context(contextlib.closing(small_window(impatient))) for _ in range(10)]
        for connection in deaf:
            connection.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: impatient.get("/v1/status")["counts"]["followers"] == 11, "all follow")
        lease = impatient.lease("chatty", ttl=600, metadata={f"key{n}": "x" * 500 for n in range(20)})

        def followers() -> int:
            for number in range(20):
                calling.call("POST", f"/v1/leases/{lease['id']}/drain", {"drain": number % 2 == 0})
            count: int = calling.call("GET", "/v1/status").body["counts"]["followers"]
            return count

        wait_for(lambda: followers() == 1, "the deaf are dropped, the reader is not")
        impatient.call("DELETE", f"/v1/leases/{lease['id']}")
        reading.join()
    assert seen == list(range(seen[0], seen[-1] + 1))


def test_a_follower_that_does_not_read_the_past_is_dropped(impatient: Daemon) -> None:
    lease = impatient.lease("past", ttl=600, metadata={f"key{n}": "x" * 500 for n in range(20)})
    for drain in (True, False) * 300:
        impatient.call("POST", f"/v1/leases/{lease['id']}/drain", {"drain": drain})
    with contextlib.closing(small_window(impatient)) as deaf:
        deaf.sendall(b"GET /v1/events?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: impatient.get("/v1/status")["counts"]["followers"] == 1, "it follows")
        wait_for(lambda: impatient.get("/v1/status")["counts"]["followers"] == 0, "it is dropped")


def test_what_is_too_large_is_refused_before_it_is_read(daemon: Daemon) -> None:
    reply = daemon.call("POST", "/v1/leases", b" " * 300_000)
    assert (reply.status, reply.code) == (413, "too_large")
    with contextlib.closing(dial(daemon.socket)) as connection:
        connection.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n")
        assert b'"code":"too_large"' in is_answered(connection)
    with contextlib.closing(dial(daemon.socket)) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"2000\r\n" + b" " * 8192 + b"\r\n")
        assert b'"code":"too_large"' in is_answered(connection)


def is_answered(connection: socket.socket) -> bytes:
    """Read one answer, by its length."""
    said = b""
    while (end := said.find(b"\r\n\r\n")) < 0 or len(said) < end + 4 + length(said[:end]):
        data = connection.recv(65536)
        assert data, said
        said += data
    return said


def length(head: bytes) -> int:
    """Return an answer's length by its head."""
    found = re.search(rb"(?i)content-length: (\d+)", head)
    assert found, head
    return int(found[1])


def test_connections_beyond_the_bound_are_closed_until_some_end(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(prelude="import portd.adapters.http.front as front; front.CONNECTIONS_MAX = 50").start()
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(contextlib.closing(dial(daemon.socket)))
        late = stack.enter_context(contextlib.closing(dial(daemon.socket)))
        assert is_cut_off(late) == b""

    def has_room() -> bool:
        with contextlib.suppress(ConnectionError):
            return bool(daemon.get("/v1/status")["counts"]["connections"] == 1)
        return False

    wait_for(has_room, "there is room again")


def test_requests_beyond_the_disk_queue_get_busy(make_daemon: MakeDaemon) -> None:
    """The disk is held up in the store's thread while 40 ask and 10 may wait."""
    slow = """
import portd.leasing.journal, portd.adapters.sqlite.writing as writing, time
portd.leasing.journal.PENDING_MAX = 10
write = writing.Writer.write
writing.Writer.write = lambda *args: (time.sleep(0.3), write(*args))[1]
"""
    daemon = make_daemon(prelude=slow).start()
    replies = []
    threads = [
        threading.Thread(
            target=lambda: replies.append(daemon.call("POST", "/v1/leases", {"service": "crowd", "ttl": 60}))
        )
        for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(reply.status, reply.code) for reply in replies} == {(201, None), (503, "busy")}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status == 503)
    granted = [reply.body["id"] for reply in replies if reply.status == 201]
    assert daemon.leases().keys() == set(granted), "a refused request leaves nothing behind"
    assert daemon.get("/v1/status")["pools"]["default"]["free"] == 100 - len(granted)


def test_disconnects_at_any_point_leave_only_whole_leases(daemon: Daemon) -> None:
    body = json.dumps({"service": "hung-up", "ttl": 60}).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for cut in (*range(0, len(request), 7), len(request)):
        for place in (daemon.socket, daemon.tcp):
            with contextlib.closing(dial(place)) as connection:
                connection.sendall(request[:cut])
    leases = wait_for(lambda: daemon.get("/v1/leases?service=hung-up")["leases"], "what was whole is granted")
    assert all(lease["state"] == "held" for lease in leases)
    assert daemon.get("/v1/status")["counts"]["connections"] <= 2
