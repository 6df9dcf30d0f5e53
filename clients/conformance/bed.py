"""A daemon that is called through the distribution portd-client, not through the command line's private copy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from portd_client import Client, DaemonUnavailable, ProtocolError
from tests.cli.bed import DEADLINE_S, end, wait_for
from tests.cli.bed import Daemon as BedDaemon

__all__ = ["DEADLINE_S", "Daemon", "end", "foreign_listener", "wait_for"]


@contextmanager
def foreign_listener(address: str, port: int) -> Iterator[None]:
    """Have another process listen on a port: this process' own listeners are leased back."""
    code = f"import socket, sys; s = socket.create_server(({address!r}, {port})); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        try:
            yield
        finally:
            process.kill()


class Daemon(BedDaemon):
    """One daemon, started and stopped as often as a test needs."""

    @property
    def client(self) -> Client:  # type: ignore[override]
        """Return a client of this daemon."""
        return Client(self.url)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            self.client.status()
        except (DaemonUnavailable, ProtocolError):
            return False
        return True
