"""A listening socket on a leased port: by handoff, and by a lease and then a bind; µs each, on kept connections.

Beside them what nobody else knows of: a socket that binds port 0 and listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from tests.bench import bed

COUNT: Final = 400
ROUNDS: Final = 5


async def measure() -> list[dict[str, Any]]:
    """Return one row for each way: `way median_us fastest_us`, the ways in turn."""
    return await asyncio.to_thread(_measure)


def _measure() -> list[dict[str, Any]]:
    with bed.portd() as daemon:
        words = (sys.executable, "-m", "tests.bench.handing", daemon.socket, daemon.handoff)
        took: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            daemon.wait_for_no_lease()
            with bed.running(*words, core=bed.LOAD_CORE, stdout=subprocess.PIPE) as owner:
                for way, times in json.loads(owner.communicate(timeout=bed.DEADLINE_S)[0]).items():
                    took.setdefault(way, []).extend(times)
    return [
        {"way": way, "median_us": round(statistics.median(times), 1), "fastest_us": round(min(times), 1)}
        for way, times in took.items()
    ]


def take(connection: socket.socket, service: str) -> tuple[str, socket.socket]:
    """Lease, and receive the listening socket, in one message; returns the lease's id with it."""
    connection.send(json.dumps({"request": {"service": service}, "listen": True}).encode())
    answer, descriptors, _, _ = socket.recv_fds(connection, 65_536, 2)
    if not descriptors:
        raise RuntimeError(answer.decode())
    return json.loads(answer)["lease"]["id"], socket.socket(fileno=descriptors[0])


def lease_then_bind(call: bed.Call, service: str) -> tuple[str, socket.socket]:
    """Lease, bind as servers do, and listen; returns the lease's id with the socket."""
    lease = call.ask("POST", "/v1/leases", {"service": service})
    return lease["id"], socket.create_server(("127.0.0.1", lease["port"]))


def main(http_path: str, handoff_path: str) -> dict[str, list[float]]:
    """Own sockets in each way, and return the µs that each took."""
    took: dict[str, list[float]] = {}
    with (
        contextlib.closing(bed.Call(http_path)) as call,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
    ):
        connection.connect(handoff_path)
        ways: dict[str, Callable[[], socket.socket]] = {
            "handoff": lambda: take(connection, "handed")[1],
            "lease, then bind and listen": lambda: lease_then_bind(call, "bound")[1],
            "bind port 0 and listen, no portd": lambda: socket.create_server(("127.0.0.1", 0)),
        }
        for number in range(COUNT):
            for way, make in ways.items():
                began = time.perf_counter()
                made = make()
                if number > COUNT // 10:  # the first ones warm up
                    took.setdefault(way, []).append((time.perf_counter() - began) * 1e6)
                made.close()
    return took


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2])))
