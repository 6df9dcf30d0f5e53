"""What the listings show, on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys

from tests.cli.bed import DEADLINE_S, Daemon, end, serving, wait_for


def test_ls_in_a_pipe_is_tab_separated(daemon: Daemon) -> None:
    port = daemon.portd("lease", "plain", "--ttl", "60").stdout.strip()
    lines = daemon.portd("ls", "plain").stdout.splitlines()
    assert len(lines) == 1
    cells = lines[0].split("\t")
    assert cells[:2] == ["plain", "plain-1"]
    assert port in cells[2]
    assert "held" in cells


def test_ls_as_json_is_what_the_api_says(daemon: Daemon) -> None:
    daemon.portd("lease", "jason", "--ttl", "60")
    [shown] = json.loads(daemon.portd("ls", "jason", "--json").stdout)["leases"]
    [stored] = daemon.client.leases(service="jason")
    assert (shown["id"], shown["port"]) == (stored["id"], stored["port"])


def test_ls_of_an_unknown_service_is_a_clear_no(daemon: Daemon) -> None:
    done = daemon.portd("ls", "nobody-here")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_on_a_terminal_ls_is_a_table_with_a_header(daemon: Daemon) -> None:
    daemon.portd("lease", "shown", "--ttl", "60")
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        child = subprocess.Popen(
            [sys.executable, "-m", "portd", "ls", "shown"],
            stdout=theirs,
            stderr=theirs,
            stdin=theirs,
            env={**daemon.environ, "TERM": "xterm", "COLUMNS": "140"},
        )
        os.close(theirs)
        seen = b""
        try:
            while part := terminal.read(4096):
                seen += part
        except OSError:
            pass  # Linux reports the end of a terminal whose other side is closed as EIO
        assert child.wait(DEADLINE_S) == 0
    assert b"SERVICE" in seen
    assert b"shown-1" in seen


def test_a_reader_that_goes_away_is_no_error(daemon: Daemon) -> None:
    daemon.portd("lease", "piped", "--ttl", "60")
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m portd ls | true"],
        env=daemon.environ,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.stderr == ""


def test_unwritable_output_is_reported_in_one_line(daemon: Daemon) -> None:
    daemon.portd("lease", "unwritten", "--ttl", "60")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "portd", "ls"],
            env=daemon.environ,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "portd: No space left on device\n")


def test_who_names_a_process_that_never_heard_of_portd(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = str(foreign.getsockname()[1])
        plain = daemon.portd("who", port)
        view = json.loads(daemon.portd("who", port, "--json").stdout)
    assert plain.returncode == 0
    assert str(os.getpid()) in plain.stdout
    assert view["verdict"] == "unmanaged"
    assert view["listeners"][0]["pid"] == os.getpid()


def test_who_names_the_lease_and_its_owner(daemon: Daemon) -> None:
    port = daemon.portd("lease", "named", "--pid", str(os.getpid())).stdout.strip()
    done = daemon.portd("who", port)
    assert done.returncode == 0
    assert "named-1" in done.stdout
    assert str(os.getpid()) in done.stdout


def test_who_of_a_free_port_is_a_clear_no(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = str(gone.getsockname()[1])
    done = daemon.portd("who", port)
    assert done.returncode == 1
    assert json.loads(daemon.portd("who", port, "--json").stdout)["verdict"] == "free"


def test_history_shows_who_had_a_port(daemon: Daemon) -> None:
    lease = json.loads(daemon.portd("lease", "past", "--ttl", "60", "--json").stdout)
    daemon.portd("release", lease["id"])
    shown = json.loads(daemon.portd("history", str(lease["port"]), "--json").stdout)["leases"]
    assert (shown[0]["id"], shown[0]["ended_because"]) == (lease["id"], "released")
    assert "past-1" in daemon.portd("history", str(lease["port"])).stdout
    assert daemon.portd("history", "1").returncode == 1


def test_services_counts_instances(daemon: Daemon) -> None:
    for _ in range(2):
        daemon.portd("lease", "counted", "--ttl", "60")
    [line] = [line for line in daemon.portd("services").stdout.splitlines() if line.startswith("counted\t")]
    assert line.split("\t")[1] == "2"


def test_resolve_prints_all_serving_instances_or_one(daemon: Daemon) -> None:
    with serving(daemon, "many") as first, serving(daemon, "many") as second:
        found = daemon.portd("resolve", "many").stdout.splitlines()
        [one] = daemon.portd("resolve", "many", "--one").stdout.splitlines()
    assert sorted(found) == sorted(f"127.0.0.1:{port}" for port in (first, second))
    assert one in found


def test_resolve_selects_by_endpoint_and_tag(daemon: Daemon) -> None:
    with serving(daemon, "tagged", "--tag", "blue") as blue, serving(daemon, "tagged", "--tag", "green"):
        assert daemon.portd("resolve", "tagged", "--tag", "blue").stdout == f"127.0.0.1:{blue}\n"
        assert daemon.portd("resolve", "tagged", "--endpoint", "metrics").returncode == 1


def test_watch_prints_what_happens_as_it_happens(daemon: Daemon) -> None:
    watcher = daemon.start_portd("watch", "seen", "--json", "--after", "0")
    assert watcher.stdout is not None
    try:
        lease = json.loads(daemon.portd("lease", "seen", "--ttl", "60", "--json").stdout)
        granted = json.loads(watcher.stdout.readline())
        daemon.portd("release", lease["id"])
        ended = json.loads(watcher.stdout.readline())
    finally:
        end(watcher)
    assert [(event["type"], event["lease"]["id"]) for event in (granted, ended)] == [
        ("granted", lease["id"]),
        ("ended", lease["id"]),
    ]


def test_watch_misses_nothing_over_a_restart_of_the_daemon(own_daemon: Daemon) -> None:
    own_daemon.start()
    own_daemon.portd("lease", "first", "--ttl", "60")
    watcher = own_daemon.start_portd("watch", "--json", "--after", "0")
    assert watcher.stdout is not None
    try:
        assert json.loads(watcher.stdout.readline())["service"] == "first"
        own_daemon.stop()
        own_daemon.start()
        own_daemon.portd("lease", "second", "--ttl", "60")
        line = watcher.stdout.readline()
        while not line.startswith("{"):
            line = watcher.stdout.readline()  # a note on the way, on stderr
        assert json.loads(line)["service"] == "second"
    finally:
        end(watcher)


def test_status_shows_pools(daemon: Daemon) -> None:
    assert json.loads(daemon.portd("status", "--json").stdout)["pools"]["default"]["size"] == 400
    assert "default" in daemon.portd("status").stdout


def test_browse_as_json_lists_the_lan(daemon: Daemon) -> None:
    done = daemon.portd("browse", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["services"] == []


def test_state_follows_the_listener(daemon: Daemon) -> None:
    lease = json.loads(daemon.portd("lease", "follows", "--pid", str(os.getpid()), "--json").stdout)
    with socket.create_server(("127.0.0.1", lease["port"])):
        wait_for(lambda: "bound" in daemon.portd("ls", "follows").stdout, "the lease is seen bound")
    wait_for(lambda: "held" in daemon.portd("ls", "follows").stdout, "the lease is seen held again")
