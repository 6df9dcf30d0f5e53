"""What every measurement needs: servers that run on one core, load that runs on another, an HTTP call, a clean end.

Everything lives in a temporary directory and is ended by its pid. Figures of one call can be compared with each other,
and with nothing else: machines differ, and so do their hours.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
CORES: Final = sorted(os.sched_getaffinity(0))
SERVER_CORE: Final = CORES[0]
LOAD_CORE: Final = CORES[-1]
DEADLINE_S: Final = 60.0
CONFIG: Final = """\
[listen]
socket = "{directory}/portd.sock"
handoff = "{directory}/handoff.sock"
http = "127.0.0.1:{port}"
[pools.default]
ranges = ["{ports}"]
[leases]
cooldown = 0
quota_per_uid = {quota}
[store]
path = "{directory}/portd.db"
[mdns]
enabled = false
[dns]
listen = ""
[log]
level = "warning"
"""


@contextlib.contextmanager
def running(*words: str, core: int | None = SERVER_CORE, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Run a program on a core (None: on any), and end it."""
    pin = ("taskset", "-c", str(core)) if core is not None else ()
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/clients/python"}
    with subprocess.Popen([*pin, *words], env=environ, cwd=ROOT, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()


def wait_for(condition: Callable[[], Any], what: str, pause_s: float = 0.005) -> Any:
    """Ask until the answer is true, and return it; raises TimeoutError after DEADLINE_S."""
    end = time.monotonic() + DEADLINE_S
    while not (answer := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {DEADLINE_S} s: {what}")
        time.sleep(pause_s)
    return answer


def is_open(place: str | tuple[str, int]) -> bool:
    """Return whether something accepts connections on a unix socket (a path) or a TCP address."""
    with socket.socket(socket.AF_UNIX if isinstance(place, str) else socket.AF_INET) as probe:
        return probe.connect_ex(place) == 0


def free_port() -> int:
    """Return a TCP port of the kernel's choice."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Call(http.client.HTTPConnection):
    """A keep-alive connection to a unix socket."""

    def __init__(self, path: str) -> None:
        self._path = path
        super().__init__("localhost", timeout=DEADLINE_S)

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request and return the decoded answer, None for an empty one; raises for a refusal."""
        data = None if body is None else json.dumps(body)
        self.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        response = self.getresponse()
        answer = response.read()
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.status} {answer.decode()}")
        return json.loads(answer) if answer else None


class Portd:
    """A daemon on a directory of its own; ended leases' ports come back at once.

    `quota` is the leases of one user; 0: nothing runs out.
    """

    def __init__(self, directory: str, ports: str = "10000-31000", quota: int = 0) -> None:
        self.socket = f"{directory}/portd.sock"
        self.handoff = f"{directory}/handoff.sock"
        self.http = f"127.0.0.1:{free_port()}"
        self._config = Path(directory, "portd.toml")
        port = self.http.partition(":")[2]
        self._config.write_text(CONFIG.format(directory=directory, port=port, ports=ports, quota=quota))

    @contextlib.contextmanager
    def serving(self, core: int | None = SERVER_CORE) -> Iterator[subprocess.Popen[Any]]:
        """Run it; `ready_s` is then how long it took from exec to its first answer."""
        Path(self.socket).unlink(missing_ok=True)
        began = time.perf_counter()
        with running(sys.executable, "-m", "portd", "serve", "--config", str(self._config), core=core) as process:
            wait_for(lambda: process.poll() is not None or is_open(self.socket), "portd listens", pause_s=0.001)
            if process.poll() is not None:
                raise RuntimeError(f"portd exited with {process.returncode}: see its message above")
            self.ask("GET", "/healthz")
            self.ready_s = time.perf_counter() - began
            yield process

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request on a connection of its own."""
        with contextlib.closing(Call(self.socket)) as call:
            return call.ask(method, path, body)

    def wait_for_no_lease(self) -> None:
        """Wait until what earlier runs leased has ended: descriptors are bounded."""
        wait_for(lambda: self.ask("GET", "/v1/status")["counts"].get("leases") == 0, "no lease is left", 0.02)


@contextlib.contextmanager
def portd(ports: str = "10000-31000") -> Iterator[Portd]:
    """Run a daemon on the server's core."""
    with tempfile.TemporaryDirectory() as directory:
        daemon = Portd(directory, ports)
        with daemon.serving():
            yield daemon


@contextlib.contextmanager
def hello() -> Iterator[tuple[str, str]]:
    """Run the yardstick on the server's core; returns its URLs for the load generator: unix socket, TCP."""
    with tempfile.TemporaryDirectory() as directory:
        path, port = f"{directory}/hello.sock", free_port()
        with running(sys.executable, "-m", "tests.bench.hello", path, str(port)):
            wait_for(lambda: is_open(path) and is_open(("127.0.0.1", port)), "the yardstick listens")
            yield f"unix:{path}:/", f"http://127.0.0.1:{port}/"


def load(way: str, url: str, connections: int, count: int, body: str = "") -> dict[str, float]:
    """Run the load generator on its core; returns what it measured. Raises when an answer was a refusal."""
    words = [sys.executable, "-m", "tests.bench.load", way, url, str(connections), str(count), body]
    with running(*words, core=LOAD_CORE, stdout=subprocess.PIPE) as process:
        answer = json.loads(process.communicate(timeout=DEADLINE_S)[0] or "null")
    if answer is None or answer["failures"]:
        raise RuntimeError(f"{way} {url}: {answer}")
    return answer


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the run of the median throughput."""
    return sorted(runs, key=lambda run: run["per_second"])[len(runs) // 2]


def sync_ms(directory: str, count: int = 300) -> float:
    """Return the median time of writing 4 KiB into a file and syncing them."""
    took = []
    descriptor = os.open(f"{directory}/sync", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(descriptor, bytes(4096 * 16), 0)
        os.fsync(descriptor)
        for number in range(count):
            began = time.perf_counter()
            os.pwrite(descriptor, b"x" * 4096, 4096 * (number % 16))
            os.fdatasync(descriptor)
            took.append((time.perf_counter() - began) * 1e3)
    finally:
        os.close(descriptor)
    return statistics.median(took)
