"""`portd stop`: who is ended, by which signal, and who is not."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest

from tests.cli.bed import Daemon, end, serving, wait_for

LISTENING = "import os, socket; s = socket.create_server(('127.0.0.1', int(os.environ['PORT'])))"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {LISTENING}; signal.pause()"
POLITE = f"import signal; {LISTENING}; signal.pause()"
WORKER = f"import os, signal; {LISTENING}; os.fork(); signal.pause()"


def start(daemon: Daemon, service: str, source: str):
    """Start a service, and return it once the daemon has seen that it listens."""
    program = daemon.start_portd("run", service, "--", sys.executable, "-c", source)
    wait_for(lambda: [one for one in daemon.client.leases(service=service) if one["state"] == "bound"], "it is bound")
    return program


@pytest.mark.parametrize(("source", "name"), [(POLITE, "SIGTERM"), (STUBBORN, "SIGKILL")])
def test_stop_ends_the_owner_and_its_lease(daemon: Daemon, source: str, name: str) -> None:
    program = start(daemon, "stopped", source)
    try:
        done = daemon.portd("stop", "stopped-1", "--timeout", "0.3", "--json")
        assert json.loads(done.stdout) == {"stopped": [{"pid": program.pid, "signal": name}]}
        assert program.wait(10) == -signal.Signals[name]
        assert not list(daemon.client.leases(service="stopped"))
    finally:
        end(program)


def test_stop_ends_a_worker_that_goes_on_listening(daemon: Daemon) -> None:
    program = start(daemon, "forks", WORKER)
    try:
        done = daemon.portd("stop", "forks-1", "--json")
        assert len(json.loads(done.stdout)["stopped"]) == 2
        assert not list(daemon.client.leases(service="forks"))
    finally:
        end(program)


def test_stop_of_an_unknown_name_is_a_clear_no(daemon: Daemon) -> None:
    assert daemon.portd("stop", "nobody-1").returncode == 1


def test_stop_does_not_signal_a_process_that_the_daemon_does_not_know(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    from portd.cli import stopping

    with serving(daemon, "mistaken"):
        lease = next(iter(daemon.client.leases(service="mistaken")))
        former = {**lease, "owner": {**lease["owner"], "started_at": "2001-01-01T00:00:00Z"}}
        monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: pytest.fail("a signal was sent"))
        assert lease["owner"]["pid"] == os.getpid()
        assert stopping._end(daemon.client, former, 1.0) == "none"  # type: ignore[arg-type]
