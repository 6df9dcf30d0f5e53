"""The daemons that cases are played against: real ones, with settings of a case's own where it has some."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clients.conformance.bed import Daemon, wait_for
from clients.conformance.matching import filled
from portd_client import calls
from portd_client.errors import PortdError
from portd_client.protocol import Request
from tests.cli.bed import CONFIG


class Stage(Daemon):
    """A daemon, and what a case does to it. `pool` is where its ports come from; `settings` are a case's own.

    `facts` are what cases may know of it, as variables.
    """

    def __init__(self, directory: Path, pool: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        super().__init__(directory, pool=pool)
        self.facts = {"url": self.url, "runtime": str(directory.parent), **facts}
        base = tomllib.loads(CONFIG.format(directory=directory, pool=pool))
        (directory / "portd.toml").write_text(_toml(_merged(base, filled(settings, self.facts))))
        self.is_running = False

    def do(self, what: str) -> None:
        """Do to the daemon what a case says: start, stop, kill, forget (its store is lost), suspend, resume."""
        if what == "start":
            self.start()
        elif what in {"stop", "kill"}:
            self.stop(signal.SIGKILL if what == "kill" else signal.SIGTERM)
        elif what == "forget":
            self.forget()
        elif what == "suspend":
            os.kill(self._pid, signal.SIGSTOP)
        elif what == "resume":
            os.kill(self._pid, signal.SIGCONT)
        else:
            raise ValueError(f"a daemon can't {what}")

    def start(self) -> None:
        """Start it, if it does not run."""
        if not self.is_running:
            super().start()
            self.is_running = True
            self._pid = self.client.call(calls.status())["pid"]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; one that is suspended would not mind SIGTERM."""
        if self.is_running and number == signal.SIGTERM:
            os.kill(self._pid, signal.SIGCONT)
        self.is_running = False
        super().stop(number)

    def clear(self) -> None:
        """Make it as it was at first: running, without leases."""
        self.start()
        os.kill(self._pid, signal.SIGCONT)
        for lease in list(self.client.leases(limit=1000)):
            self.client.call(calls.release(lease["id"]))

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Make one call, as somebody else than the driver; a refusal is its problem document."""
        try:
            return self.client.call(Request(method, path, body))
        except PortdError as error:
            return getattr(error, "document", None) or {"away": str(error)}

    def leases_of(self, pid: int) -> list[str]:
        """Return the services that a process still has leases of."""
        return [lease["service"] for lease in self.client.leases(pid=pid)] if self.is_running else []

    def wait_for_no_leases_of(self, pid: int) -> None:
        """Wait until a process has no lease any more."""
        wait_for(lambda: not self.leases_of(pid), "every lease of the driver has ended")


def _merged(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in settings.items():
        merged[key] = _merged(base.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def _toml(tables: Mapping[str, Any], prefix: str = "") -> str:
    """Write tables as TOML; JSON's strings, numbers, booleans and lists are TOML's as well."""
    plain = "".join(f"{key} = {json.dumps(value)}\n" for key, value in tables.items() if not isinstance(value, dict))
    return (
        (f"[{prefix}]\n" if prefix else "")
        + plain
        + "".join(
            _toml(value, f"{prefix}.{key}".lstrip(".")) for key, value in tables.items() if isinstance(value, dict)
        )
    )
