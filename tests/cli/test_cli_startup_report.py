"""What `portd run` says on a terminal, and that it is silent elsewhere."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from portd.cli import startup_report
from portd.cli.startup_report import DONE, ELSEWHERE_S
from tests.cli.bed import DEADLINE_S, Daemon, wait_for

LEASE: dict[str, Any] = {
    "instance": "web-1",
    "address": "127.0.0.1",
    "port": 22000,
    "state": "held",
    "hold": "shared",
    "listening": [],
    "elsewhere": [],
}
VITE = [{"address": "::1", "port": 5173}]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, None),
        ({"state": "bound", "listening": ["127.0.0.1"]}, DONE),
        ({"state": "ended", "ended_because": "released"}, DONE),
        ({"state": "bound", "listening": ["0.0.0.0"]}, "listens on 0.0.0.0:22000: open to the LAN"),
        ({"elsewhere": VITE}, "listens on [::1]:5173 instead of 22000"),
        ({"state": "conflict"}, "portd who 22000"),
        ({"state": "ended", "ended_because": "owner_exited"}, "--hold none or --socket"),
    ],
)
def test_the_verdict_names_what_is_wrong(fields: dict[str, Any], said: str | None) -> None:
    verdict = startup_report.verdict({**LEASE, **fields}, ELSEWHERE_S)
    assert verdict == said if not said else verdict is not None and said in verdict


def test_a_port_opened_elsewhere_counts_after_a_while_only() -> None:
    assert startup_report.verdict({**LEASE, "elsewhere": VITE}, ELSEWHERE_S / 2) is None


def test_without_a_hold_an_exit_has_no_hint_about_holds() -> None:
    ended = {**LEASE, "state": "ended", "ended_because": "owner_exited", "hold": "none"}
    assert "--hold" not in (startup_report.verdict(ended, 1.0) or "")


class Terminal:
    """A pseudo-terminal with a program on it, and what has been written there."""

    def __init__(self, program: subprocess.Popen[bytes], descriptor: int) -> None:
        self.program = program
        self._descriptor = descriptor
        self.text = ""

    def shows(self, text: str) -> bool:
        """Read what there is, and tell whether a text has appeared."""
        with suppress(OSError):  # nothing yet; or EIO, Linux's end of a terminal
            self.text += os.read(self._descriptor, 65536).decode()
        return text in self.text


@contextmanager
def on_terminal(daemon: Daemon, *words: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    program = subprocess.Popen(
        [sys.executable, "-m", "portd", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=daemon.environ,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(program, ours)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.wait(DEADLINE_S)
        os.close(ours)


def wait_until_shown(terminal: Terminal, text: str) -> None:
    wait_for(lambda: terminal.shows(text), f"the terminal shows {text!r}")


def test_terminal_shows_instance_and_url_and_who_has_port(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = foreign.getsockname()[1]
        with on_terminal(daemon, "run", "asked", "--port", str(port), "--", "cat") as terminal:
            wait_until_shown(terminal, f"({port} is taken by ")
            [lease] = daemon.client.leases(service="asked")
            assert f"portd: asked-1 on http://127.0.0.1:{lease['port']} ({port} is taken by python" in terminal.text


def test_a_terminal_shows_that_a_command_exited_without_listening(daemon: Daemon) -> None:
    with on_terminal(daemon, "run", "mute", "--", "true") as terminal:
        wait_until_shown(terminal, "mute-1 exited without listening on port")


def test_service_that_listens_where_it_should_is_not_commented_on(daemon: Daemon) -> None:
    words = ("run", "fine", "--", sys.executable, "-m", "http.server", "{port}", "--bind", "{host}")
    with on_terminal(daemon, *words) as terminal:
        wait_for(lambda: [one["state"] for one in daemon.client.leases(service="fine")] == ["bound"], "it is bound")
        group = terminal.program.pid
        wait_for(lambda: _members(group) == {group}, "the watching process has ended")
        terminal.shows("")
        assert terminal.text.count("portd:") == 1


def test_the_command_has_no_child_that_it_did_not_start(daemon: Daemon) -> None:
    script = "import os; print('children', open(f'/proc/self/task/{os.getpid()}/children').read().split())"
    with on_terminal(daemon, "run", "childless", "--", sys.executable, "-c", script) as terminal:
        wait_until_shown(terminal, "children []")


def test_nothing_is_said_in_a_pipe(daemon: Daemon) -> None:
    done = daemon.portd("run", "quiet", "--port", "1", "--", "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _members(group: int) -> set[int]:
    """Return the processes of a process group."""
    found = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[2]) == group:
                    found.add(int(pid))
        except OSError:
            continue  # gone meanwhile
    return found


def test_ls_fits_eighty_columns_on_a_terminal(daemon: Daemon) -> None:
    for at in range(3):
        name = f"a-service-with-a-long-name-{at}"
        daemon.portd("lease", name, "--pid", str(os.getpid()), "--check", "tcp")
    with on_terminal(daemon, "ls") as terminal:
        wait_until_shown(terminal, "long-name-2-1")
        wait_for(lambda: terminal.program.poll() is not None, "ls exits")
        terminal.shows("")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.text).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert all("held" in line for line in lines if "long-name" in line)


def test_a_service_that_listens_elsewhere_is_reported(daemon: Daemon) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with on_terminal(daemon, "run", "stray", "--", sys.executable, "-m", "http.server", str(port)) as terminal:
        wait_until_shown(terminal, f":{port} instead of ")
        [lease] = daemon.client.leases(service="stray")
        assert f"listens on 0.0.0.0:{port} instead" in daemon.portd("ls", "stray").stdout
        assert "elsewhere" in daemon.portd("who", str(lease["port"])).stdout
        assert "owner of stray stray-1, which leased" in daemon.portd("who", str(port)).stdout
        assert "its owner listens on" in daemon.portd("doctor").stdout
