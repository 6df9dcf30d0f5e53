"""A real Prometheus finds, scrapes and loses portd's targets; promtool finds nothing wrong with portd's own metrics."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import Daemon, free_tcp_port, owner, program, python, wait_for

SERVICE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"test_up 1\\n"
        self.send_response(200); self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_promtool_finds_nothing_wrong_with_the_metrics(own_daemon: Daemon) -> None:
    with owner() as process:
        own_daemon.lease("orders", pid=process.pid, check={"kind": "listen"})
        own_daemon.call("GET", "/v1/nothing")
        text = own_daemon.call("GET", "/metrics", over="tcp").body
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
        assert 'portd_leases{state="held"} 1.0' in text
        assert 'portd_events_total{type="granted"} 1.0' in text


def ask(port: int, query: str) -> Any:
    """Ask Prometheus for the value of each series, by instance; None while it does not answer."""
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            series = json.load(answer)["data"]["result"]
    except (urllib.error.URLError, ConnectionError):
        return None
    return {one["metric"]["service"]: one["value"][1] for one in series}


def test_prometheus_finds_scrapes_and_loses_targets(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon().start()
    port = free_tcp_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(f"""
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs:
  - job_name: portd
    http_sd_configs: [{{url: "http://127.0.0.1:{daemon.tcp[1]}/v1/prometheus?tag=scraped", refresh_interval: 200ms}}]
    relabel_configs:
      - {{source_labels: [__meta_portd_service], target_label: service}}
      - {{source_labels: [__meta_portd_drain], target_label: draining}}
""")
    prometheus = program(
        "prometheus",
        f"--config.file={config}",
        f"--web.listen-address=127.0.0.1:{port}",
        f"--storage.tsdb.path={tmp_path}/tsdb",
        "--log.level=error",
    )
    with prometheus:
        leases = {}
        with owner() as quiet:
            daemon.lease("untagged", pid=quiet.pid)
            wanted, drained = free_tcp_port(), free_tcp_port()
            with python(SERVICE, str(wanted)) as serving, python(SERVICE, str(drained)) as draining:
                for name, process, number in (("orders", serving, wanted), ("drained", draining, drained)):
                    fields = {"port": number, "hold": "none", "tags": ["scraped"]}
                    leases[name] = daemon.lease(name, pid=process.pid, **fields)
                wait_for(lambda: ask(port, "up") == {"orders": "1", "drained": "1"}, "both targets are found")
                assert ask(port, "test_up") == {"orders": "1", "drained": "1"}
                daemon.call("POST", f"/v1/leases/{leases['drained']['id']}/drain", {})
                wait_for(lambda: ask(port, 'up{draining="true"}') == {"drained": "1"}, "a drained target is marked")
            wait_for(lambda: ask(port, "up") == {}, "the targets of processes that ended are gone")
