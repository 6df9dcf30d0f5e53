"""Real servers on leased ports: three instances of each are found, and one that is killed is seen to leave."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from urllib.request import urlopen

import pytest

import portd_client
from clients.conformance.bed import Daemon, end, wait_for

AIOHTTP = """
import asyncio
from aiohttp import web
from portd_client import aio

async def answer(request):
    return web.Response(text="ok")

async def main():
    app = web.Application()
    app.router.add_get("/{any:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    async with aio.lease("by-aiohttp", check="http:/healthz") as lease:
        await web.SockSite(runner, await lease.listen()).start()
        await asyncio.Event().wait()

asyncio.run(main())
"""
UVICORN = """
import portd_client, uvicorn

async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

listener = portd_client.listen("by-uvicorn", check="http:/healthz")
uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning")).run(sockets=[listener])
"""
SOCKETSERVER = """
import http.server, portd_client

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")

listener = portd_client.listen("by-socketserver", check="http:/healthz")
server = http.server.ThreadingHTTPServer(listener.getsockname(), Answer, bind_and_activate=False)
server.socket.close()
server.socket = listener
server.serve_forever()
"""
FLASK = """
from flask import Flask

app = Flask(__name__)

@app.get("/")
@app.get("/healthz")
def answer():
    return "ok"
"""
GUNICORN = """
import portd_client

listener = portd_client.listen("by-gunicorn", check="http:/healthz")
bind = f"fd://{listener.fileno()}"
timeout = 2
"""


def serves_three(daemon: Daemon, service: str, start: Callable[[], subprocess.Popen[str]]) -> None:
    """Start three instances, find and ask all of them, kill one, and see it leave at once."""
    programs = [start() for _ in range(3)]
    try:

        def passing() -> list[portd_client.Instance]:
            for program in programs:
                assert program.poll() is None or program is programs[0], program.communicate()[0]
            return portd_client.resolve_all(service, client=daemon.client)

        found = wait_for(lambda: len(now := passing()) == 3 and now, "all three pass their checks")
        assert found
        assert len({one.port for one in found}) == 3
        for one in found:
            with urlopen(f"http://{one.authority}/", timeout=10) as answer:
                assert answer.read() == b"ok"
        gone = daemon.client.lease(
            next(
                lease["id"]
                for lease in daemon.client.leases(service=service)
                if lease["owner"]["pid"] == programs[0].pid
            )
        )
        end(programs[0])
        left = wait_for(lambda: len(now := passing()) == 2 and now, "the killed one leaves")
        assert left
        assert gone["port"] not in {one.port for one in left}
    finally:
        for program in programs:
            end(program)


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip where a server that is no dependency of portd is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.mark.parametrize(
    ("service", "source"),
    [
        ("by-socketserver", SOCKETSERVER),
        ("by-aiohttp", AIOHTTP),
        pytest.param("by-uvicorn", UVICORN, marks=needs("uvicorn")),
    ],
)
def test_a_server_that_leases_by_itself(daemon: Daemon, service: str, source: str) -> None:
    serves_three(daemon, service, lambda: daemon.start_python(source))


@needs("gunicorn", "flask")
@pytest.mark.parametrize("socket", [False, True], ids=["by its port", "by its socket"])
def test_flask_on_gunicorn_under_portd_run(daemon: Daemon, socket: bool) -> None:
    (daemon.directory / "service_app.py").write_text(FLASK)
    service = "by-passed-socket" if socket else "by-flask"
    how, bind = (["--socket"], []) if socket else ([], ["--bind", "{host}:{port}"])
    serves_three(
        daemon,
        service,
        lambda: daemon.start_portd(
            "run",
            service,
            "--check",
            "http:/healthz",
            *how,
            "--",
            sys.executable,
            "-m",
            "gunicorn",
            *bind,
            "--timeout",
            "2",
            "--chdir",
            str(daemon.directory),
            "service_app:app",
        ),
    )


@needs("gunicorn", "flask")
def test_flask_on_a_gunicorn_that_leases_by_itself(daemon: Daemon) -> None:
    (daemon.directory / "service_app.py").write_text(FLASK)
    (daemon.directory / "gunicorn.conf.py").write_text(GUNICORN)
    serves_three(
        daemon,
        "by-gunicorn",
        lambda: daemon.start_program(
            [
                sys.executable,
                "-m",
                "gunicorn",
                "--config",
                str(daemon.directory / "gunicorn.conf.py"),
                "--chdir",
                str(daemon.directory),
                "service_app:app",
            ]
        ),
    )
