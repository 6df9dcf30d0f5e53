"""URLs of services at the gateway: what `portd url`, `run` and `ls` print, and what the daemon answers for names."""

from __future__ import annotations

import http.client
import json
import socket
import sys

import pytest

from tests.cli.bed import Daemon, serving


@pytest.fixture(scope="module")
def served(daemon: Daemon):
    """A service `shop` that listens."""
    with serving(daemon, "shop", "--instance", "shop-eu"):
        yield


def ask(daemon: Daemon, domain: str) -> int:
    """Return the status of GET /v1/names/ask."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(daemon.url.removeprefix("unix://"))
    connection.request("GET", f"/v1/names/ask?domain={domain}")
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("domain", "status"),
    [
        ("shop.localhost", 200),
        ("SHOP.localhost", 200),
        ("shop-eu.shop.localhost", 200),
        ("main--shop.localhost", 200),
        ("admin--shop.localhost", 404),
        ("other.shop.localhost", 404),
        ("nothing.localhost", 404),
        ("shop.example.com", 404),
        ("localhost", 404),
    ],
)
def test_the_daemon_confirms_names_of_live_leases_alone(daemon: Daemon, domain: str, status: int) -> None:
    assert ask(daemon, domain) == status


@pytest.mark.usefixtures("served")
def test_url_prints_the_url_alone_on_stdout(daemon: Daemon) -> None:
    got = daemon.portd("url", "shop")
    assert (got.returncode, got.stdout) == (0, "http://shop.localhost:7780\n")
    assert "portd gateway" in got.stderr


def test_url_of_an_unknown_service_is_a_clear_no(daemon: Daemon) -> None:
    got = daemon.portd("url", "unknown-service")
    assert (got.returncode, got.stdout) == (1, "")


def test_a_running_gateway_gives_urls_their_port(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gateway, serving(daemon, "web"):
        port = gateway.getsockname()[1]
        adopted = daemon.client.grant(
            {"service": "portd-gateway", "port": port, "adopt": True}  # type: ignore[typeddict-unknown-key]
        )
        assert daemon.portd("url", "web").stdout == f"http://web.localhost:{port}\n"
        assert daemon.portd("ls", "web").stdout.rstrip("\n").split("\t")[-1] == f"http://web.localhost:{port}"
        daemon.client.release(adopted["id"])


@pytest.mark.parametrize(
    ("options", "url"),
    [((), "http://seen.localhost:7780"), (("--instance", "blue"), "http://blue.seen.localhost:7780")],
)
def test_run_gives_the_command_its_public_url(daemon: Daemon, options: tuple[str, ...], url: str) -> None:
    source = "import json, os; print(json.dumps(dict(os.environ)))"
    got = daemon.portd("run", "seen", *options, "--", sys.executable, "-c", source)
    assert json.loads(got.stdout)["PORTD_PUBLIC_URL"] == url
