"""Memory of the daemon with no lease and with 10,000, and the time from exec to its first answer.

RSS counts shared pages whole, PSS by share (proc_pid_smaps(5)); kernel memory of holds (3 to 4 KB each) is in neither.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

from tests.bench import bed

LEASE_COUNT: Final = 10_000
CALL_SIZE: Final = 250
STARTS: Final = 5


async def measure() -> list[dict[str, Any]]:
    """Return one row for each number of leases: `leases rss_mib pss_mib ready_ms`."""
    return await asyncio.to_thread(_measure)


def _measure() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        daemon = bed.Portd(directory)
        rows = [_row(daemon, 0)]
        with daemon.serving():
            body = {"service": "bench", "pid": os.getpid()}
            for _ in range(LEASE_COUNT // CALL_SIZE):
                daemon.ask("POST", "/v1/leases", [body] * CALL_SIZE)
        return [*rows, _row(daemon, LEASE_COUNT)]


def _row(daemon: bed.Portd, leases: int) -> dict[str, Any]:
    ready_ms, memory = [], {}
    for _ in range(STARTS):
        with daemon.serving() as process:
            ready_ms.append(daemon.ready_s * 1e3)
            memory = _memory_mib(process.pid)
    return {
        "leases": leases,
        "rss_mib": memory["Rss"],
        "pss_mib": memory["Pss"],
        "ready_ms": round(statistics.median(ready_ms)),
    }


def _memory_mib(pid: int) -> dict[str, float]:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {name: round(int(kib) / 1024, 1) for name, kib in re.findall(r"(?m)^(Rss|Pss): +(\d+) kB", text)}
