"""Mixed load for a long time: what grows? Owners die, checks flap, followers come and go, the daemon restarts.

`python -m tests.bench soak --minutes 60`. Memory, descriptors and threads must level off; the store is bounded by its
settings; the latency of a grant must not drift.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import random
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.e2e.harness import Daemon, Stream, listen_on

ROWS: Final = 12
"""Rows of the table, whatever the time."""
RESTART_S: Final = 60.0
LIVE_MAX: Final = 100
"""Leases that the load keeps at most; beyond, the oldest is released."""


class Load:
    """Threads that do one thing each until `stop`; a daemon that is away is waited for."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._is_done = threading.Event()
        self._threads: list[threading.Thread] = []
        self.latencies_ms: list[float] = []
        self.errors: list[str] = []

    def start(self, *works: Callable[[random.Random], None]) -> None:
        """Start a thread for each kind of work."""
        for seed, work in enumerate(works):
            thread = threading.Thread(target=self._repeat, args=(work, random.Random(seed)), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End every thread."""
        self._is_done.set()
        for thread in self._threads:
            thread.join(10)

    def _repeat(self, work: Callable[[random.Random], None], chance: random.Random) -> None:
        while not self._is_done.is_set():
            try:
                work(chance)
            except (OSError, http.client.HTTPException, ValueError):
                self._is_done.wait(0.2)  # the daemon restarts

    def churn(self, chance: random.Random) -> None:
        """Lease, renew, change and release on one connection."""
        held: list[str] = []
        with self._daemon.connect() as connection:
            while not self._is_done.wait(0.01):
                began = time.perf_counter()
                reply = connection.call("POST", "/v1/leases", {"service": f"s{chance.randrange(200)}", "ttl": 30})
                self.latencies_ms.append((time.perf_counter() - began) * 1000)
                if reply.status != 201:
                    self.errors.append(f"{reply.status} {reply.code}")
                    continue
                held.append(reply.body["id"])
                connection.call("POST", f"/v1/leases/{chance.choice(held)}/renew")
                connection.call("PATCH", f"/v1/leases/{held[-1]}", {"metadata": {"n": str(chance.random())}})
                if len(held) > LIVE_MAX:
                    connection.call("DELETE", f"/v1/leases/{held.pop(0)}")

    def dying_owners(self, chance: random.Random) -> None:
        """Lease for processes that exit."""
        with subprocess.Popen(["sleep", str(0.1 + chance.random())]) as process:
            self._daemon.lease("mortal", pid=process.pid)

    def flapping_checks(self, chance: random.Random) -> None:
        """Listen and stop listening under a check."""
        check = {"kind": "tcp", "interval": 0.2, "timeout": 0.2}
        lease = self._daemon.lease("flapping", ttl=20, check=check)
        with listen_on(lease["port"]):
            self._is_done.wait(0.5 + chance.random())
        self._is_done.wait(0.5)

    def followers(self, chance: random.Random) -> None:
        """Follow for a while, and leave in the middle of it."""
        with Stream(self._daemon, timeout_s=2.0) as stream:
            for count, _ in enumerate(stream):
                if count > chance.randrange(500):
                    return

    def look_ups(self, chance: random.Random) -> None:
        """Look services up, list, and read metrics."""
        for path in (f"/v1/services/s{chance.randrange(200)}", "/v1/leases?limit=100", "/metrics", "/v1/status"):
            self._daemon.call("GET", path)
        self._is_done.wait(0.1)


async def measure(minutes: float = 5.0) -> list[dict[str, Any]]:
    """Return ROWS rows over the time."""
    return await asyncio.to_thread(soak, minutes)


def soak(minutes: float) -> list[dict[str, Any]]:
    """Run the load for so many minutes, and return what was seen."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="portd-") as directory:
        Path(directory).chmod(0o755)
        with Daemon(Path(directory), port_count=1000, extra="[leases]\ncooldown = 0.1") as daemon:
            daemon.start()
            load = Load(daemon)
            load.start(load.churn, load.churn, load.dying_owners, load.flapping_checks, load.followers, load.look_ups)
            began = restarted = time.monotonic()
            for row in range(1, ROWS + 1):
                while time.monotonic() < began + minutes * 60 * row / ROWS:
                    time.sleep(0.2)
                    if time.monotonic() - restarted > RESTART_S:
                        restarted = time.monotonic()
                        daemon.restart(random.choice((signal.SIGTERM, signal.SIGKILL)))
                rows.append(observe(daemon, load, time.monotonic() - began))
            load.stop()
    return rows


def observe(daemon: Daemon, load: Load, seconds: float) -> dict[str, Any]:
    """Read what the daemon uses now, and the latencies since the last time."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines() if ":" in line
    )
    latencies, load.latencies_ms = sorted(load.latencies_ms), []
    store = {"store_mib": daemon.store, "log_mib": daemon.store.with_name("portd.db-wal")}
    with contextlib.suppress(OSError):
        sizes = {name: round(path.stat().st_size / 2**20, 1) for name, path in store.items()}
    return {
        "seconds": round(seconds),
        "rss_mib": int(status["VmRSS"].split()[0]) >> 10,
        "fds": len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())),
        "threads": int(status["Threads"]),
        **sizes,
        "grants": len(latencies),
        "p50_ms": round(statistics.median(latencies), 2) if latencies else None,
        "p99_ms": round(latencies[int(len(latencies) * 0.99)], 2) if latencies else None,
        "errors": len(load.errors),
    }
