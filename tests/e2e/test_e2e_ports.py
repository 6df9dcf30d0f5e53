"""Who has a port: every socket on the number, whoever has it and at whatever address."""

from __future__ import annotations

import os
import pwd
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import NOBODY, Daemon, listen_on, owner, wait_for
from tests.e2e.puppet import Puppet


def who(daemon: Daemon, port: int, query: str = "") -> Any:
    return daemon.get(f"/v1/ports/{port}{query}")


def sockets_of(view: Any) -> list[tuple[str, str, int | None]]:
    return sorted((each["address"], each["socket"], each["pid"]) for each in view["listeners"])


def test_a_listener_at_another_address_is_listed_beside_the_lease(daemon: Daemon) -> None:
    with owner() as process, Puppet(daemon) as foreign:
        lease = daemon.lease("beside", pid=process.pid)
        assert foreign.listen(lease["port"], "::1") is None
        view = who(daemon, lease["port"])
        assert (view["verdict"], view["lease"]["id"]) == ("held", lease["id"])
        assert sockets_of(view) == [("::1", "listening", foreign.pid)]
        [listed] = [each for each in daemon.get("/v1/ports")["ports"] if each["port"] == lease["port"]]
        assert sockets_of(listed) == sockets_of(view)


def test_a_port_that_an_outgoing_connection_has_is_taken(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.bind(("127.0.0.1", 0))
        client.connect(server.getsockname())
        port = client.getsockname()[1]
        view = who(daemon, port)
        assert (view["verdict"], sockets_of(view)) == ("taken", [("127.0.0.1", "connected", os.getpid())])
        refused = daemon.call("POST", "/v1/leases", {"service": "x", "ttl": 60, "port": port, "exact": True})
        assert (refused.status, refused.code) == (409, "port_taken")


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("kind", ["listening", "bound", "connected"])
def test_a_refusal_names_the_process_that_has_the_port(daemon: Daemon, kind: str, is_fast: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if kind == "connected":
            other.connect(server.getsockname())
        port = (server if kind == "listening" else other).getsockname()[1]
        request = {"service": "x", "ttl": 60, "port": port, "exact": True}
        refused = daemon.call("POST", f"/v1/leases{'' if is_fast else '?wait=0.01'}", request)
    assert (refused.status, refused.code) == (409, "port_taken")
    assert (
        f"{Path('/proc/self/exe').resolve().name}[{os.getpid()}] of {pwd.getpwuid(os.geteuid()).pw_name}"
        in refused.body["detail"]
    )
    assert ("'adopt'" in refused.body["detail"]) is (kind == "listening")


def test_a_refusal_hides_the_program_of_another_user(daemon: Daemon) -> None:
    with Puppet(daemon, uid=NOBODY) as nobody, listen_on(0) as server:
        request = {"service": "hidden", "port": server.getsockname()[1], "exact": True}
        detail = nobody.call("POST", "/v1/leases", request).body["detail"]
    assert f"process[{os.getpid()}] of root" in detail
    assert "adopt" not in detail


def test_port_that_is_bound_and_not_listened_on_is_taken(daemon: Daemon) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        view = who(daemon, bound.getsockname()[1])
        assert (view["verdict"], sockets_of(view)) == ("taken", [("127.0.0.1", "bound", os.getpid())])


def test_udp_port_is_shown_whether_it_is_connected_or_not(daemon: Daemon) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        other.connect(one.getsockname())
        assert who(daemon, one.getsockname()[1], "?protocol=udp")["verdict"] == "unmanaged"
        assert who(daemon, other.getsockname()[1])["verdict"] == "taken"


def test_the_clients_of_a_listener_are_left_out(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        accepted, _ = server.accept()
        with accepted:
            view = who(daemon, server.getsockname()[1])
    assert sockets_of(view) == [("127.0.0.1", "listening", os.getpid())]


def test_portds_own_holds_are_nobodys_sockets(daemon: Daemon) -> None:
    with owner() as process:
        for hold in ("shared", "exclusive"):
            lease = daemon.lease("held", pid=process.pid, hold=hold, protocol="both" if hold == "exclusive" else "tcp")
            view = who(daemon, lease["port"])
            assert (view["verdict"], view["listeners"]) == ("held", [])


def test_what_an_ended_lease_left_behind_is_named(daemon: Daemon) -> None:
    with Puppet(daemon) as puppet:
        lease = puppet.lease("stays", instance="stays-1")
        puppet.listen(lease["port"])
        daemon.wait_state(lease["id"], "bound")
        assert puppet.call("DELETE", f"/v1/leases/{lease['id']}").status == 204
        view = who(daemon, lease["port"])
        assert (view["verdict"], view["lease"], view["left_over_of"]["id"]) == ("unmanaged", None, lease["id"])
    assert who(daemon, lease["port"])["left_over_of"] is None


def test_another_users_program_is_shown_to_nobody_else(daemon: Daemon) -> None:
    with Puppet(daemon, uid=NOBODY) as nobody, listen_on(0) as server:
        view = nobody.call("GET", f"/v1/ports/{server.getsockname()[1]}").body
        [seen] = view["listeners"]
        assert (seen["pid"], seen["uid"], seen["exe"], seen["cmdline"]) == (os.getpid(), 0, None, None)
        [mine] = who(daemon, server.getsockname()[1])["listeners"]
        assert None not in (mine["exe"], mine["cmdline"])


def test_listings_of_one_user_do_not_delay_states(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            daemon.call("GET", "/v1/ports")

    callers = [threading.Thread(target=load) for _ in range(8)]
    with Puppet(daemon) as puppet:
        for caller in callers:
            caller.start()
        try:
            for _ in range(3):
                lease = puppet.lease("prompt")
                puppet.listen(lease["port"])
                wait_for(lambda lease=lease: daemon.show(lease["id"])["state"] == "bound", "the state is current", 2.0)
        finally:
            stop.set()
            for caller in callers:
                caller.join()
