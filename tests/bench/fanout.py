"""One event to 1,000 followers: ms from the request to the first and the last; and what followers cost grants.

Those who follow another service are not woken; those who follow everything get every grant, a thousand times.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, Final

from tests.bench import bed

FOLLOWER_COUNT: Final = 1_000
EVENTS: Final = 40
GRANTS: Final = 4_000
FEW_GRANTS: Final = 200
ROUNDS: Final = 3


async def measure() -> list[dict[str, Any]]:
    """Return one row for each question."""
    return await asyncio.to_thread(_measure)


def _measure() -> list[dict[str, Any]]:
    with bed.portd() as daemon:
        rows = [_grants(daemon, "no followers", GRANTS)]
        with _following(daemon, "other"):
            rows.append(_grants(daemon, f"{FOLLOWER_COUNT:,} follow another service", GRANTS))
        with _following(daemon, "watched") as reports:
            rows.append(_one_event(daemon, reports))
        with _following(daemon, ""):
            rows.append(_grants(daemon, f"{FOLLOWER_COUNT:,} follow everything", FEW_GRANTS))
    return rows


@contextlib.contextmanager
def _following(daemon: bed.Portd, service: str) -> Iterator[IO[str]]:
    words = (sys.executable, "-m", "tests.bench.followers", daemon.socket, str(FOLLOWER_COUNT), service)
    with bed.running(*words, core=bed.LOAD_CORE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as followers:
        assert followers.stdout is not None
        assert followers.stdout.readline() == "ready\n"
        yield followers.stdout


def _grants(daemon: bed.Portd, who: str, count: int) -> dict[str, Any]:
    runs = []
    for number in range(ROUNDS + 1):
        daemon.wait_for_no_lease()
        run = bed.load("http", f"unix:{daemon.socket}:/v1/leases", 64, count, '{"service": "bench"}')
        if number:
            runs.append(run)
    run = bed.middle(runs)
    return {
        "what": f"grants, 64 connections, {who}",
        "per_second": round(run["per_second"]),
        "p50_ms": round(run["p50_ms"], 2),
        "p99_ms": round(run["p99_ms"], 2),
    }


def _one_event(daemon: bed.Portd, reports: IO[str]) -> dict[str, Any]:
    firsts, lasts = [], []
    with contextlib.closing(bed.Call(daemon.socket)) as call:
        lease = call.ask("POST", "/v1/leases", {"service": "watched", "pid": os.getpid()})
        reports.readline()
        for number in range(EVENTS):
            began = time.monotonic()
            call.ask("POST", f"/v1/leases/{lease['id']}/drain", {"drain": number % 2 == 0})
            seen = json.loads(reports.readline())
            firsts.append((seen["first"] - began) * 1e3)
            lasts.append((seen["last"] - began) * 1e3)
        call.ask("DELETE", f"/v1/leases/{lease['id']}")
    return {
        "what": f"one event to {FOLLOWER_COUNT:,} followers, from the request on",
        "first_ms": round(statistics.median(firsts), 2),
        "last_ms": round(statistics.median(lasts), 2),
    }
