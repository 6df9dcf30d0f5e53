"""A lease of a program: adopted or granted, listened on, kept over everything, given back."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
from typing import Any

import pytest

import portd_client
from clients.conformance.bed import DEADLINE_S, Daemon, foreign_listener, wait_for
from portd_client import calls, leasing, steps
from portd_client.errors import DaemonUnavailable, PortTaken


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look after leases every 50 ms: the pace is not what is tested."""
    monkeypatch.setattr(steps, "CHECK_S", 0.05)
    monkeypatch.setattr(steps, "RETRY_S", 0.05)


@pytest.fixture(autouse=True)
def _no_threads_left() -> object:
    before = set(threading.enumerate())
    yield
    wait_for(lambda: not set(threading.enumerate()) - before, "no thread is left after the leases are closed")


def test_listen_returns_a_listening_socket_on_the_leased_port(daemon: Daemon) -> None:
    with portd_client.listen("heard", client=daemon.client) as listener:
        host, port = listener.getsockname()
        [lease] = daemon.client.leases(service="heard")
        assert (host, port) == (lease["address"], lease["port"])
        assert lease["owner"]["pid"] == os.getpid()
        assert not listener.get_inheritable()
        with socket.create_connection((host, port), 5), listener.accept()[0]:
            pass
    assert not list(daemon.client.leases(service="heard"))


def test_every_option_of_the_api_can_be_given(daemon: Daemon) -> None:
    port = daemon.last_port
    with portd_client.lease(
        "optional",
        client=daemon.client,
        instance="blue",
        endpoint="metrics",
        port=port,
        exact=True,
        ttl=60,
        tags=["a"],
        metadata={"k": "v"},
        check="http:/healthz",
        hold="none",
        announce=None,
    ) as lease:
        document = daemon.client.lease(lease.id)
        assert (document["instance"], document["endpoint"], document["port"]) == ("blue", "metrics", port)
        assert (document["tags"], document["metadata"], document["lifetime"]) == (["a"], {"k": "v"}, "ttl")
        check = document["check"]
        assert check is not None
        assert (check["kind"], check["path"]) == ("http", "/healthz")


