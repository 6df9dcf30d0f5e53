"""`portd gateway --caddy` with a real Caddy: HTTP/2, websockets, on-demand certificates, restarts without an error."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import ClientSession, TCPConnector

from tests.adapters.gateway.conftest import Gateway, backend, run, wait_bound
from tests.cli.bed import Daemon, end, wait_for

pytestmark = pytest.mark.skipif(shutil.which("caddy") is None, reason="not installed: caddy")


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """Return a port that nobody uses."""
    with socket.socket(socket.AF_INET, kind) as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
        return port


class Caddy:
    """A running `portd gateway --caddy`, and a daemon with DNS and HTTP over TCP."""

    def __init__(self, directory: Path) -> None:
        self.daemon = Daemon(directory)
        config = directory / "portd.toml"
        text = config.read_text().replace('http = ""', f'http = "127.0.0.1:{free_port()}"')
        config.write_text(text.replace('listen = ""', f'listen = "127.0.0.1:{free_port(socket.SOCK_DGRAM)}"'))
        self.daemon.start()
        self.url = next(line.split('"')[1] for line in config.read_text().splitlines() if line.startswith("http ="))
        self.port = free_port()
        self.directory = directory / "caddy"
        options = ("--caddy", "--listen", f"127.0.0.1:{self.port}", "--directory", str(self.directory))
        self.program = subprocess.Popen(
            [*Gateway.PORTD, "gateway", *options],
            env={**self.daemon.environ, "PORTD_URL": f"http://{self.url}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for(self._is_leased, "Caddy's lease is bound")

    def close(self) -> None:
        """Stop Caddy and the daemon."""
        end(self.program, signal.SIGTERM)
        self.daemon.__exit__(None, None, None)

    def curl(self, host: str, *options: str) -> str:
        """Return the answer of a request over HTTPS, with the status and the version of HTTP after it."""
        root = self.directory / "pki/authorities/local/root.crt"
        return subprocess.run(
            ["curl", "-sS", "--max-time", "10", "--cacert", str(root), "-w", " %{http_code} %{http_version}",
             "--resolve", f"{host}:{self.port}:127.0.0.1", *options, f"https://{host}:{self.port}/"],
            capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip

    def _is_leased(self) -> bool:
        assert self.program.poll() is None, self.program.communicate()
        return any(
            lease["state"] == "bound" for lease in self.daemon.client.leases(service="portd-gateway", endpoint="https")
        )


@pytest.fixture(scope="module")
def caddy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caddy]:
    """A Caddy that the tests of a module share."""
    made = Caddy(tmp_path_factory.mktemp("portd"))
    yield made
    made.close()


def test_page_comes_over_http2_with_certificate_of_its_name(caddy: Caddy) -> None:
    with backend(caddy.daemon, "page", "--instance", "page-a", "--endpoint", "admin"):
        assert caddy.curl("page.localhost").endswith(" 200 2")
        assert caddy.curl("page-a.page.localhost").endswith(" 200 2")
        assert caddy.daemon.portd("url", "page").stdout == f"https://page.localhost:{caddy.port}\n"


def test_a_name_that_portd_does_not_know_gets_no_certificate(caddy: Caddy) -> None:
    assert caddy.curl("unknown.localhost").endswith(" 000 0")


def test_a_restarted_service_costs_no_error(caddy: Caddy) -> None:
    with backend(caddy.daemon, "again"):
        assert caddy.curl("again.localhost").endswith(" 200 2")
    with backend(caddy.daemon, "again", wait=False) as second:
        assert caddy.curl("again.localhost").endswith(" 200 2")
        assert str(second.pid) in caddy.curl("again.localhost")


def test_a_websocket_passes_and_outlives_changes_of_other_services(caddy: Caddy) -> None:
    async def converse() -> None:
        trust = ssl.create_default_context(cafile=caddy.directory / "pki/authorities/local/root.crt")
        connector = TCPConnector(ssl=trust)
        async with (
            ClientSession(connector=connector) as session,
            session.ws_connect(
                f"https://127.0.0.1:{caddy.port}/chat",
                headers={"Host": "chat.localhost"},
                server_hostname="chat.localhost",
            ) as chat,
        ):
            await chat.send_str("one")
            assert (await chat.receive()).data == "one"
            with backend(caddy.daemon, "other"):
                await chat.send_str("two")
                assert (await chat.receive()).data == "two"

    with backend(caddy.daemon, "chat") as program:
        wait_bound(caddy.daemon, program)
        run(asyncio.wait_for(converse(), 20.0))
