"""Everyday programs, the real ones: bound to their leased port, found, and gone from portd when they end.

nginx in the background, redis that daemonizes and memcached that changes its user are in
`tests/e2e/test_e2e_programs.py`. A program that is not installed is skipped. Those that are too slow for every run are
marked: `python -m pytest -m heavy tests/programs`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Final, NamedTuple

import pytest

from tests.e2e.harness import Daemon, wait_for
from tests.e2e.programs import Programs, need

START_S: Final = 90.0
"""How long a program may take until it listens: the slowest compile first."""
NODE_MODULES: Final = Path(os.environ.get("PORTD_NODE_MODULES", Path.home() / ".cache/portd-tests/node_modules"))
"""Where `.ci/run` installs Vite and webpack."""
PYTHON: Final = sys.executable
RUN: Final = f"{PYTHON} -m portd run"
SERVER: Final = f"{PYTHON} -m http.server {{port}} --bind 127.0.0.1"


class Program(NamedTuple):
    """A program, and how it is started.

    `files` are written below the directory that `{dir}` in them and in the command stands for. `needs` are programs,
    Python modules (`python:NAME`) and Node packages (`node:NAME`). `owners` are the names that its owner's program may
    have. A manager starts `portd run` itself (`is_manager`); `stop` is the command that ends the program, where that is
    not SIGTERM.
    """

    name: str
    needs: tuple[str, ...]
    command: tuple[str, ...]
    owners: tuple[str, ...]
    files: dict[str, str] = {}
    is_manager: bool = False
    stop: tuple[str, ...] = ()
    as_postgres: bool = False


FLASK = "import flask\napp = flask.Flask('x')\napp.add_url_rule('/', view_func=lambda: 'ok')\n"
DJANGO = """
import sys
from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpResponse
from django.urls import path
settings.configure(DEBUG=True, SECRET_KEY="x", ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])
urlpatterns = [path("", lambda request: HttpResponse("ok"))]
if __name__ == "__main__":
    execute_from_command_line(sys.argv)
"""
ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
"""
CLUSTER = """
const cluster = require("cluster"), http = require("http");
if (cluster.isPrimary) { cluster.fork(); cluster.fork(); }
else http.createServer((request, response) => response.end("ok")).listen(process.env.PORT, process.env.HOST);
"""
RACK = 'run ->(env) { [200, {"content-type" => "text/plain"}, ["ok"]] }\n'
GO = """
package main
import ("net/http"; "os")
func main() { panic(http.ListenAndServe(os.Getenv("HOST")+":"+os.Getenv("PORT"), nil)) }
"""
JAVA = """
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
class Server {
    public static void main(String[] words) throws Exception {
        int port = Integer.parseInt(System.getenv("PORT"));
        HttpServer.create(new InetSocketAddress(System.getenv("HOST"), port), 0).start();
    }
}
"""
SUPERVISOR = f"""
[supervisord]
nodaemon = true
logfile = /dev/null
logfile_maxbytes = 0
pidfile = {{dir}}/pid
[program:web]
command = {RUN} supervisord -- {SERVER}
"""
TMUX = (
    f"PORT=$({PYTHON} -m portd lease tmux) && exec tmux -L portd-tests new-session -d "
    f'"exec {PYTHON} -m http.server $PORT --bind 127.0.0.1"'
)
POSTGRES = 'exec "$0" -D {dir}/data -h "$HOST" -p "$PORT" -k ""'