def test_udp_and_both_give_bound_sockets(daemon: Daemon) -> None:
    with portd_client.listen("datagrams", client=daemon.client, protocol="udp") as one:
        assert one.type == socket.SOCK_DGRAM
        assert one.getsockname()[1] == one.lease.port
    with portd_client.lease("doubled", client=daemon.client, protocol="both") as lease:
        stream, datagram = lease.sockets()
        assert (stream.type, datagram.type) == (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        assert stream.getsockname() == datagram.getsockname()
        datagram.close()
        stream.close()


def test_port_bound_by_a_foreign_process_is_declined_for_another(daemon: Daemon) -> None:
    with portd_client.lease("raced", client=daemon.client, hold="none") as lease:
        first = lease.port
        with socket.create_server((lease.address, first), reuse_port=False), lease.listen() as listener:
            assert listener.getsockname()[1] == lease.port
            assert lease.port != first


def test_exact_port_in_use_is_refused(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupant, pytest.raises(PortTaken) as caught:
        portd_client.listen("refused", client=daemon.client, port=occupant.getsockname()[1], exact=True)
    assert caught.value.code == "port_taken"


def test_ttl_lease_is_renewed_while_it_is_held(daemon: Daemon) -> None:
    with portd_client.lease("renewed", client=daemon.client, ttl=0.6) as lease:
        granted = daemon.client.lease(lease.id)["expires_at"]
        assert granted is not None

        def is_renewed_four_times_over() -> bool:
            now = daemon.client.lease(lease.id)
            assert now["state"] != "ended"
            return str(now["expires_at"])[:-1] > _later(granted, 2.4)

        wait_for(is_renewed_four_times_over, "it outlives its first clock by far")
    assert daemon.client.lease(lease.id)["ended_because"] == "released"


def test_it_outlives_restart_of_daemon_under_same_id(own_daemon: Daemon) -> None:
    with portd_client.listen("restarted", client=own_daemon.client, ttl=30) as listener:
        own_daemon.stop(signal.SIGKILL)
        own_daemon.start()
        before = own_daemon.client.lease(listener.lease.id)
        assert before["state"] != "ended"
        assert before["port"] == listener.getsockname()[1]
    assert own_daemon.client.lease(listener.lease.id)["ended_because"] == "released"


@pytest.mark.parametrize("ttl", [None, 0.5])
def test_lease_that_daemon_forgot_is_taken_again_on_same_port(own_daemon: Daemon, ttl: float | None) -> None:
    with portd_client.lease("forgotten", client=own_daemon.client, ttl=ttl, tags=["blue"]) as lease:
        first, port = lease.id, lease.port
        _lose_memory(own_daemon)
        wait_for(lambda: lease.id != first, "it is leased again")
        document = own_daemon.client.lease(lease.id)
        assert (document["port"], document["instance"], document["tags"]) == (port, "forgotten-1", ["blue"])
    assert not list(own_daemon.client.leases(service="forgotten"))


def test_program_is_notified_when_its_lease_moves(own_daemon: Daemon) -> None:
    moved: list[int] = []
    with portd_client.lease(
        "moved", client=own_daemon.client, on_change=lambda lease: moved.append(lease.port)
    ) as lease:
        port = lease.port
        own_daemon.stop()
        own_daemon.forget()
        with foreign_listener(lease.address, port):
            own_daemon.start()
            wait_for(lambda: moved, "the callback is called")
        assert moved == [lease.port]
        assert lease.port != port


def test_a_callback_that_fails_does_not_end_the_keeping(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: portd_client.Lease) -> None:
        raise RuntimeError("the program's own")

    with (
        caplog.at_level(logging.WARNING),
        portd_client.lease("fragile", client=daemon.client, hold="none", on_change=fail) as lease,
    ):
        first, port = lease.id, lease.port
        with foreign_listener(lease.address, port):
            daemon.client.call(calls.release(first))
            wait_for(lambda: lease.port != port, "it moves")
        second = lease.id
        daemon.client.call(calls.release(second))
        wait_for(lambda: lease.id != second, "it is looked after still")
    assert "the program's own" in caplog.text


@pytest.mark.parametrize("protocol", ["tcp"])
def test_lost_lease_of_a_program_that_listens_is_leased_back(own_daemon: Daemon, protocol: Any) -> None:
    with portd_client.listen("adopts", client=own_daemon.client, protocol=protocol, ttl=0.6, tags=["blue"]) as listener:
        lease = listener.lease
        first, port = lease.id, lease.port
        _lose_memory(own_daemon)
        wait_for(lambda: lease.id != first, "it is leased back")
        assert lease.port == port
        wait_for(lambda: own_daemon.client.lease(lease.id)["state"] == "bound", "its listener counts as its own")
        assert own_daemon.client.lease(lease.id)["tags"] == ["blue"]


def test_closing_socket_that_program_moved_away_from_keeps_lease(daemon: Daemon) -> None:
    with portd_client.listen("moves-on", client=daemon.client) as old:
        old.lease.decline()
        with old.lease.listen() as new:
            old.close()
            assert daemon.client.lease(new.lease.id)["port"] == new.getsockname()[1]
        assert daemon.client.lease(new.lease.id)["ended_because"] == "released"


def test_release_gives_back_once_and_forked_child_gives_back_nothing(daemon: Daemon) -> None:
    lease = portd_client.lease("forked", client=daemon.client)
    child = os.fork()
    if not child:
        lease.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert daemon.client.lease(lease.id)["state"] == "held"
    lease.release()
    lease.release()
    assert daemon.client.lease(lease.id)["ended_because"] == "released"


def test_drain_and_report_reach_the_daemon(daemon: Daemon) -> None:
    with portd_client.lease("reports", client=daemon.client, check={"kind": "report", "ttl": 30}) as lease:
        lease.report("critical", "no database")
        wait_for(lambda: daemon.client.lease(lease.id)["health"] == "critical", "the report is seen")
        lease.drain()
        assert daemon.client.lease(lease.id)["drain"]
        lease.drain(False)
        assert not daemon.client.lease(lease.id)["drain"]


@pytest.mark.parametrize(
    ("ending", "because"),
    [
        ("", "released"),
        ("raise SystemExit(3)", "released"),
        ("import signal; signal.raise_signal(signal.SIGTERM)", "released"),
        ("import os; os._exit(1)", "owner_exited"),
    ],
)
def test_however_a_program_ends_its_lease_ends_with_it(daemon: Daemon, ending: str, because: str) -> None:
    program = daemon.start_python(
        f"import portd_client as p; p.release_on_signal(); print(p.lease('ending').id); {ending}"
    )
    lease_id = end_naturally(program).strip()
    wait_for(lambda: daemon.client.lease(lease_id)["state"] == "ended", "the lease ends")
    assert daemon.client.lease(lease_id)["ended_because"] == because
    if "SIGTERM" in ending:
        assert program.returncode == -signal.SIGTERM


def test_a_program_that_minds_sigterm_itself_keeps_its_own_handler(daemon: Daemon) -> None:
    program = daemon.start_python(
        "import portd_client, signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('mine'))\n"
        "portd_client.release_on_signal()\n"
        "lease = portd_client.lease('minds')\n"
        "signal.raise_signal(signal.SIGTERM)\n"
        "print(portd_client.Client().lease(lease.id)['state'] == 'ended')\n"
    )
    assert end_naturally(program) == "mine\nFalse\n"


ADOPT = (
    "import json, os, portd_client\n"
    "with portd_client.listen('{service}') as listener:\n"
    "    print(json.dumps([listener.lease.id, listener.getsockname()[1], listener.lease.is_adopted]))\n"
)


def test_what_portd_run_leased_is_adopted(daemon: Daemon) -> None:
    import sys

    program = daemon.start_portd("run", "adopted", "--", sys.executable, "-c", ADOPT.format(service="adopted"))
    lease_id, port, adopted = json.loads(end_naturally(program))
    assert adopted
    lease = daemon.client.lease(lease_id)
    assert (lease["port"], lease["service"], lease["ended_because"]) == (port, "adopted", "released")
    assert [one["id"] for one in daemon.client.leases(service="adopted", state="ended")] == [lease_id]


def test_what_portd_run_leased_for_another_service_is_left_alone(daemon: Daemon) -> None:
    import sys

    program = daemon.start_portd("run", "parent", "--", sys.executable, "-c", ADOPT.format(service="offspring"))
    *logged, answer = end_naturally(program).splitlines()
    lease_id, _, adopted = json.loads(answer)
    assert not adopted
    assert "parent" in logged[-1]
    assert daemon.client.lease(lease_id)["service"] == "offspring"


def test_environment_is_taken_at_its_word_while_daemon_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PORTD_LEASE": "abc", "PORTD_TOKEN": "t", "HOST": "127.0.0.1", "PORT": "24999"}.items():
        monkeypatch.setenv(name, value)
    with portd_client.lease("away", client=portd_client.Client("unix:///nonexistent/portd.sock")) as lease:
        assert (lease.id, lease.port, lease.is_adopted) == ("abc", 24999, True)


def test_without_a_daemon_a_lease_is_a_clear_error() -> None:
    with pytest.raises(DaemonUnavailable, match="portd serve"):
        portd_client.lease("nobody", client=portd_client.Client("unix:///nonexistent/portd.sock"))


def test_fallback_gives_an_ephemeral_port_and_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    absent = portd_client.Client("unix:///nonexistent/portd.sock")
    with (
        caplog.at_level(logging.WARNING),
        portd_client.listen("alone", client=absent, fallback="ephemeral") as listener,
    ):
        assert listener.lease.id == ""
        assert listener.getsockname()[1] == listener.lease.port
        with socket.create_connection(listener.getsockname(), 5):
            pass
        listener.lease.report("passing")
        listener.lease.drain()
    assert [record.name for record in caplog.records] == ["portd_client"]


def test_fifty_programs_threads_at_once_get_fifty_ports(daemon: Daemon) -> None:
    leases: list[portd_client.Lease] = []
    threads = [
        threading.Thread(target=lambda: leases.append(portd_client.lease("crowd", client=daemon.client)))
        for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len({lease.port for lease in leases}) == 50
    finally:
        for lease in leases:
            lease.release()


def end_naturally(program: object) -> str:
    """Wait for a program that ends by itself, and return what it wrote."""
    written, _ = program.communicate(timeout=20)  # type: ignore[attr-defined]
    return str(written)


def _lose_memory(daemon: Daemon) -> None:
    daemon.stop()
    daemon.forget()
    daemon.start()


def _later(moment: str, seconds: float) -> str:
    from datetime import datetime, timedelta

    return (datetime.fromisoformat(moment) + timedelta(seconds=seconds)).isoformat()


def test_release_gives_back_a_lease_that_was_granted_meanwhile(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    made, granted = threading.Event(), threading.Event()

    def grant_late(client: portd_client.Client, sequence: object) -> object:
        assert made.wait(DEADLINE_S)
        found = client.grant({"service": "late", "instance": "late-2", "ttl": 60})
        granted.set()
        assert lease._stop.wait(DEADLINE_S)
        return found

    monkeypatch.setattr(steps, "pause_s", lambda document, chance: 0.0)
    monkeypatch.setattr(leasing, "drive", grant_late)
    lease = portd_client.lease("late", client=daemon.client, ttl=60, instance="late-1")
    made.set()
    assert granted.wait(DEADLINE_S)
    lease.release()
    assert not list(daemon.client.leases(instance="late-2"))
