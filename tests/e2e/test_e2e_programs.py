"""Programs that people run, as they run them: in the background, as another user, on localhost, on the wrong port.

Each is the real program; a test whose program is not installed is skipped and says which.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Daemon, Stream, wait_for
from tests.e2e.programs import Programs, need

NAMES = "127.0.0.1 {host}\n::1 localhost\n"
"""/etc/hosts as Debian's installer writes it: localhost is ::1 first."""

SERVER = """
import os, socket, sys
address, port, reuse = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if reuse:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
server.bind((address, port))
server.listen()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def programs(daemon: Daemon) -> Iterator[Programs]:
    programs = Programs(daemon)
    yield programs
    programs.end()


def is_in_force(lease: Any) -> bool:
    with socket.create_connection((lease["listening"][0], lease["port"]), 5):
        return True


# --- in the background ---


def test_redis_that_daemonizes_keeps_its_lease(programs: Programs) -> None:
    redis = need("redis-server")
    words = ["--port", "{port}", "--bind", "127.0.0.1", "--save", "", "--daemonize", "yes", "--dir", "/tmp"]
    with Stream(programs.daemon, "?service=cache") as stream:
        starter = programs.run("cache", redis, *words)
        assert starter.wait(20) == 0
        granted, passed = (
            stream.until(lambda event, kind=kind: event.type == kind)[-1] for kind in ("granted", "passed")
        )
    lease = programs.lease_of("cache")
    assert lease["id"] == granted.data["lease"]["id"] == passed.data["lease"]["id"]
    assert lease["owner"]["pid"] != starter.pid
    assert is_in_force(lease)
    os.kill(lease["owner"]["pid"], signal.SIGKILL)
    wait_for(lambda: programs.daemon.show(lease["id"])["state"] == "ended", "the lease ends with redis")


def test_nginx_in_the_background_keeps_its_lease(programs: Programs, tmp_path: Path) -> None:
    nginx = need("nginx")
    script = (
        f'echo "pid {tmp_path}/pid; error_log /dev/null; events {{}} http {{ access_log off; server {{ listen '
        f'127.0.0.1:$PORT; }} }}" >{tmp_path}/conf; exec {nginx} -p {tmp_path} -c {tmp_path}/conf'
    )
    starter = programs.run("web", "sh", "-c", script)
    assert starter.wait(20) == 0
    lease = programs.lease_of("web")
    assert lease["owner"]["pid"] == int((tmp_path / "pid").read_text())
    assert is_in_force(lease)


def test_server_in_session_of_its_own_outlives_its_shell(programs: Programs) -> None:
    need("setsid")
    shell = programs.run("tail", "sh", "-c", f"setsid {sys.executable} -m http.server $PORT --bind 127.0.0.1 & exit")
    assert shell.wait(20) == 0
    lease = programs.lease_of("tail")
    assert lease["owner"]["pid"] != shell.pid
    assert is_in_force(lease)


def test_a_script_that_leases_and_starts_a_daemon_is_bound(programs: Programs) -> None:
    redis = need("redis-server")
    lease_it = f"{sys.executable} -m portd lease db --pid $$"
    script = f"PORT=$({lease_it}); {redis} --port $PORT --daemonize yes --save '' --dir /tmp >/dev/null; read x"
    programs.start("sh", "-c", script)
    lease = programs.lease_of("db")
    assert lease["vouched_by"] == "uid"


# --- as another user ---


def test_memcached_lease_ends_with_its_exit_after_setuid(programs: Programs) -> None:
    memcached = need("memcached")
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    server = programs.run("objects", memcached, "-u", "nobody", "-l", "{host}", "-p", "{port}", "-U", "0")
    lease = programs.lease_of("objects")
    wait_for(lambda: programs.daemon.show(lease["id"])["owner"]["user"] == "nobody", "the owner is nobody")
    assert programs.daemon.show(lease["id"])["uid"] == 0
    server.kill()
    wait_for(lambda: programs.daemon.show(lease["id"])["state"] == "ended", "the lease ends with memcached")


# --- on another address or port ---


def test_a_server_on_localhost_is_bound_where_localhost_is_ipv6(programs: Programs, tmp_path: Path) -> None:
    node = need("node")
    if os.geteuid() != 0:
        pytest.skip("needs root, for an /etc/hosts of its own")
    (tmp_path / "hosts").write_text(NAMES.format(host=os.uname().nodename))
    script = "require('http').createServer().listen(process.env.PORT, 'localhost')"
    mounted = f'mount --bind {tmp_path}/hosts /etc/hosts && exec {node} -e "$1"'
    programs.run("vite", "unshare", "-m", "sh", "-c", mounted, "sh", script)
    lease = programs.lease_of("vite")
    assert (lease["address"], lease["listening"]) == ("127.0.0.1", ["::1"])
    assert is_in_force(lease)


def test_a_program_that_ignores_its_port_is_shown_elsewhere(programs: Programs) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    programs.run("stubborn", "sh", "-c", f"{sys.executable} -m http.server {port} --bind 127.0.0.1; :")
    lease = programs.lease_of("stubborn", "held")
    wait_for(
        lambda: programs.daemon.show(lease["id"])["elsewhere"] == [{"address": "127.0.0.1", "port": port}],
        "the port that it listens on instead is shown",
    )
    assert programs.daemon.show(lease["id"])["state"] == "held"


# --- who runs ---


def test_owner_of_held_lease_is_program_that_runs_now(programs: Programs) -> None:
    programs.run("napping", "sleep", "1000")
    lease = programs.lease_of("napping", "held")
    wait_for(lambda: programs.daemon.show(lease["id"])["owner"]["cmdline"] == ["sleep", "1000"], "the exec is seen")


def test_a_second_server_by_reuseport_is_a_conflict_and_named(programs: Programs) -> None:
    other = programs.start(sys.executable, "-c", "import sys; exec(sys.stdin.readline())")
    programs.run("shared", sys.executable, "-c", SERVER, "127.0.0.1", "{port}", "reuse")
    lease = programs.lease_of("shared")
    with Stream(programs.daemon, "?service=shared") as stream:
        assert other.stdin is not None
        program = SERVER.replace("sys.argv[1]", "'127.0.0.1'").replace("sys.argv[2]", str(lease["port"]))
        other.stdin.write(f"exec({program.replace('sys.argv[3:]', 'True')!r})\n")
        other.stdin.flush()
        event = stream.until(lambda event: event.type == "conflict")[-1]
    assert event.data["foreign"]["pid"] == other.pid
    assert event.data["lease"]["listening"] == ["127.0.0.1"]


def test_descendant_stays_one_when_its_parent_and_daemon_are_gone(programs: Programs, tmp_path: Path) -> None:
    middle = f"{sys.executable} -m http.server $PORT --bind 127.0.0.1 & echo $$ >{tmp_path}/pid; wait"
    programs.run("deep", "sh", "-c", f"sh -c '{middle}'; sleep 1000; :")
    lease = programs.lease_of("deep")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    programs.daemon.lease("durable", ttl=60)  # what was observed before it is on the disk with it
    programs.daemon.restart(signal.SIGKILL)
    assert programs.lease_of("deep")["id"] == lease["id"]
    assert programs.daemon.show(lease["id"])["vouched_by"] == "descendant"


# --- adopted and transferred ---


def test_a_server_that_runs_already_is_adopted(programs: Programs) -> None:
    redis = need("redis-server")
    port = programs.daemon.first_port + 7
    server = programs.start(redis, "--port", str(port), "--save", "", "--dir", "/tmp")
    wait_for(lambda: programs.daemon.verdict(port) == "unmanaged", "redis listens")
    reply = programs.daemon.call("POST", "/v1/leases", {"service": "db", "port": port, "adopt": True})
    assert (reply.status, reply.body["state"], reply.body["owner"]["pid"]) == (201, "bound", server.pid)
    again = programs.daemon.call("POST", "/v1/leases", {"service": "other", "port": port, "adopt": True})
    assert (again.status, again.code) == (409, "port_taken")
    assert programs.lease_of("db")["id"] == reply.body["id"]
    server.kill()
    wait_for(lambda: programs.daemon.show(reply.body["id"])["state"] == "ended", "the lease ends with redis")


def test_a_lease_is_transferred_to_another_process(programs: Programs) -> None:
    first = programs.start("sleep", "1000")
    second = programs.start("sleep", "1000")
    lease = programs.daemon.lease("handed", pid=first.pid)
    reply = programs.daemon.call("POST", f"/v1/leases/{lease['id']}/transfer", {"pid": second.pid})
    assert (reply.status, reply.body["owner"]["pid"]) == (200, second.pid)
    first.kill()
    first.wait()
    assert programs.daemon.show(lease["id"])["state"] == "held"
    second.kill()
    wait_for(lambda: programs.daemon.show(lease["id"])["state"] == "ended", "the lease ends with its new owner")
