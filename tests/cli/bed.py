"""A real daemon on a directory of its own, and the command line and programs that speak to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

from portd._client import calls
from portd._client.client import Client
from portd._client.errors import DaemonUnavailable, ProtocolError
from tests.support.ports import claim_ports

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
DEADLINE_S = 20.0
CONFIG = """\
[listen]
socket = "{directory}/portd.sock"
handoff = "{directory}/handoff.sock"
http = ""
[store]
path = "{directory}/portd.db"
[pools.default]
ranges = ["{pool}"]
[leases]
cooldown = 0
[mdns]
enabled = false
[dns]
listen = ""
"""


def wait_for(condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Ask until the answer is true, and return it; fails at the deadline, and says what was waited for."""
    end = time.monotonic() + deadline_s
    while not (answer := condition()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {what} (last: {answer!r})"
        time.sleep(0.01)
    return answer


class Daemon:
    """One daemon, started and stopped as often as a test wants; its state stays in `directory`.

    Its pool is `port_count` ports from `first_port` on, claimed until `close`; or `pool`, which the caller has claimed.
    As a context it is stopped and closed at the end.
    """

    def __init__(self, directory: Path, port_count: int = 400, *, pool: str = "") -> None:
        self.directory = directory
        self._claims: list[socket.socket] = []
        if not pool:
            self.first_port, self._claims = claim_ports(port_count)
            self.last_port = self.first_port + port_count - 1
            pool = f"{self.first_port}-{self.last_port}"
        self.url = f"unix://{directory}/portd.sock"
        self._config = directory / "portd.toml"
        self._config.write_text(CONFIG.format(directory=directory, pool=pool))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.close()

    def close(self) -> None:
        """Give the pool's ports up."""
        for claim in self._claims:
            claim.close()

    @property
    def client(self) -> Client:
        """Return a client of this daemon."""
        return Client(self.url)

    @property
    def environ(self) -> dict[str, str]:
        """Return the environment of a program that finds this daemon and the sources."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PORT", "LISTEN_", "HOST", "XDG_"))
        }
        return {
            **kept,
            "PORTD_URL": self.url,
            "PYTHONPATH": f"{ROOT}:{ROOT}/clients/python",
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONWARNINGS": "error",
        }

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "portd", "serve", "--config", str(self._config)],
                env=self.environ,
                stdout=log,
                stderr=log,
            )
        wait_for(self._answers, f"the daemon answers; its log: {self.log()}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the daemon; does nothing when it is not running. One that does not stop in time fails the test."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the daemon did not stop; its log: {self.log()}") from None

    def forget(self) -> None:
        """Remove the state of a stopped daemon, as if its disk had been lost."""
        for path in self.directory.glob("portd.db*"):
            path.unlink()

    def log(self) -> str:
        """Return what the daemon wrote."""
        return (self.directory / "log").read_text()

    def portd(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run one command line to its end."""
        return subprocess.run(
            [sys.executable, "-m", "portd", *words],
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def start_program(self, words: Sequence[str]) -> subprocess.Popen[str]:
        """Start a program that finds this daemon; end it with `end`."""
        return subprocess.Popen(
            words, env=self.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def start_portd(self, *words: str) -> subprocess.Popen[str]:
        """Start a command line that goes on."""
        return self.start_program([sys.executable, "-m", "portd", *words])

    def start_python(self, source: str) -> subprocess.Popen[str]:
        """Start a Python program."""
        return self.start_program([sys.executable, "-u", "-c", source])

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            self.client.call(calls.status())
        except (DaemonUnavailable, ProtocolError):
            return False
        return True


@contextmanager
def serving(daemon: Daemon, service: str, *options: str) -> Iterator[int]:
    """Lease a port and listen on it in this process; yields the port once the daemon has seen the listener."""
    port = int(daemon.portd("lease", service, "--pid", str(os.getpid()), *options).stdout)
    with socket.create_server(("127.0.0.1", port)):
        wait_for(
            lambda: all(lease["state"] == "bound" for lease in daemon.client.leases(service=service, port=port)),
            f"the lease of {service} is bound",
        )
        yield port


def end(program: subprocess.Popen[str], number: int = signal.SIGKILL) -> str:
    """End a program that a test started, and return what it wrote that nobody has read."""
    if program.poll() is None:
        program.send_signal(number)
    written, _ = program.communicate(timeout=DEADLINE_S)
    return written
