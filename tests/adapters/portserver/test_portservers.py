"""Both port servers against the real daemon: the real portpicker, and requests as gRPC's tools send them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import portpicker
import pytest

from tests.e2e.conftest import MakeDaemon, make_daemon, place  # noqa: F401  (fixtures)
from tests.e2e.harness import Daemon, free_tcp_port, wait_for

PICK = "import portpicker, sys; print(portpicker.pick_unused_port(), flush=True); sys.stdin.read()"


@pytest.fixture
def name() -> str:
    return f"@portd-test-{os.getpid()}"


@pytest.fixture
def served(make_daemon: MakeDaemon, name: str) -> Daemon:  # noqa: F811
    return make_daemon(port_count=20, extra=f'[compat]\nportserver = "{name}"').start()


def ask(name: str, request: bytes) -> bytes:
    """Send one request as portpicker does, and read to the end."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect("\0" + name[1:])
        connection.sendall(request)
        return connection.recv(100)


def leases(daemon: Daemon) -> list[dict]:
    with daemon.connect() as connection:
        found: list[dict] = connection.call("GET", "/v1/leases").body["leases"]
        return found


def test_portpicker_gets_a_leased_port_that_any_bind_takes(served: Daemon, name: str) -> None:
    port = portpicker.get_port_from_port_server(name)
    assert served.first_port <= port <= served.last_port
    (lease,) = leases(served)
    assert (lease["port"], lease["protocol"], lease["hold"]) == (port, "both", "none")
    assert lease["owner"]["pid"] == os.getpid()
    with socket.socket(socket.AF_INET6) as bare:
        bare.bind(("::", port))


def test_portpicker_program_frees_its_port_by_exiting(served: Daemon, name: str) -> None:
    environ = {**os.environ, "PORTSERVER_ADDRESS": name}
    with subprocess.Popen(
        [sys.executable, "-c", PICK], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        port = int(program.stdout.readline())
        assert [each["port"] for each in leases(served)] == [port]
        program.communicate("")
    wait_for(lambda: not leases(served), "the port is free again")


def test_port_is_never_given_twice_while_others_are_free(served: Daemon, name: str) -> None:
    given = [int(ask(name, b"%d\n" % os.getpid())) for _ in range(served.last_port - served.first_port + 1)]
    assert len(set(given)) == len(given)


def test_full_pool_is_answered_with_the_end_of_the_stream(served: Daemon, name: str) -> None:
    for _ in range(served.last_port - served.first_port + 1):
        assert ask(name, b"%d\n" % os.getpid())
    assert ask(name, b"%d\n" % os.getpid()) == b""


@pytest.mark.parametrize("request_", [b"1\n", b"0", b"-5\n", b"abc\n", b"99999999\n", b"\xff\xfe", b"4" * 20])
def test_request_for_no_process_gets_no_byte(served: Daemon, name: str, request_: bytes) -> None:
    assert ask(name, request_) == b""
    assert leases(served) == []


def test_number_that_is_listened_on_anywhere_is_not_given(served: Daemon, name: str) -> None:
    with socket.create_server(("127.0.0.2", served.first_port)):
        given = [ask(name, b"%d" % os.getpid()) for _ in range(served.last_port - served.first_port)]
    assert all(given)
    assert served.first_port not in [int(port) for port in given]


def test_address_that_is_taken_is_reported_and_leases_go_on(make_daemon: MakeDaemon, name: str) -> None:  # noqa: F811
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("\0" + name[1:])
        daemon = make_daemon(extra=f'[compat]\nportserver = "{name}"')
        daemon.errors.append("portserver")
        daemon.start()
        with daemon.connect() as connection:
            assert "portserver" not in connection.call("GET", "/healthz").body
            assert any(name in text for text in connection.call("GET", "/v1/status").body["warnings"])
            assert connection.call("POST", "/v1/leases", {"service": "orders", "ttl": 60}).status == 201


def test_path_is_replaced_after_crash_and_removed_at_stop(make_daemon: MakeDaemon, place: Path) -> None:  # noqa: F811
    path = place / "portserver.sock"
    daemon = make_daemon(extra=f'[compat]\nportserver = "{path}"').start()
    daemon.kill()
    daemon.start()
    assert portpicker.get_port_from_port_server(str(path))
    daemon.stop()
    assert not path.exists()


def test_grpc_port_server_gives_drops_and_refuses_pages(make_daemon: MakeDaemon) -> None:  # noqa: F811
    port = free_tcp_port()
    daemon = make_daemon(extra=f'[compat]\ngrpc_port_server = "127.0.0.1:{port}"').start()

    def get(path: str, **headers: str) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            text: str = answer.read().decode()
            return text

    given = int(get("/get"))
    assert [each["port"] for each in leases(daemon)] == [given]
    get(f"/drop/{given}")
    assert leases(daemon) == []
    assert int(get("/version_number")) > 0
    with pytest.raises(urllib.error.HTTPError):
        get("/get", Origin="http://evil.example")
    assert leases(daemon) == []


@pytest.mark.parametrize(("key", "value"), [("portserver", "relative"), ("grpc_port_server", "0.0.0.0:32766")])
def test_unusable_compat_setting_is_refused_at_start(make_daemon: MakeDaemon, key: str, value: str) -> None:  # noqa: F811
    daemon = make_daemon(extra=f'[compat]\n{key} = "{value}"')
    found = subprocess.run([*daemon.command, "--check-config"], env=daemon.environ, capture_output=True, text=True)
    assert found.returncode != 0
    assert f"compat.{key}" in found.stderr
