"""Programs under portd, for the tests that run what people run: started, waited for, and ended with all they leave."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.harness import DEADLINE_S, Daemon, wait_for


def need(program: str) -> str:
    """Return the path of a program; skips the test where it is not installed."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


class Programs:
    """Programs started under portd; those that outlive their starter are ended by the pid of their lease."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self._started: list[subprocess.Popen[str]] = []

    def run(self, service: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start a command with `portd run`."""
        return self.start(sys.executable, "-m", "portd", "run", service, *options, "--", *command)

    def start(self, *command: str, **environ: str) -> subprocess.Popen[str]:
        """Start a command in the environment of this daemon."""
        process = subprocess.Popen(
            command,
            env={**self.daemon.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def lease_of(self, service: str, state: str = "bound", deadline_s: float = DEADLINE_S) -> Any:
        """Wait until the service has one lease in this state, and return it."""

        def found() -> Any:
            leases = self.daemon.get(f"/v1/leases?service={service}")["leases"]
            return leases[0] if len(leases) == 1 and leases[0]["state"] == state else None

        return wait_for(found, f"{service} is {state}", deadline_s)

    def end(self) -> None:
        """End everything that was started here, and what it left behind."""
        for lease in self.daemon.leases().values():
            if lease["owner"]["pid"] not in (None, os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(lease["owner"]["pid"], signal.SIGKILL)
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
