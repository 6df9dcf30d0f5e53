"""Durable grants a second, beside an aiohttp hello-world, etcd and portpicker's portserver; each on the same one core.

A grant of portd is on the disk (`durability = "full"`), has its hold and its owner's pidfd when it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.bench import bed

CONNECTIONS: Final = (1, 16, 64, 256)
ROUNDS: Final = 3
BODY: Final = '{"service": "bench"}'
COUNTS: Final = {
    "aiohttp hello-world": (4_000, 12_000),
    "portd": (1_500, 6_000),
    "etcd": (500, 2_000),
    "portserver": (1_000, 1_000),
}
"""Grants of one run at one connection, and at more: each about half a second; portd's stay below its descriptors."""
YARDSTICK: Final = "aiohttp hello-world"
PORTSERVER_CONNECTIONS_MAX: Final = 64
"""Each of its grants is a connection, and more than 100 at once are refused (its listen() takes asyncio's backlog)."""


@contextlib.contextmanager
def etcd() -> Iterator[str]:
    """Run etcd on the server's core; returns its URL."""
    with tempfile.TemporaryDirectory() as directory:
        client, peer = bed.free_port(), bed.free_port()
        words = (
            "etcd",
            "--data-dir",
            directory,
            "--listen-client-urls",
            f"http://127.0.0.1:{client}",
            "--advertise-client-urls",
            f"http://127.0.0.1:{client}",
            "--listen-peer-urls",
            f"http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls",
            f"http://127.0.0.1:{peer}",
            "--initial-cluster",
            f"default=http://127.0.0.1:{peer}",
        )
        with bed.running(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            bed.wait_for(lambda: _works(f"http://127.0.0.1:{client}/"), "etcd has elected itself", 0.1)
            yield f"http://127.0.0.1:{client}/"


def _works(url: str) -> bool:
    if not bed.is_open(("127.0.0.1", int(url.rstrip("/").rpartition(":")[2]))):
        return False
    with contextlib.suppress(RuntimeError):
        bed.load("etcd", url, 1, 1)
        return True
    return False


def portserver_program() -> str | None:
    """Find portpicker's portserver.py, beside this Python or in the path."""
    beside = Path(sys.executable).with_name("portserver.py")
    return str(beside) if beside.exists() else shutil.which("portserver.py")


@contextlib.contextmanager
def portserver(program: str, ports: str = "10000-31000") -> Iterator[str]:
    """Run portserver on the server's core; returns its URL."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/portserver.sock"
        with bed.running(
            program,
            "--portserver_unix_socket_address",
            path,
            "--portserver_static_pool",
            ports,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ):
            bed.wait_for(lambda: bed.is_open(path), "portserver listens")
            yield f"unix:{path}"


async def measure(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Return one row for each server, socket and number of connections, the servers of one round in turn."""
    return await asyncio.to_thread(_measure, rounds)


def _measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    with contextlib.ExitStack() as stack:
        hello_unix, hello_tcp = stack.enter_context(bed.hello())
        daemon = stack.enter_context(bed.portd())
        urls = {("unix", YARDSTICK): hello_unix, ("unix", "portd"): f"unix:{daemon.socket}:/v1/leases"}
        missing = []
        if program := portserver_program():
            urls["unix", "portserver"] = stack.enter_context(portserver(program))
        else:
            missing.append("portserver (pip install portpicker)")
        urls |= {("tcp", YARDSTICK): hello_tcp, ("tcp", "portd"): f"http://{daemon.http}/v1/leases"}
        if shutil.which("etcd"):
            urls["tcp", "etcd"] = stack.enter_context(etcd())
        else:
            missing.append("etcd (Debian: etcd-server)")
        for over in ("unix", "tcp"):
            for connections in CONNECTIONS:
                ways = {
                    who: url
                    for (kind, who), url in urls.items()
                    if kind == over and (who != "portserver" or connections <= PORTSERVER_CONNECTIONS_MAX)
                }
                rows += _compare(over, ways, connections, rounds, daemon)
        rows += [{"who": f"{who}: not installed"} for who in missing]
    with tempfile.TemporaryDirectory() as directory:
        rows.append({"who": "fdatasync of 4 KiB", "p50_ms": round(bed.sync_ms(directory), 2)})
    return rows


def _compare(over: str, ways: dict[str, str], connections: int, rounds: int, daemon: bed.Portd) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in ways}
    for number in range(rounds + 1):
        for who, url in ways.items():
            daemon.wait_for_no_lease()
            kind, body = (who, "") if who in ("etcd", "portserver") else ("http", BODY)
            count = COUNTS[who][connections > 1]
            run = bed.load(kind, url, connections, count if number else min(count, 1_000), body)
            if number:  # the first round warms up
                runs[who].append(run)
    yardstick = bed.middle(runs[YARDSTICK])["per_second"]
    return [
        {
            "who": who,
            "over": over,
            "connections": connections,
            "per_second": round(run["per_second"]),
            "of_yardstick": f"{run['per_second'] / yardstick:.0%}",
            "p50_ms": round(run["p50_ms"], 2),
            "p99_ms": round(run["p99_ms"], 2),
        }
        for who, run in ((who, bed.middle(some)) for who, some in runs.items())
    ]


def main() -> None:
    """Compare portd with the yardstick alone, over the unix socket: for work on the grant's path."""
    rounds = int(os.environ.get("ROUNDS", "5"))
    with bed.hello() as (hello_unix, _), bed.portd() as daemon:
        ways = {YARDSTICK: hello_unix, "portd": f"unix:{daemon.socket}:/v1/leases"}
        for connections in (1, 64):
            for row in _compare("unix", ways, connections, rounds, daemon):
                print(row)


if __name__ == "__main__":
    main()