EVERY_RUN: Final = (
    Program(
        "flask",
        ("python:flask",),
        (PYTHON, "-m", "flask", "--app", "{dir}/app.py", "run", "--debug", "--port", "{{port}}"),
        ("python",),
        {"app.py": FLASK},
    ),
    Program(
        "django",
        ("python:django",),
        (PYTHON, "{dir}/app.py", "runserver", "{{host}}:{{port}}"),
        ("python",),
        {"app.py": DJANGO},
    ),
    Program(
        "uvicorn",
        ("python:uvicorn",),
        (PYTHON, "-m", "uvicorn", "--app-dir", "{dir}", "app:app", "--port", "{{port}}", "--workers", "2"),
        ("python",),
        {"app.py": ASGI},
    ),
    Program("node-cluster", ("node",), ("node", "{dir}/app.js"), ("node",), {"app.js": CLUSTER}),
    Program("php", ("php",), ("php", "-S", "{{host}}:{{port}}", "-t", "{dir}"), ("php",), {"index.php": "ok"}),
    Program(
        "puma",
        ("puma",),
        ("puma", "-b", "tcp://{{host}}:{{port}}", "{dir}/config.ru"),
        ("ruby",),
        {"config.ru": RACK},
    ),
    Program(
        "supervisord",
        ("python:supervisor",),
        (PYTHON, "-m", "supervisor.supervisord", "-c", "{dir}/conf"),
        ("python",),
        {"conf": SUPERVISOR},
        is_manager=True,
    ),
    Program(
        "honcho",
        ("python:honcho",),
        (PYTHON, "-m", "honcho", "-f", "{dir}/Procfile", "start"),
        ("python",),
        {"Procfile": f"web: exec {RUN} honcho -- {SERVER}\n"},
        is_manager=True,
    ),
    Program(
        "tmux",
        ("tmux",),
        ("sh", "-c", TMUX),
        ("python",),
        is_manager=True,
        stop=("tmux", "-L", "portd-tests", "kill-server"),
    ),
)
HEAVY: Final = (
    Program(
        "vite",
        ("node", "node:vite"),
        ("node", str(NODE_MODULES / "vite/bin/vite.js"), "{dir}", "--port", "{{port}}", "--strictPort"),
        ("node",),
        {"index.html": "ok"},
    ),
    Program(
        "webpack",
        ("node", "node:webpack", "node:webpack-cli", "node:webpack-dev-server"),
        (
            "sh",
            "-c",
            (
                f"cd {NODE_MODULES.parent} && exec node {NODE_MODULES}/webpack/bin/webpack.js serve --mode development "
                "--port $PORT --host $HOST --entry {dir}/main.js"
            ),
        ),
        ("node",),
        {"main.js": ""},
    ),
    Program("go", ("go",), ("go", "run", "{dir}/main.go"), ("go",), {"main.go": GO}),
    Program("java", ("java",), ("java", "{dir}/Server.java"), ("java",), {"Server.java": JAVA}),
    Program(
        "postgres",
        ("su", "postgres"),
        ("su", "postgres", "-s", "/bin/sh", "-c", POSTGRES, "{postgres}"),
        ("su", "postgres"),
        as_postgres=True,
    ),
)


@pytest.fixture
def programs(daemon: Daemon) -> Iterator[Programs]:
    programs = Programs(daemon)
    yield programs
    programs.end()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that other users may enter."""
    with tempfile.TemporaryDirectory(prefix="portd-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def find_postgres() -> str | None:
    return next((str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))), None)


def skip_without(needed: str) -> None:
    kind, _, name = needed.rpartition(":")
    if kind == "python" and importlib.util.find_spec(name) is None:
        pytest.skip(f"the Python package {name} is not installed: pip install '.[programs]'")
    if kind == "node" and not (NODE_MODULES / name).is_dir():
        pytest.skip(f"the Node package {name} is not in {NODE_MODULES}: see .ci/run")
    if name == "postgres" and find_postgres() is None:
        pytest.skip("PostgreSQL is not installed (Debian package postgresql)")
    if not kind and name != "postgres":
        need(name)


def prepare(program: Program, directory: Path) -> list[str]:
    """Write the program's files, and return its command."""
    for name, text in program.files.items():
        (directory / name).write_text(text.replace("{dir}", str(directory)))
    known = {"dir": str(directory), "postgres": find_postgres() or ""}
    if program.as_postgres:
        if os.geteuid() != 0:
            pytest.skip("needs root, to become postgres")
        data = directory / "data"
        data.mkdir()
        shutil.chown(data, "postgres")
        initdb = str(PurePath(known["postgres"]).with_name("initdb"))
        subprocess.run(
            ["su", "postgres", "-s", "/bin/sh", "-c", f"{initdb} -D {data}"], check=True, capture_output=True
        )
    return [word.format(**known) for word in program.command]


