"""`portd demo`: leases, health, lookup and a crash in a few seconds, with a daemon and three services of its own.

Processes, ports and the kill -9 are real. It writes to a temporary directory only, and ends every process that it
started, however it ends itself.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection

from portd._client import calls
from portd._client.client import Client
from portd._client.errors import PortdError
from portd.cli import printing
from portd.cli.options import Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

SERVICES = ("shop", "orders", "billing")
STEP_MAX_S = 8.0
"""Seconds that a step may take; each needs well under one."""
PAUSE_S = 0.7
"""Pause in seconds after a step, on a terminal only."""

CONFIGURATION = """\
[listen]
socket = "{directory}/portd.sock"
handoff = "{directory}/handoff.sock"
http = ""
[pools.default]
ranges = ["{first}-{last}"]
[store]
path = "{directory}/portd.db"
[mdns]
enabled = false
[dns]
listen = ""
[log]
level = "warning"
"""


class DemoFailed(PortdError):
    """A step of the demo failed; the message says which."""


def demo(values: dict[str, Any]) -> int:
    """Run the demo."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    with _stage() as stage:
        stage.start_daemon()
        stage.start_services()
        stage.lookup()
        stage.crash()
        stage.restart()
    _print(
        "Done: all processes have exited, and the directory is removed.",
        "Your own services: portd serve --user           (in one terminal)",
        "                  portd run orders -- python3 -m http.server {port}    (in another)",
    )
    return 0


