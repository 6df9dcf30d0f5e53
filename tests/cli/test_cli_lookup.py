"""Waiting for services, their reasons, and the results of checks."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from portd._client import calls
from portd.cli import lookup
from tests.cli.bed import Daemon, end, serving, wait_for

USAGE = 2
SERVER = (sys.executable, "-m", "http.server", "{port}", "--bind", "{host}")


def test_resolve_waits_for_an_instance_that_starts_later(daemon: Daemon) -> None:
    waiting = daemon.start_portd("resolve", "later", "--wait", "20")
    running = daemon.start_portd("run", "later", "--", *SERVER)
    try:
        written, _ = waiting.communicate(timeout=20)
        [lease] = daemon.client.leases(service="later")
        assert (waiting.returncode, written) == (0, f"127.0.0.1:{lease['port']}\n")
    finally:
        end(running)


def test_wait_returns_when_every_service_serves(daemon: Daemon) -> None:
    waiting = daemon.start_portd("wait", "front", "back", "--timeout", "20")
    with serving(daemon, "front"), serving(daemon, "back"):
        assert waiting.wait(20) == 0
    end(waiting)


def test_wait_gives_up_with_the_reason(daemon: Daemon) -> None:
    daemon.portd("lease", "idle", "--ttl", "60")
    done = daemon.portd("wait", "idle", "--min", "2", "--timeout", "0.2")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "0 of 2 instances of idle serve: idle-1 does not listen yet" in done.stderr
    assert daemon.portd("wait", "idle", "--min", "1", "--passing", "1").returncode == USAGE


def test_wait_for_passing_needs_a_check_that_passes(daemon: Daemon) -> None:
    with serving(daemon, "unchecked"):
        assert daemon.portd("wait", "unchecked", "--timeout", "5").returncode == 0
        assert daemon.portd("wait", "unchecked", "--passing", "1", "--timeout", "0.2").returncode == 1
    with serving(daemon, "passing", "--check", "tcp"):
        assert daemon.portd("wait", "passing", "--passing", "1", "--timeout", "10").returncode == 0


def test_checks_shows_result_reason_and_age(daemon: Daemon) -> None:
    with serving(daemon, "probed", "--check", "tcp"):
        assert daemon.portd("wait", "probed", "--passing", "1").returncode == 0
        line = daemon.portd("checks", "probed").stdout.rstrip("\n").split("\t")
        [shown] = json.loads(daemon.portd("checks", "probed", "--json").stdout)["checks"]
    assert line[:4] == ["probed", "probed-1", "tcp", "passing"]
    assert (shown["instance"], shown["health"], shown["check"]["kind"]) == ("probed-1", "passing", "tcp")
    assert daemon.portd("checks", "nothing-here").returncode == 1


def test_services_shows_why_one_does_not_serve(daemon: Daemon) -> None:
    daemon.portd("lease", "silent", "--ttl", "60")
    [line] = [line for line in daemon.portd("services").stdout.splitlines() if line.startswith("silent\t")]
    assert line.split("\t")[1:3] == ["1", "0"]
    assert line.endswith("silent-1 does not listen yet")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"drain": True}, "is draining"),
        ({"state": "held"}, "does not listen yet"),
        ({"state": "held", "elsewhere": [{"address": "::1", "port": 5173}]}, "listens on [::1]:5173 instead of 20000"),
        ({"state": "conflict"}, "has a foreign process on its port"),
        ({"health": "critical", "health_note": "503 database gone"}, "is critical (503 database gone)"),
    ],
)
def test_the_reason_is_the_first_that_matters(fields: dict[str, Any], reason: str) -> None:
    lease = {"state": "bound", "drain": False, "health": "passing", "port": 20000, "elsewhere": [], **fields}
    assert lookup._reason(lease) == reason


def test_wait_goes_on_over_a_restart_of_the_daemon(own_daemon: Daemon) -> None:
    own_daemon.start()
    waiting = own_daemon.start_portd("wait", "patient", "--timeout", "20")
    wait_for(lambda: _is_polling(own_daemon), "it polls")
    own_daemon.stop()
    own_daemon.start()
    with serving(own_daemon, "patient"):
        written, _ = waiting.communicate(timeout=20)
    assert (waiting.returncode, written) == (0, "")


def _is_polling(daemon: Daemon) -> bool:
    """Return whether another connection than this one is open."""
    return bool(daemon.client.call(calls.status())["counts"]["connections"] > 1)
