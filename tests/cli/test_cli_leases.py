"""What the commands on leases promise to a shell script."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from portd._client import calls
from tests.cli.bed import DEADLINE_S, Daemon, end, serving, wait_for


def test_lease_prints_the_port_alone_and_the_port_is_leased(daemon: Daemon) -> None:
    done = daemon.portd("lease", "alone")
    assert (done.returncode, done.stderr) == (0, "")
    [lease] = daemon.client.leases(service="alone")
    assert done.stdout == f"{lease['port']}\n"


def test_a_lease_ends_with_the_calling_shell(daemon: Daemon) -> None:
    shell = daemon.start_program(["sh", "-c", f"'{sys.executable}' -m portd lease shelled; echo; cat"])
    assert shell.stdout is not None
    port = int(shell.stdout.readline())
    [lease] = daemon.client.leases(service="shelled")
    assert (lease["port"], lease["owner"]["pid"]) == (port, shell.pid)
    end(shell)
    wait_for(lambda: daemon.client.lease(lease["id"])["state"] == "ended", "the shell's lease ends")
    assert daemon.client.lease(lease["id"])["ended_because"] == "owner_exited"


def test_json_prints_the_whole_lease_with_its_token(daemon: Daemon) -> None:
    lease = json.loads(daemon.portd("lease", "whole", "--json", "--ttl", "60").stdout)
    assert lease["lifetime"] == "ttl"
    assert lease["token"]
    assert lease["owner"]["uid"] == os.getuid()


def test_every_option_reaches_the_daemon(daemon: Daemon) -> None:
    port = daemon.last_port - 9
    done = daemon.portd(
        "lease",
        "full",
        "--instance=full-blue",
        "--endpoint",
        "metrics",
        "--port",
        str(port),
        "--exact",
        "--ttl",
        "5m",
        "--tag",
        "blue",
        "--tag",
        "fast",
        "--meta",
        "version=1.4=2",
        "--check",
        "http:/healthz,interval=5,fall=2",
        "--pool",
        "default",
        "--hold",
        "none",
        "--json",
    )
    lease = json.loads(done.stdout)
    assert (lease["instance"], lease["endpoint"], lease["port"], lease["hold"]) == (
        "full-blue",
        "metrics",
        port,
        "none",
    )
    assert lease["tags"] == ["blue", "fast"]
    assert lease["metadata"] == {"version": "1.4=2"}
    assert (lease["check"]["path"], lease["check"]["interval"], lease["check"]["fall"]) == ("/healthz", 5, 2)


def test_own_address_gives_an_address_that_no_other_instance_has(daemon: Daemon) -> None:
    leases = [
        json.loads(
            daemon.portd(
                "lease", "database", "--own-address", "--port", "5432", "--exact", "--json", "--pid", str(os.getpid())
            ).stdout
        )
        for _ in range(2)
    ]
    assert [lease["port"] for lease in leases] == [5432, 5432]
    assert leases[0]["address"] != leases[1]["address"]


def test_a_taken_exact_port_is_a_clear_no(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = str(foreign.getsockname()[1])
        plain = daemon.portd("lease", "late", "--port", port, "--exact")
        as_json = daemon.portd("lease", "late", "--port", port, "--exact", "--json")
    assert (plain.returncode, plain.stdout, plain.stderr.count("\n")) == (1, "", 1)
    assert port in plain.stderr
    assert (as_json.returncode, as_json.stdout) == (1, "")
    assert json.loads(as_json.stderr)["code"] == "port_taken"


def test_renew_restarts_clock_of_ttl_lease_and_refuses_others(daemon: Daemon) -> None:
    with_clock = json.loads(daemon.portd("lease", "clock", "--ttl", "30", "--json").stdout)
    renewed = json.loads(daemon.portd("renew", with_clock["id"], "--ttl", "60", "--json").stdout)
    assert renewed["expires_at"] > with_clock["expires_at"]
    without = json.loads(daemon.portd("lease", "clock", "--pid", str(os.getpid()), "--json").stdout)
    refused = daemon.portd("renew", without["id"], "--json")
    assert (refused.returncode, json.loads(refused.stderr)["code"]) == (1, "no_clock")


def test_release_gives_the_port_back_and_may_be_called_again(daemon: Daemon) -> None:
    lease = json.loads(daemon.portd("lease", "given", "--ttl", "60", "--json").stdout)
    assert [daemon.portd("release", lease["id"]).returncode for _ in range(2)] == [0, 0]
    assert daemon.client.lease(lease["id"])["ended_because"] == "released"
    unknown = daemon.portd("release", "nosuchlease")
    assert (unknown.returncode, unknown.stderr.count("\n")) in {(0, 0), (1, 1)}


def test_drain_hides_an_instance_and_keeps_its_port(daemon: Daemon) -> None:
    with serving(daemon, "drained") as port:
        assert daemon.portd("resolve", "drained").stdout == f"127.0.0.1:{port}\n"
        assert daemon.portd("drain", "drained-1").returncode == 0
        hidden = daemon.portd("resolve", "drained")
        assert (hidden.returncode, hidden.stdout, hidden.stderr.count("\n")) == (1, "", 1)
        assert "draining" in hidden.stderr
        assert daemon.portd("drain", str(port), "--undo").returncode == 0
        assert daemon.portd("resolve", "drained").returncode == 0


def test_every_command_without_a_daemon_exits_with_3(daemon: Daemon) -> None:
    for words in (
        ["lease", "x"],
        ["ls"],
        ["who", "80"],
        ["resolve", "x"],
        ["status"],
        ["run", "x", "--", "true"],
        ["services"],
        ["history", "80"],
        ["renew", "x"],
    ):
        done = daemon.portd(*words, PORTD_URL="unix:///nonexistent/portd.sock")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1), (words, done)
        assert "portd serve" in done.stderr
    as_json = daemon.portd("lease", "x", "--json", PORTD_URL="unix:///nonexistent/portd.sock")
    assert as_json.returncode == 3
    assert "detail" in json.loads(as_json.stderr)


def test_wrong_usage_ends_with_2_and_one_line(daemon: Daemon) -> None:
    for words in (
        ["lease"],
        ["lease", "x", "y"],
        ["lease", "x", "--port", "seventy"],
        ["lease", "x", "--port", "0"],
        ["lease", "x", "--exact"],
        ["lease", "Bad_Name"],
        ["who", "70000"],
        ["nonsense"],
        ["lease", "x", "--nonsense"],
        ["run", "x"],
        ["run", "x", "--", "echo", "{port:metrics}"],
        ["lease", "x", "--check", "magic"],
        ["lease", "x", "--ttl", "soon"],
        ["lease", "x", "--meta", "k"],
        ["ls", "--json=1"],
    ):
        done = daemon.portd(*words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), (words, done)


def test_a_url_that_cannot_be_read_is_wrong_usage(daemon: Daemon) -> None:
    done = daemon.portd("ls", PORTD_URL="portd.sock")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done


def test_every_command_explains_itself(daemon: Daemon) -> None:
    overview = daemon.portd("--help")
    assert overview.returncode == 0
    for name in (
        "serve",
        "run",
        "lease",
        "renew",
        "release",
        "drain",
        "ls",
        "who",
        "history",
        "services",
        "resolve",
        "browse",
        "watch",
        "status",
        "doctor",
        "demo",
    ):
        assert f"  {name} " in overview.stdout
        own = daemon.portd(name, "--help")
        assert (own.returncode, own.stderr) == (0, ""), name
        assert own.stdout.startswith(f"usage: portd {name}")
        assert max(map(len, own.stdout.splitlines())) <= 120, name
    assert "MPTCP" in daemon.portd("run", "--help").stdout
    assert daemon.portd("--version").stdout.startswith("portd ")


def test_lease_costs_no_import_of_what_it_does_not_need(daemon: Daemon) -> None:
    source = (
        "import sys; from portd.__main__ import main; status = main(['lease', 'light', '--ttl', '60']);"
        "print(sorted({'re', 'json', 'socket', 'typing', 'argparse', 'asyncio', 'enum', 'aiohttp', 'msgspec'}"
        " & set(sys.modules))); sys.exit(status)"
    )
    # -S: an installed environment's .pth files may import re and more before the first line of ours
    done = subprocess.run(
        [sys.executable, "-S", "-c", source],
        env=daemon.environ,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert done.stdout.splitlines()[1] == "[]"


def test_adopt_leases_a_port_for_the_process_that_listens(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as running:
        port = running.getsockname()[1]
        done = daemon.portd("adopt", "adopted", str(port), "--tag", "old")
        assert (done.returncode, done.stderr) == (0, "")
        [lease] = daemon.client.leases(service="adopted")
        assert (lease["port"], lease["state"], lease["owner"]["pid"]) == (port, "bound", os.getpid())
        assert "adopted-1" in done.stdout
        assert daemon.portd("resolve", "adopted").stdout == f"127.0.0.1:{port}\n"
        assert daemon.portd("release", f":{port}").returncode == 0


def test_adopt_of_port_without_listener_is_clear_no(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    done = daemon.portd("adopt", "absent", str(port))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    done = daemon.portd("adopt", "absent", str(port), "--json")
    assert (done.returncode, json.loads(done.stderr)["code"]) == (1, "invalid_request")


def test_transfer_makes_another_process_the_owner(daemon: Daemon) -> None:
    daemon.portd("lease", "handed", "--pid", str(os.getpid()))
    heir = daemon.start_program(["sleep", "60"])
    try:
        done = daemon.portd("transfer", "handed-1", str(heir.pid), "--json")
        assert done.returncode == 0, done
        assert json.loads(done.stdout)["owner"]["pid"] == heir.pid
    finally:
        end(heir)
    wait_for(lambda: not list(daemon.client.leases(service="handed")), "the lease ends with its new owner")


def test_wait_leases_an_exact_port_once_it_is_free(daemon: Daemon) -> None:
    foreign = socket.create_server(("127.0.0.1", 0))
    port = foreign.getsockname()[1]
    words = ("lease", "patient", "--port", str(port), "--exact", "--ttl", "60")
    refused = daemon.portd(*words, "--wait", "0.2")
    waiting = daemon.start_portd(*words, "--wait=15")
    with foreign:
        assert refused.returncode == 1
        wait_for(lambda: daemon.client.call(calls.status())["counts"]["connections"] > 1, "the request waits")
    written, _ = waiting.communicate(timeout=DEADLINE_S)
    assert (waiting.returncode, written) == (0, f"{port}\n")