class Stage:
    """The daemon, the services and the client of one demo."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._environ = {key: value for key, value in os.environ.items() if not key.startswith("PORTD_")}
        self._environ["PORTD_URL"] = f"unix://{directory}/portd.sock"
        self._client = Client(self._environ["PORTD_URL"])

    def start_daemon(self) -> None:
        """Start a daemon on the temporary directory."""
        _print("1. A daemon of its own, with its sockets and its database in a temporary directory.")
        first = 20000 + secrets.randbelow(99) * 100
        with open(f"{self._directory}/portd.toml", "w", encoding="utf-8") as file:
            file.write(CONFIGURATION.format(directory=self._directory, first=first, last=first + 99))
        self._start("daemon", "serve", "--user", "--config", f"{self._directory}/portd.toml")

        def answers() -> bool:
            if self._processes["daemon"].poll() is not None:
                raise DemoFailed("the daemon exited at once; its output is above")
            with suppress(PortdError):
                return bool(self._client.call(calls.status()))
            return False

        _until(answers, "the daemon answers")
        _command(f"portd serve --user --config {self._directory}/portd.toml")

    def start_services(self) -> None:
        """Start three services, and show their leases."""
        _print("2. Three web services. None names a port: each leases one, and portd checks its health.")
        for name in SERVICES:
            self._start_service(name)
            _command(f"portd run {name} --check http:/healthz -- ./{name} {{port}}")
        _until(lambda: all(self._is_ready(name) for name in SERVICES), "the services listen and pass their checks")
        self._show_leases()

    def lookup(self) -> None:
        """Find a service by its name, and show who has its port."""
        _print("3. Lookup by name gives the healthy instances.")
        port = self._lease("orders")["port"]
        _command("portd resolve orders", f"127.0.0.1:{port}")
        connection = HTTPConnection("127.0.0.1", port, timeout=STEP_MAX_S)
        with closing(connection):
            connection.request("GET", "/")
            _command(f"curl http://127.0.0.1:{port}/", connection.getresponse().read().decode().strip())
        self._show_who(port)

    def crash(self) -> None:
        """Kill a service the hard way, and show what becomes of its port."""
        _print("4. A crash: nobody says goodbye, and nothing is left behind.")
        lease = self._lease("orders")
        revision = self._client.call(calls.status())["revision"]
        process = self._processes["orders"]
        started_s = time.perf_counter()
        process.kill()
        ended = next(event for event in self._client.events(revision) if event.name == "ended")
        took_ms = (time.perf_counter() - started_s) * 1000
        process.wait()
        _command(
            f"kill -9 {process.pid}",
            f"lease {lease['id']} ended {took_ms:.0f} ms later, as event {ended.revision}: its owner exited",
        )
        self._show_leases()
        port = lease["port"]
        verdict = self._client.call(calls.port(port))["verdict"]
        _command(f"portd who {port}", f"{port}/tcp: {verdict}: not granted to others for a few seconds")

    def restart(self) -> None:
        """Restart the service: it gets its previous port."""
        _print("5. It is restarted, and has its previous port at once.")
        before = self._client.call(calls.leases(service="orders", state="ended"))["leases"][0]
        self._start_service("orders")
        _command("portd run orders --check http:/healthz -- ./orders {port}")
        _until(lambda: self._is_ready("orders"), "the service is back")
        self._show_leases()
        after = self._lease("orders")
        again = "again" if after["port"] == before["port"] else f"instead of {before['port']}"
        print(f"   orders is on port {after['port']} {again}, as process {after['owner']['pid']}.", flush=True)

    def close(self) -> None:
        """End every process that the demo has started, the services first."""
        for name in reversed(self._processes):
            self._processes[name].terminate()
        for process in reversed(self._processes.values()):
            try:
                process.wait(STEP_MAX_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # --- steps ---

    def _start(self, name: str, *words: str) -> None:
        """Start a portd command in a session of its own: Ctrl-C goes to the demo, which ends the others in order."""
        self._processes[name] = subprocess.Popen(
            [sys.executable, "-m", "portd", *words], env=self._environ, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def _start_service(self, name: str) -> None:
        self._start(
            name,
            "run",
            name,
            "--check",
            "http:/healthz,interval=1",
            "--",
            sys.executable,
            "-m",
            "portd.cli.demo_service",
            name,
            "{port}",
        )

    def _lease(self, name: str) -> Any:
        return next(iter(self._client.call(calls.leases(service=name))["leases"]))

    def _is_ready(self, name: str) -> bool:
        if self._processes[name].poll() is not None:
            raise DemoFailed(f"the service {name} exited at once; its output is above")
        leases = self._client.call(calls.leases(service=name))["leases"]
        return any(lease["state"] == "bound" and lease["health"] == "passing" for lease in leases)

    def _show_leases(self) -> None:
        _command("portd ls")
        printing.aligned(
            ("SERVICE", "INSTANCE", "PORT", "OWNER", "STATE", "HEALTH"),
            [
                [
                    lease["service"],
                    lease["instance"],
                    printing.binding(lease),
                    printing.owner(lease["owner"]),
                    lease["state"],
                    printing.health(lease),
                ]
                for lease in self._client.leases()
            ],
            indent="   ",
        )
        _pause()

    def _show_who(self, port: int) -> None:
        view = self._client.call(calls.port(port))
        owner = view["lease"]["owner"]
        _command(
            f"portd who {port}",
            f"{port}/tcp: {view['verdict']}",
            f"lease    {view['lease']['service']} {view['lease']['instance']}",
            f"owner    {printing.owner(owner)}, since {printing.local(owner['started_at'])}",
        )


@contextmanager
def _stage() -> Iterator[Stage]:
    directory = tempfile.mkdtemp(prefix="portd-demo-")
    stage = Stage(directory)
    try:
        yield stage
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the cleanup
        stage.close()
        shutil.rmtree(directory, ignore_errors=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + STEP_MAX_S
    while not condition():
        if time.monotonic() > deadline:
            raise DemoFailed(f"not within {STEP_MAX_S:g} s: {what}")
        time.sleep(0.02)


def _print(*lines: str) -> None:
    print("\n" + "\n".join(lines), flush=True)


def _command(words: str, *answer: str) -> None:
    print(f"   $ {words}", *(f"     {line}" for line in answer), sep="\n", flush=True)
    _pause()


def _pause() -> None:
    if sys.stdout.isatty():
        time.sleep(PAUSE_S)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


COMMANDS = (
    Command(
        "demo",
        [],
        "Show leases, health, lookup and a crash with real services",
        demo,
        about="""
Starts a daemon and three small services in a temporary directory, and shows
leases, health, a lookup, a crash and the same port after it. Everything is
removed at the end.""",
    ),
)
