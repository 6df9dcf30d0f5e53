"""The whole way: a lease of the real daemon, a real service behind it, and another host that sees them come and go."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.mdns.bed import Host, Lan, wait_for

pytestmark = pytest.mark.netns
ROOT = Path(__file__).parents[3]
WEB = "_http._tcp"


class Daemon:
    """portd on a host, with its state in a directory."""

    def __init__(self, host: Host, directory: Path) -> None:
        self.host = host
        self._socket = directory / "portd.sock"
        self._config = directory / "portd.toml"
        self._config.write_text(
            f'[listen]\nsocket = "{self._socket}"\nhandoff = "{directory}/handoff.sock"\nhttp = ""\n'
            f'[store]\npath = "{directory}/portd.db"\n[dns]\nlisten = ""\n[mdns]\nresponder = "embedded"\n'
        )
        self.start()

    def start(self) -> None:
        path = f"PYTHONPATH={ROOT}:{ROOT / 'clients/python'}"
        self.process = self.host.start(
            "env", path, sys.executable, "-m", "portd", "serve", "--config", str(self._config)
        )
        wait_for(lambda: self.ask("healthz").get("status") == "ok", "the daemon serves")

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        sent = ["-H", "content-type: application/json", "-d", json.dumps(body)] if body is not None else []
        answer = self.host.exec(
            "curl", "-s", "--unix-socket", str(self._socket), *sent, f"http://portd/{path}", check=False
        )
        return json.loads(answer) if answer else {}

    def serve(self, port: int, name: str) -> subprocess.Popen[bytes]:
        """Start a service, and lease its port for it, announced."""
        service = self.host.start(sys.executable, "-m", "http.server", str(port))
        lease = self.ask(
            "v1/leases",
            {
                "service": "web",
                "address": "0.0.0.0",
                "port": port,
                "pid": service.pid,
                "announce": {"name": name},
                "check": {"kind": "http", "interval": 1},
            },
        )
        assert lease["port"] == port, lease
        return service


def test_killed_services_leave_the_lan_and_restarted_daemons_return(lan: Lan, tmp_path: Path) -> None:
    here, peer = lan.host(), lan.host()
    peer.start_avahi()
    daemon = Daemon(here, tmp_path)
    mortal = daemon.serve(20100, "Mortal")
    daemon.serve(20101, "Dr. Web")
    wait_for(lambda: peer.seen(WEB) == {"Mortal", "Dr. Web"}, "both are seen")
    assert {
        (service["name"], service["port"], service["ours"])
        for service in daemon.ask("v1/lan?type=_http._tcp")["services"]
    } == {("Mortal", 20100, True), ("Dr. Web", 20101, True)}
    mortal.kill()
    wait_for(lambda: peer.seen(WEB) == {"Dr. Web"}, "the killed service is gone")
    (lease,) = daemon.ask("v1/leases")["leases"]
    assert lease["announce"]["published_as"] == "Dr. Web"
    daemon.process.kill()
    wait_for(lambda: peer.seen(WEB) == set(), "what the killed daemon announced is gone")
    daemon.process.wait()
    daemon.start()
    wait_for(lambda: peer.seen(WEB) == {"Dr. Web"}, "the next daemon announces it again")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(20) == 0
    wait_for(lambda: peer.seen(WEB) == set(), "an orderly stop takes it back")
