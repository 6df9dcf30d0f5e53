"""Hosts that lack something: descriptors, IPv6, /proc of others, a locale. portd serves, and says what is missing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import DEADLINE_S, NOBODY, ROOT, owner, wait_for

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces and other users")


def test_static_ports_are_given_to_their_endpoints(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    ports = {"main": daemon.first_port, "metrics": daemon.first_port + 1}
    daemon.configure(f"[static.postgres.ports]\nmain = {ports['main']}\nmetrics = {ports['metrics']}")
    daemon.start()
    for endpoint, port in ports.items():
        lease = daemon.lease("postgres", endpoint=endpoint, ttl=60, instance="postgres-1")
        assert (lease["port"], lease["lifetime"]) == (port, "ttl")
    assert daemon.lease("other", ttl=60)["port"] not in ports.values()


def test_at_file_limit_grants_are_refused_and_rest_goes_on(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(port_count=400).start("prlimit", "--nofile=256:256")
    with daemon.connect() as connection:
        count = 0
        while (reply := connection.call("POST", "/v1/leases", {"service": "many", "ttl": 600})).status == 201:
            count += 1
            assert count < 400
        assert (reply.status, reply.code) == (503, "busy"), reply
        assert reply.headers["retry-after"]
        assert len(connection.call("GET", "/v1/leases?limit=1000").body["leases"]) == count
        assert any("file limit" in warning for warning in connection.call("GET", "/v1/status").body["warnings"])
        for lease in connection.call("GET", "/v1/leases?limit=20").body["leases"]:
            assert connection.call("DELETE", f"/v1/leases/{lease['id']}").status == 204
    with daemon.connect() as connection:
        assert connection.call("POST", "/v1/leases", {"service": "again", "ttl": 60}).status == 201


def test_a_start_copes_with_more_leases_than_descriptors(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(port_count=400).start()
    with daemon.connect() as connection:
        for _ in range(10):
            assert connection.call("POST", "/v1/leases", [{"service": "many", "ttl": 600}] * 30).status == 201
    daemon.stop()
    daemon.errors.append("")
    daemon.start("prlimit", "--nofile=200:200")
    assert len(daemon.leases()) == 300
    assert any("file limit" in warning for warning in daemon.get("/v1/status")["warnings"])


@needs_root
def test_without_ipv6_ports_are_leased_and_v6_addresses_refused(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    script = 'echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; exec "$@"'
    daemon.start("unshare", "-n", "sh", "-c", f"ip link set lo up; {script}", "sh")
    pid = daemon.pid
    lease = daemon.call("POST", "/v1/leases", {"service": "v4", "ttl": 60})
    assert lease.status in (201, 422), "this test's process is in another network namespace than the daemon"
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-m", "portd"]
    for address, status in (("127.0.0.1", 0), ("::1", 2)):
        command = [*inside, "lease", "orders", "--address", address, "--ttl", "60"]
        done = subprocess.run(command, env=daemon.environ, capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == status, (address, done.stderr)


@needs_root
def test_without_cap_sys_ptrace_other_users_owners_are_still_watched(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
    with owner(user=NOBODY) as process:
        lease = daemon.lease("orders", pid=process.pid)
        assert lease["uid"] == NOBODY
        process.kill()
        process.wait()
        wait_for(lambda: daemon.show(lease["id"])["state"] == "ended", "the exit is noticed")


@needs_root
def test_caller_hidden_by_hidepid_gets_a_remedy(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.directory.chmod(0o777)
    script = 'mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"'
    daemon.log_path.touch()
    shutil.chown(daemon.log_path, NOBODY)
    daemon.directory.chmod(0o755)
    shutil.chown(daemon.directory, NOBODY)
    daemon.start("unshare", "-m", "sh", "-c", script, "sh")
    daemon.socket.chmod(0o666)
    reply = daemon.call("POST", "/v1/leases", {"service": "orders"})
    assert reply.status in (400, 422), reply
    assert "process" in reply.body["detail"]


@pytest.mark.parametrize("locale", ["C", "POSIX", "de_DE.ISO-8859-1"])
def test_any_locale_is_served_and_shown(make_daemon: MakeDaemon, locale: str) -> None:
    daemon = make_daemon(prelude=f"import os; os.environ['LC_ALL'] = {locale!r}").start()
    name = "\N{GREEK SMALL LETTER ALPHA}"
    daemon.lease("orders", ttl=60, metadata={"name": name})
    environ = {**daemon.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONPATH": f"{ROOT}"}
    for command in (["ls"], ["ls", "--json"], ["status"]):
        done = subprocess.run(
            [sys.executable, "-m", "portd", *command], env=environ, capture_output=True, timeout=DEADLINE_S
        )
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr


def test_a_taken_dns_port_is_reported_and_leases_go_on(make_daemon: MakeDaemon) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        daemon = make_daemon()
        daemon.errors.append("")
        text = (daemon.directory / "portd.toml").read_text()
        (daemon.directory / "portd.toml").write_text(text.replace('listen = ""', f'listen = "127.0.0.1:{port}"'))
        daemon.start()
        assert daemon.lease("orders", ttl=60)["port"]
        assert daemon.get("/v1/status")["dns"]["problem"]
