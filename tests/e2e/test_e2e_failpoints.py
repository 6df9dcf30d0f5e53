"""The daemon is killed, or its disk fails, at every step between decision and answer: what was acknowledged stays."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

from portd.core.failpoints import POINTS
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import DEADLINE_S, Daemon, is_bindable, unique, wait_for

AT_START = [point for point in POINTS if point.startswith("start.")]


class Ledger:
    """What one client knows: leases that it has, that it released, and whose release was not answered."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}
        self.released: set[str] = set()
        self.unsure: set[str] = set()

    def work(self, daemon: Daemon) -> None:
        """Lease, renew, change, drain, decline and release on one connection until the daemon is gone."""
        try:
            with daemon.connect() as connection:
                for number in range(40):
                    self._step(connection, number)
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            return

    def _step(self, connection: Any, number: int) -> None:
        reply = connection.call("POST", "/v1/leases", {"service": f"s{number % 3}", "ttl": 3600})
        if reply.status == 201:
            self.held[reply.body["id"]] = reply.body
        oldest = next(iter(self.held), None)
        if oldest is None:
            return
        path = f"/v1/leases/{oldest}"
        call = [("renew", {"seconds": 1800}), ("drain", None), ("decline", None), (None, {"tags": ["new"]})][number % 4]
        reply = connection.call("PATCH" if call[0] is None else "POST", f"{path}/{call[0] or ''}".rstrip("/"), call[1])
        if reply.status == 200:
            self.held[oldest] = reply.body
        if number % 2:
            self.unsure.add(oldest)
            if connection.call("DELETE", path).status == 204:
                self.released.add(oldest)
                self.unsure.discard(oldest)
                del self.held[oldest]

    def audit(self, daemon: Daemon) -> None:
        """Fail when an acknowledged change is not there, or something is there twice."""
        live = daemon.leases()
        for lease_id, lease in self.held.items():
            if lease_id in self.unsure:
                continue
            assert lease_id in live, f"an acknowledged lease is gone: {lease}"
            found = live[lease_id]
            # The call under way when the daemon went may have been done or not.
            assert found["revision"] >= lease["revision"] or found["port"] == lease["port"]
        assert not self.released & live.keys(), "an acknowledged release was undone"
        assert unique((lease["address"], lease["port"]) for lease in live.values())
        assert unique((lease["service"], lease["instance"], lease["endpoint"]) for lease in live.values())
        assert not any(is_bindable(lease["port"]) for lease in live.values()), "every live lease is held"


@pytest.mark.parametrize("action", ["kill:5", "fail:2"])
@pytest.mark.parametrize("point", [point for point in POINTS if point not in AT_START])
def test_what_was_acknowledged_survives_a_crash_at_any_step(make_daemon: MakeDaemon, point: str, action: str) -> None:
    daemon = make_daemon(prelude="import portd.adapters.sqlite.writing as w; w.CHECKPOINT_PAGES = 20").start()
    daemon.errors.append("")  # a disk that fails is logged in many ways
    ledger = Ledger()
    reply = daemon.lease("before", ttl=3600)
    ledger.held[reply["id"]] = reply
    daemon.stop()
    daemon.failpoints = f"{point}={action}"
    process = daemon.launch()
    wait_for(lambda: process.poll() is not None or daemon.answers(process), "it serves or is gone")
    if process.poll() is None:
        ledger.work(daemon)
    daemon.kill()
    daemon.failpoints = ""
    daemon.log_path.unlink()
    daemon.start()
    ledger.audit(daemon)


@pytest.mark.parametrize("point", AT_START)
def test_a_crash_during_the_start_loses_nothing(make_daemon: MakeDaemon, point: str) -> None:
    daemon = make_daemon().start()
    leases = [daemon.lease("before", ttl=3600) for _ in range(5)]
    daemon.kill()
    daemon.failpoints = f"{point}=kill:1"
    for _ in range(3):
        assert daemon.launch().wait(DEADLINE_S) == -9
    daemon.failpoints = ""
    daemon.start()
    assert daemon.leases().keys() == {lease["id"] for lease in leases}


def test_an_unknown_failpoint_is_refused(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.errors.append("")
    daemon.failpoints = "nowhere=kill:1"
    assert daemon.launch().wait(DEADLINE_S) != 0
    assert "there is no failpoint 'nowhere'" in daemon.log()
    daemon.log_path.unlink()