@pytest.mark.parametrize(
    "program",
    [
        *(pytest.param(program, id=program.name) for program in EVERY_RUN),
        *(pytest.param(program, id=program.name, marks=pytest.mark.heavy) for program in HEAVY),
    ],
)
def test_program_is_bound_found_and_ended(programs: Programs, directory: Path, program: Program) -> None:
    for needed in program.needs:
        skip_without(needed)
    command = prepare(program, directory)
    started = programs.start(*command) if program.is_manager else programs.run(program.name, *command)
    lease = programs.lease_of(program.name, deadline_s=START_S)
    owner = lease["owner"]
    assert PurePath(owner["exe"]).name.startswith(program.owners), owner
    assert program.is_manager or owner["pid"] == started.pid
    found = programs.daemon.get(f"/v1/services/{program.name}")["instances"]
    assert [(each["instance"], each["port"]) for each in found] == [(lease["instance"], lease["port"])]
    if program.stop:
        subprocess.run(program.stop, check=True, capture_output=True, env=programs.daemon.environ)
    else:
        os.killpg(started.pid, signal.SIGTERM)  # all of them, as a terminal does: 'go run' leaves its program behind
    wait_for(lambda: programs.daemon.show(lease["id"])["state"] == "ended", "the lease ends with the program")
    wait_for(lambda: programs.daemon.verdict(lease["port"]) in ("cooling", "free"), "nobody listens on its port")


def test_gunicorn_keeps_its_lease_over_an_upgrade(programs: Programs, directory: Path) -> None:
    gunicorn = need(str(Path(sys.executable).with_name("gunicorn")))
    (directory / "app.py").write_text(FLASK)
    pid_file = directory / "pid"
    old = programs.run(
        "gunicorn", gunicorn, "--chdir", str(directory), "--pid", str(pid_file), "-b", "{host}:{port}", "app:app"
    )
    lease = programs.lease_of("gunicorn", deadline_s=START_S)
    assert lease["owner"]["pid"] == old.pid
    old.send_signal(signal.SIGUSR2)
    wait_for(lambda: (directory / "pid.2").exists(), "the new master runs", START_S)
    new = int((directory / "pid.2").read_text())
    old.send_signal(signal.SIGQUIT)
    wait_for(lambda: programs.daemon.show(lease["id"])["owner"]["pid"] == new, "the lease passes to the new master")
    assert programs.daemon.show(lease["id"])["state"] == "bound"
    os.kill(new, signal.SIGTERM)
    wait_for(lambda: programs.daemon.show(lease["id"])["state"] == "ended", "the lease ends with the new master")


XDIST = """
import socket

import portd_client
import pytest


@pytest.mark.parametrize("number", range(20))
def test_server(number):
    with portd_client.lease("xdist") as lease, socket.create_server(("127.0.0.1", lease.port)) as server:
        assert server.getsockname()[1] == lease.port
"""


@pytest.mark.heavy
def test_parallel_tests_of_xdist_share_no_port(programs: Programs, directory: Path) -> None:
    skip_without("python:xdist")
    (directory / "test_ports.py").write_text(XDIST)
    command = [PYTHON, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "--rootdir", str(directory)]
    done = subprocess.run(
        [*command, str(directory)],
        env=programs.daemon.environ,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout
    assert "20 passed" in done.stdout
    assert not programs.daemon.get("/v1/leases?service=xdist&state=held")["leases"]
