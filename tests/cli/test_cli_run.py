"""What `portd run` promises to the service that it becomes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.bed import Daemon, end, wait_for
from tests.support.ports import free_tcp_port

REPORT = "import json, os, sys; print(json.dumps({'pid': os.getpid(), 'env': dict(os.environ), 'words': sys.argv[1:]}))"


def reported(daemon: Daemon, *words: str, command: tuple[str, ...] = ()) -> tuple[dict[str, Any], int]:
    """Run a program that reports what it got; return that, and the pid of the process that was started."""
    started = daemon.start_portd("run", *words, "--", sys.executable, "-c", REPORT, *command)
    written, _ = started.communicate(timeout=20)
    return json.loads(written), started.pid


def test_the_command_replaces_portd_under_the_same_pid(daemon: Daemon) -> None:
    got, pid = reported(daemon, "becomes")
    assert got["pid"] == pid


def test_the_command_gets_its_lease_by_environment_and_placeholders(daemon: Daemon) -> None:
    port = daemon.last_port - 22
    got, pid = reported(
        daemon,
        "given-to",
        "--tag",
        "blue",
        "--endpoint",
        "metrics",
        "--endpoint",
        f"grpc-web:{port}",
        command=("--bind={host}:{port}", "{port:metrics},{port:grpc-web}", "{other}"),
    )
    environ = got["env"]
    lease = daemon.client.lease(environ["PORTD_LEASE"])
    assert (lease["service"], lease["endpoint"], lease["owner"]["pid"]) == ("given-to", "main", pid)
    assert environ["PORT"] == str(lease["port"])
    assert environ["HOST"] == "127.0.0.1"
    assert environ["PORTD_TOKEN"]
    assert environ["PORTD_URL"] == daemon.url
    assert environ["PORT_GRPC_WEB"] == str(port)
    assert got["words"] == [f"--bind=127.0.0.1:{environ['PORT']}", f"{environ['PORT_METRICS']},{port}", "{other}"]


def test_all_endpoints_are_of_one_instance_and_end_with_command(daemon: Daemon) -> None:
    running = daemon.start_portd("run", "ends", "--endpoint", "metrics", "--", "cat")
    leases = wait_for(lambda: list(daemon.client.leases(service="ends")), "the leases are there")
    try:
        assert {lease["instance"] for lease in leases} == {"ends-1"}
        assert {lease["endpoint"] for lease in leases} == {"main", "metrics"}
    finally:
        end(running)
    wait_for(lambda: not list(daemon.client.leases(service="ends")), "the leases end")
    assert {daemon.client.lease(lease["id"])["ended_because"] for lease in leases} == {"owner_exited"}


def test_the_lease_becomes_bound_when_the_command_listens(daemon: Daemon) -> None:
    running = daemon.start_portd(
        "run",
        "served",
        "--check",
        "tcp:interval=1",
        "--",
        sys.executable,
        "-m",
        "http.server",
        "{port}",
        "--bind",
        "{host}",
    )
    try:
        [lease] = wait_for(
            lambda: [lease for lease in daemon.client.leases(service="served") if lease["state"] == "bound"],
            "the lease is bound",
        )
        assert lease["owner"]["pid"] == running.pid
    finally:
        end(running)


def test_the_exit_status_is_the_commands(daemon: Daemon) -> None:
    assert daemon.portd("run", "status", "--", "sh", "-c", "exit 7").returncode == 7


def test_command_that_cannot_run_leaves_one_line_and_no_lease(daemon: Daemon) -> None:
    done = daemon.portd("run", "missing", "--", "/nonexistent/program")
    assert (done.returncode, done.stderr.count("\n")) == (127, 1)
    assert "/nonexistent/program" in done.stderr
    assert not list(daemon.client.leases(service="missing"))


def test_own_address_is_given_as_host(daemon: Daemon) -> None:
    port = str(free_tcp_port("0.0.0.0"))  # a well-known one may be listened on at every address of this host
    got, _ = reported(daemon, "postgres", "--own-address", "--port", port)
    assert got["env"]["PORT"] == port
    assert got["env"]["HOST"].startswith("127.77.")


def test_confine_lets_command_bind_its_leased_ports_and_no_others(daemon: Daemon) -> None:
    source = (
        "import errno, os, socket\n"
        "def bind(port):\n"
        "    with socket.socket() as one:\n"
        "        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "        try: one.bind(('127.0.0.1', port))\n"
        "        except PermissionError: return 'refused'\n"
        "        return 'bound'\n"
        "child = os.fork()\n"
        "if child: os.waitpid(child, 0)\n"
        "print([bind(int(os.environ['PORT'])), bind(int(os.environ['PORT_METRICS'])), bind(0), bind(24999)],"
        " flush=True)\n"
    )
    done = daemon.portd("run", "confined", "--confine", "--endpoint", "metrics", "--", sys.executable, "-c", source)
    if done.returncode and "Landlock" in done.stderr:
        pytest.skip("this kernel has no Landlock network rules")
    assert done.stdout.splitlines() == ["['bound', 'bound', 'refused', 'refused']"] * 2, done


def test_confine_keeps_further_ports_of_the_handoff_away(daemon: Daemon) -> None:
    source = (
        "import json, os, socket\n"
        "try:\n"
        "    one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "    one.connect(os.environ['PORTD_URL'].removeprefix('unix://').replace('portd.sock', 'handoff.sock'))\n"
        "    one.send(json.dumps({'request': {'service': 'further'}, 'listen': True}).encode())\n"
        "    print('received', socket.recv_fds(one, 65536, 2)[1])\n"
        "except PermissionError: print('refused')\n"
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(os.environ['PORTD_URL'].removeprefix('unix://'))\n"
    )
    free = daemon.portd("run", "unconfined", "--", sys.executable, "-c", source)
    assert free.stdout.startswith("received ["), free
    wait_for(lambda: not list(daemon.client.leases(service="further")), "the lease of the unconfined program has ended")
    done = daemon.portd("run", "confined", "--confine", "--", sys.executable, "-c", source)
    if done.returncode and "--confine" in done.stderr:
        pytest.skip("this kernel can't confine")
    assert (done.returncode, done.stdout) == (0, "refused\n")
    assert not list(daemon.client.leases(service="further"))


def test_a_machine_without_a_known_filter_is_refused() -> None:
    from portd.cli import confining

    with pytest.raises(confining.ConfinementUnavailable, match="s390x"):
        confining.handoff_filter("s390x")


def test_confinement_that_the_kernel_lacks_is_an_error(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    from portd.cli import confining

    monkeypatch.setattr(confining, "ABI_WITH_NETWORK", 1 << 20)
    with pytest.raises(confining.ConfinementUnavailable, match="Landlock"):
        confining.confine([24000])


def test_sockets_are_passed_from_descriptor_3_with_names(daemon: Daemon) -> None:
    if not (daemon.directory / "handoff.sock").exists():
        pytest.skip("this daemon hands no sockets over")
    source = (
        "import json, os, socket\n"
        "sockets = [socket.socket(fileno=fd) for fd in range(3, 3 + int(os.environ['LISTEN_FDS']))]\n"
        "print(json.dumps({'pid': os.environ['LISTEN_PID'] == str(os.getpid()),"
        " 'names': os.environ['LISTEN_FDNAMES'], 'ports': [str(one.getsockname()[1]) for one in sockets],"
        " 'wanted': [os.environ['PORT'], os.environ['PORT_METRICS']]}), flush=True)\n"
        "connection, _ = sockets[0].accept()\n"
        "connection.sendall(b'hello')\n"
    )
    running = daemon.start_portd(
        "run", "passed", "--socket", "--hold", "exclusive", "--endpoint", "metrics", "--", sys.executable, "-c", source
    )
    assert running.stdout is not None
    try:
        got = json.loads(running.stdout.readline())
        assert got["pid"]
        assert got["names"] == "main:metrics"
        assert got["ports"] == got["wanted"]
        with socket.create_connection(("127.0.0.1", int(got["ports"][0])), 10) as caller:
            assert caller.recv(5) == b"hello"
    finally:
        end(running)


def test_the_command_does_not_inherit_pythons_ignored_signals(daemon: Daemon) -> None:
    done = daemon.portd("run", "signals", "--", "grep", "SigIgn", "/proc/self/status")
    ignored = int(done.stdout.split()[1], 16)
    assert not ignored & 1 << (signal.SIGPIPE - 1)
    assert not ignored & 1 << (signal.SIGXFSZ - 1)


def test_variables_are_set_with_placeholders_filled_in(daemon: Daemon) -> None:
    got, _ = reported(
        daemon,
        "named-env",
        "--port-env",
        "VITE_PORT",
        "--env",
        "API={url}/v1",
        "--env",
        "M={port:m}",
        "--endpoint",
        "m",
    )
    environ = got["env"]
    assert environ["VITE_PORT"] == environ["PORT"]
    assert environ["API"] == f"http://127.0.0.1:{environ['PORT']}/v1"
    assert environ["M"] == environ["PORT_M"]


def test_a_script_without_interpreter_line_runs_under_sh(daemon: Daemon, tmp_path: Path) -> None:
    script = tmp_path / "plain"
    script.write_text('echo "$PORT-$1"\n')
    script.chmod(0o755)
    done = daemon.portd("run", "plain-script", "--", str(script), "{port}")
    port, _, argument = done.stdout.strip().partition("-")
    assert (done.returncode, port) == (0, argument)
    found = daemon.portd("run", "plain-script", "--", "plain", PATH=f"{tmp_path}:/usr/bin")
    assert found.returncode == 0


def test_the_environment_gains_nothing_but_what_is_documented(daemon: Daemon) -> None:
    kept = {name: value for name, value in daemon.environ.items() if name.startswith("PYTHON")}
    given = {"PORTD_URL": daemon.url, "PATH": os.environ["PATH"], **kept}
    command = [sys.executable, "-m", "portd", "run", "bare-env", "--", "env"]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=20, check=True)
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert names - set(given) == {"PORT", "HOST", "PORTD_LEASE", "PORTD_TOKEN", "PORTD_PUBLIC_URL"}


def test_a_locale_that_was_given_stays(daemon: Daemon) -> None:
    done = daemon.portd("run", "locale", "--", "env", LC_CTYPE="C.UTF-8")
    assert "LC_CTYPE=C.UTF-8" in done.stdout.splitlines()


def test_a_mistyped_placeholder_is_reported_and_the_command_runs(daemon: Daemon) -> None:
    done = daemon.portd("run", "mistyped", "--", "echo", "{PORT}")
    assert (done.returncode, done.stdout) == (0, "{PORT}\n")
    assert "{PORT} is not filled in" in done.stderr


def test_an_endpoint_has_a_check_of_its_own(daemon: Daemon) -> None:
    got, _ = reported(
        daemon, "checked", "--check", "tcp", "--endpoint", "admin", "--check-endpoint", "admin=http:/ready"
    )
    environ = got["env"]
    checks = [daemon.client.lease(environ[name])["check"] for name in ("PORTD_LEASE", "PORTD_LEASE_ADMIN")]
    assert [check and check["kind"] for check in checks] == ["tcp", "http"]


def test_an_endpoint_may_be_relative_to_the_main_port(daemon: Daemon) -> None:
    got, _ = reported(daemon, "related", "--endpoint", "bus:+7")
    assert int(got["env"]["PORT_BUS"]) == int(got["env"]["PORT"]) + 7


def test_the_first_free_of_several_ports_is_leased(daemon: Daemon) -> None:
    first = daemon.last_port - 19
    with socket.create_server(("127.0.0.1", first)):
        got, _ = reported(daemon, "several", "--port", f"{first},{first + 1}-{first + 5}", "--exact")
    assert got["env"]["PORT"] == str(first + 1)


def test_localhost_is_given_as_host(daemon: Daemon) -> None:
    got, _ = reported(daemon, "both-families", "--address", "localhost", "--env", "URL={url}")
    assert got["env"]["HOST"] == "localhost"
    assert got["env"]["URL"] == f"http://localhost:{got['env']['PORT']}"
