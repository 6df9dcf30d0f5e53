"""A daemon, a gateway and real services for the gateway's tests."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from tests.cli.bed import Daemon, end, wait_for

T = TypeVar("T")
BACKEND = Path(__file__).with_name("backend.py")


@contextmanager
def backend(daemon: Daemon, name: str, *options: str, wait: bool = True) -> Iterator[subprocess.Popen[str]]:
    """An instance of a service; it serves when the block begins, unless `wait` is False."""
    program = daemon.start_portd("run", name, *options, "--", sys.executable, str(BACKEND), "{port}")
    try:
        if wait:
            wait_bound(daemon, program)
        yield program
    finally:
        end(program)


def wait_bound(daemon: Daemon, program: subprocess.Popen[str]) -> None:
    """Wait until the daemon has seen that a program listens."""

    def is_bound() -> bool:
        assert program.poll() is None, program.communicate()
        return any(
            lease["state"] == "bound" and lease["endpoint"] == "main" and lease["owner"]["pid"] == program.pid
            for lease in daemon.client.leases()
        )

    wait_for(is_bound, "the service is bound")


def run(conversation: Coroutine[Any, Any, T]) -> T:
    """Run a client. On uvloop: asyncio's own loop complains of TLS connections that a session has just closed."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(conversation)


class Gateway:
    """A running `portd gateway` and the daemon that it follows."""

    PORTD = (sys.executable, "-m", "portd")

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        with socket.create_server(("127.0.0.1", 0)) as chosen:
            self.port = chosen.getsockname()[1]
        self.program = daemon.start_portd("gateway", "--listen", f"127.0.0.1:{self.port}")
        wait_for(self._is_leased, "the gateway's lease is bound")

    def close(self) -> None:
        """Stop the gateway; it must stop cleanly."""
        written = end(self.program, signal.SIGTERM)
        assert self.program.returncode == 0, written
        assert "Traceback" not in written, written

    def service(self, name: str, *options: str, wait: bool = True) -> AbstractContextManager[subprocess.Popen[str]]:
        """An instance of a service."""
        return backend(self.daemon, name, *options, wait=wait)

    def _is_leased(self) -> bool:
        assert self.program.poll() is None, self.program.communicate()
        return any(lease["state"] == "bound" for lease in self.daemon.client.leases(service="portd-gateway"))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that the tests of a module share."""
    with Daemon(tmp_path_factory.mktemp("portd")) as daemon:
        daemon.start()
        made = Gateway(daemon)
        yield made
        made.close()
