"""Bound sockets that are passed to their owners: no gap, no foreign, and nobody waits at a dead owner's door."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import NOBODY, Daemon, free_tcp_port, is_bindable, listen_on, owner, wait_for
from tests.e2e.puppet import Puppet, receive


@pytest.fixture
def puppet(daemon: Daemon) -> Iterator[Puppet]:
    """An owner."""
    with Puppet(daemon) as made:
        yield made


def binding_of(lease: Any, kind: str = "tcp", *, listens: bool = True) -> dict[str, Any]:
    """Return what a socket of this lease looks like."""
    return {"kind": kind, "address": lease["address"], "port": lease["port"], "listens": listens and kind == "tcp"}


@pytest.mark.parametrize("hold", ["shared", "exclusive", "none"])
def test_socket_of_lease_is_passed_and_it_is_bound(daemon: Daemon, puppet: Puppet, hold: str) -> None:
    lease = puppet.lease("passed", hold=hold)
    answer, sockets = puppet.hand_over({"lease": lease["id"], "listen": True})
    assert sockets == [binding_of(lease)]
    assert (answer["lease"]["id"], "token" in answer["lease"]) == (lease["id"], False)
    assert daemon.wait_state(lease["id"], "bound")["owner"]["pid"] == puppet.pid
    socket.create_connection((lease["address"], lease["port"]), 5).close()
    assert not is_bindable(lease["port"], reuse=True)


def test_a_request_is_granted_and_received_at_once(daemon: Daemon, puppet: Puppet) -> None:
    answer, sockets = puppet.hand_over(
        {"request": {"service": "at-once", "hold": "exclusive"}, "listen": True, "backlog": 5}
    )
    lease = answer["lease"]
    assert sockets == [binding_of(lease)]
    assert lease["owner"]["pid"] == puppet.pid
    assert lease["token"]
    daemon.wait_state(lease["id"], "bound")


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ({"protocol": "udp"}, ["udp"]),
        ({"protocol": "both"}, ["tcp", "udp"]),
        ({"address": "::1"}, ["tcp"]),
        ({"address": "::1", "protocol": "both"}, ["tcp", "udp"]),
        ({"address": "::"}, ["tcp"]),
        ({"address": "0.0.0.0"}, ["tcp"]),
        ({"address": "own", "port": 53, "protocol": "both"}, ["tcp", "udp"]),
        ({"protocol": "udp", "hold": "exclusive"}, ["udp"]),
        ({"protocol": "both", "hold": "exclusive"}, ["tcp", "udp"]),
    ],
)
def test_every_protocol_and_address_comes_by_handoff(
    daemon: Daemon, puppet: Puppet, body: Any, kinds: list[str]
) -> None:
    answer, sockets = puppet.hand_over({"request": {"service": "kinds", **body}, "listen": True})
    assert sockets == [binding_of(answer["lease"], kind) for kind in kinds]
    daemon.wait_state(answer["lease"]["id"], "bound")


def test_without_listen_it_is_bound_only_and_owner_listens_later(daemon: Daemon, puppet: Puppet) -> None:
    lease = puppet.lease("later", hold="exclusive")
    _, sockets = puppet.hand_over({"lease": lease["id"]})
    assert sockets == [binding_of(lease, listens=False)]
    assert daemon.show(lease["id"])["state"] == "held"


def test_an_exclusive_lease_is_opened_in_no_other_way(daemon: Daemon, puppet: Puppet) -> None:
    lease = puppet.lease("exclusive", hold="exclusive")
    assert "in use" in str(puppet.listen(lease["port"]))
    puppet.hand_over({"lease": lease["id"], "listen": True})
    assert "in use" in str(puppet.listen(lease["port"]))


@pytest.mark.parametrize("hold", ["shared", "exclusive"])
def test_a_connection_to_a_dead_owner_is_refused_at_once(daemon: Daemon, hold: str) -> None:
    with Puppet(daemon) as puppet:
        lease = puppet.lease("dead", hold=hold)
        puppet.hand_over({"lease": lease["id"], "listen": True})
        daemon.wait_state(lease["id"], "bound")
        puppet.end()
        wait_for(lambda: daemon.show(lease["id"])["ended_because"] == "owner_exited", "the lease ends")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((lease["address"], lease["port"]), 5)


def test_a_second_handoff_passes_the_same_socket_again(daemon: Daemon, puppet: Puppet) -> None:
    lease = puppet.lease("again", hold="exclusive")
    for _ in range(2):
        _, sockets = puppet.hand_over({"lease": lease["id"], "listen": True})
        assert sockets == [binding_of(lease)]


def test_a_handoff_after_a_crash_of_the_daemon(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    with Puppet(daemon) as puppet:
        lease = puppet.lease("crashed", hold="exclusive")
        daemon.kill()
        daemon.start()
        _, sockets = puppet.hand_over({"lease": lease["id"], "listen": True})
        assert sockets == [binding_of(lease)]
        daemon.wait_state(lease["id"], "bound")


def test_user_without_privileges_gets_privileged_port_that_is_its_own(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    low = next(port for port in range(900, 1000) if is_bindable(port))
    daemon.configure(f'[static.low]\nport = {low}\n[services.low]\nusers = ["{NOBODY}"]')
    daemon.start()
    with Puppet(daemon, uid=NOBODY) as nobody:
        assert "ermission" in str(nobody.listen(low))
        for body in ({"service": "low"}, {"service": "web", "address": "own", "port": 443, "exact": True}):
            answer, sockets = nobody.hand_over({"request": body, "listen": True})
            assert sockets == [binding_of(answer["lease"])]
            assert answer["lease"]["port"] < 1024
            assert daemon.wait_state(answer["lease"]["id"], "bound")["owner"]["uid"] == NOBODY
        assert [lease["lifetime"] for lease in daemon.leases().values() if lease["service"] == "low"] == ["static"]


def test_another_users_lease_is_not_handed_over(daemon: Daemon) -> None:
    with owner() as process, Puppet(daemon, uid=NOBODY) as nobody:
        lease = daemon.lease("mine", pid=process.pid)
        answer, sockets = nobody.hand_over({"lease": lease["id"]})
        assert (answer["problem"]["code"], answer["problem"]["status"], sockets) == ("not_owner", 403, [])


def test_refused_handoff_names_its_reason(daemon: Daemon, puppet: Puppet) -> None:
    ended = puppet.lease("ended", ttl=60)
    daemon.call("DELETE", f"/v1/leases/{ended['id']}")
    taken = puppet.lease("taken", hold="none")
    with listen_on(taken["port"]):
        for body, code, pointer in [
            ({"lease": "0" * 24}, "not_found", None),
            ({"lease": ended["id"]}, "lease_ended", None),
            ({"lease": taken["id"]}, "port_taken", "/lease"),
            ({}, "invalid_request", "/lease"),
            ({"lease": "x", "request": {"service": "a"}}, "invalid_request", "/lease"),
            ({"request": {"service": "A"}}, "invalid_request", "/request/service"),
            ({"request": [{"service": "a"}]}, "invalid_request", "/request"),
            ({"lease": taken["id"], "listen": 1}, "invalid_request", "/listen"),
            ({"lease": taken["id"], "backlog": -1}, "invalid_request", "/backlog"),
            ({"lease": taken["id"], "unknown": 1}, "invalid_request", "/unknown"),
            ([], "invalid_request", ""),
            (None, "invalid_request", ""),
        ]:
            answer, sockets = puppet.hand_over(body)
            problem = answer["problem"]
            assert (problem["code"], problem.get("pointer"), sockets) == (code, pointer, []), (body, problem)
            assert problem["detail"]


def test_garbage_on_the_handoff_socket_does_no_harm(daemon: Daemon) -> None:
    for data in (
        b"x",
        b"\xff\xfe",
        b"\0" * 1000,
        b"{" * 60_000,
        b"[" * 60_000,
        b'{"lease":' * 7000,
        b" " * 70_000,
        json.dumps({"lease": "x" * 60_000}).encode(),
    ):
        with handoff(daemon) as connection:
            connection.send(data)
            answer, sockets = receive(connection)
            assert (json.loads(answer)["problem"]["status"] in (400, 404), sockets) == (True, []), data[:20]
            connection.send(json.dumps({"lease": "none"}).encode())  # the connection goes on
            assert json.loads(receive(connection)[0])["problem"]["code"] == "not_found"


def test_clients_that_send_descriptors_or_hang_up_leave_nothing_behind(daemon: Daemon) -> None:
    def open_files() -> int:
        return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))

    before = open_files()
    with listen_on(free_tcp_port()) as mine:
        for _ in range(20):
            with handoff(daemon) as connection:
                socket.send_fds(connection, [b'{"lease": "none"}'], [mine.fileno()])
            with handoff(daemon):
                pass
            with handoff(daemon) as connection:
                connection.send(b'{"lease": "none"}')
    wait_for(lambda: open_files() <= before, "all is closed")


def test_one_users_connections_keep_no_other_user_out(make_daemon: MakeDaemon) -> None:
    limits = "h.CONNECTIONS_PER_USER = 5; h.IDLE_S = 0.5"
    daemon = make_daemon(prelude=f"import portd.adapters.handoff as h; {limits}").start()
    with contextlib.ExitStack() as stack, Puppet(daemon, uid=NOBODY) as other:
        silent = [stack.enter_context(handoff(daemon)) for _ in range(5)]
        late = stack.enter_context(handoff(daemon))
        assert json.loads(late.recv(65536))["problem"]["code"] == "busy"
        assert other.hand_over({"request": {"service": "other"}})[0]["lease"]
        assert silent[0].recv(1) == b"", "silent connections are closed"
    with Puppet(daemon) as puppet:
        answer, _ = wait_for(lambda: puppet.hand_over({"request": {"service": "again"}}), "the share is free again")
    assert answer["lease"]


def test_at_the_file_limit_every_caller_is_answered_busy(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    with owner() as process, handoff(daemon) as connection:
        lease = daemon.lease("none", pid=process.pid, hold="none")

        def ask(body: dict[str, Any]) -> tuple[Any, list[socket.socket]]:
            connection.send(json.dumps(body).encode())
            answer, sockets = receive(connection)
            return json.loads(answer), sockets

        assert ask({"lease": "none"})[0]["problem"]["code"] == "not_found"  # it has been let in
        allow_files(daemon.pid, None)
        with handoff(daemon) as late:
            assert json.loads(receive(late)[0])["problem"]["code"] == "busy"
        problem = ask({"lease": lease["id"]})[0]["problem"]
        assert (problem["code"], problem["status"]) == ("busy", 503)
        allow_files(daemon.pid, 4096)
        with handoff(daemon) as later:
            later.send(b'{"lease": "none"}')
            assert json.loads(receive(later)[0])["problem"]["code"] == "not_found"
        _, (passed,) = ask({"lease": lease["id"]})
        with passed:
            assert passed.getsockname() == (lease["address"], lease["port"])


def allow_files(pid: int, count: int | None) -> None:
    """Let a process have so many descriptors; None: not one more than it has."""
    if count is None:
        taken = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        count = next(number for number in range(len(taken) + 1) if number not in taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))


@contextlib.contextmanager
def handoff(daemon: Daemon) -> Iterator[socket.socket]:
    """Connect to the handoff socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(str(daemon.handoff))
        yield connection
