"""Look-ups a second over the unix socket, beside an aiohttp hello-world on the same core.

GET /v1/services/NAME?passing=true of a service with ten passing instances, and with one.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final

from tests.bench import bed

INSTANCE_COUNTS: Final = (1, 10)
CONNECTIONS: Final = (1, 64)
ROUNDS: Final = 3
COUNT: Final = 6_000
YARDSTICK: Final = "aiohttp hello-world"


async def measure() -> list[dict[str, Any]]:
    """Return one row for each server and number of connections, the servers of one round in turn."""
    return await asyncio.to_thread(_measure)


def _measure() -> list[dict[str, Any]]:
    with bed.hello() as (hello, _), bed.portd() as daemon:
        ways = {YARDSTICK: hello}
        for count in INSTANCE_COUNTS:
            name = f"of{count}"
            for _ in range(count):
                lease = daemon.ask(
                    "POST",
                    "/v1/leases",
                    {"service": name, "pid": os.getpid(), "check": {"kind": "report", "ttl": 3600}},
                )
                daemon.ask("PUT", f"/v1/leases/{lease['id']}/health", {"status": "passing"})
            path = f"/v1/services/{name}?passing=true"
            assert len(daemon.ask("GET", path)["instances"]) == count
            ways[f"portd, {count} of {count} passing"] = f"unix:{daemon.socket}:{path}"
        return [row for connections in CONNECTIONS for row in _compare(ways, connections)]


def _compare(ways: dict[str, str], connections: int) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in ways}
    for number in range(ROUNDS + 1):
        for who, url in ways.items():
            run = bed.load("http", url, connections, COUNT)
            if number:  # the first round warms up
                runs[who].append(run)
    yardstick = bed.middle(runs[YARDSTICK])["per_second"]
    return [
        {
            "who": who,
            "connections": connections,
            "per_second": round(run["per_second"]),
            "of_yardstick": f"{run['per_second'] / yardstick:.0%}",
            "p50_ms": round(run["p50_ms"], 2),
            "p99_ms": round(run["p99_ms"], 2),
        }
        for who, run in ((who, bed.middle(some)) for who, some in runs.items())
    ]
