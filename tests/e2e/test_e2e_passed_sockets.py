"""`portd run --socket` with servers that people use: gunicorn, uvicorn, Node."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.harness import Daemon, program, wait_for

WSGI = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]
"""
ASGI = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})
"""
NODE = """
require("http").createServer((request, response) => response.end("hello")).listen({fd: 3});
"""


def fetch(port: int) -> bytes:
    """Fetch the page, or nothing while nobody serves it."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return bytes(answer.read())
    except (urllib.error.URLError, ConnectionError):
        return b""


@pytest.mark.parametrize(
    ("source", "command"),
    [
        pytest.param(("app.py", WSGI), ["{python}", "-m", "gunicorn", "--workers", "2", "app:app"], id="gunicorn"),
        pytest.param(
            ("app.py", ASGI), ["{python}", "-m", "uvicorn", "--fd", "3", "--lifespan", "off", "app:app"], id="uvicorn"
        ),
        pytest.param(("app.js", NODE), ["node", "app.js"], id="node"),
    ],
)
@pytest.mark.parametrize("hold", ["shared", "exclusive"])
def test_a_server_takes_the_passed_socket(
    own_daemon: Daemon, tmp_path: Path, source: tuple[str, str], command: list[str], hold: str
) -> None:
    name, text = source
    (tmp_path / name).write_text(text)
    words = [word.replace("{python}", sys.executable) for word in command]
    environ = {name: value for name, value in own_daemon.environ.items() if name != "PYTHONWARNINGS"}
    with program(
        sys.executable, "-m", "portd", "run", "web", "--socket", "--hold", hold, "--", *words, cwd=tmp_path, env=environ
    ):
        lease = wait_for(lambda: next(iter(own_daemon.leases().values()), None), "the lease is there")
        wait_for(lambda: fetch(lease["port"]) == b"hello", "the server answers on the leased port")
        assert own_daemon.wait_state(lease["id"], "bound")["owner"]["pid"]
    wait_for(lambda: fetch(lease["port"]) == b"" and not own_daemon.leases(), "it ends with the server")
