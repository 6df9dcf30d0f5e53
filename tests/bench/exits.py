"""From an owner's death to its port free and the event sent, for one owner and for 1,000 that are killed together.

Beside it: when the kernel itself says that the last of them is gone (pidfd_open(2)), watched by the same loop. A port
counts as free when a foreign process has bound it: that is tried from the moment on that its event came in.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from typing import Any, Final

from tests.bench import bed

OWNER_COUNTS: Final = (1, 1_000)
ROUNDS: Final = 3
OWNERS: Final = """
import os, signal, socket, sys
path, count = sys.argv[1], int(sys.argv[2])
body = b'{"service": "mortal"}'
head = "POST /v1/leases HTTP/1.1|Host: x|Content-Type: application/json|Content-Length: 21||"
request = head.replace("|", "\\r\\n").encode()
os.setpgid(0, 0)
for _ in range(count):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        place = socket.socket(socket.AF_UNIX)
        place.connect(path)
        place.sendall(request + body)
        place.recv(65536)
        os.write(writing, b"x")
        signal.pause()
    os.read(reading, 1)
    os.close(reading), os.close(writing)
    print(child, flush=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
sys.stdin.read()
"""
"""Forks owners that lease for themselves and wait; prints their pids, and ends when its input closes."""


async def measure() -> list[dict[str, Any]]:
    """Return one row for each number of owners, in milliseconds from the first kill, medians of ROUNDS."""
    return await asyncio.to_thread(_measure)


def _measure() -> list[dict[str, Any]]:
    rows = []
    with bed.portd() as daemon:
        for count in OWNER_COUNTS:
            rounds = [_round(daemon, count) for _ in range(ROUNDS)]
            rows.append(
                {
                    "owners": count,
                    **{name: round(statistics.median(one[name] for one in rounds), 2) for name in rounds[0]},
                }
            )
    return rows


def _round(daemon: bed.Portd, count: int) -> dict[str, float]:
    with bed.running(
        sys.executable,
        "-c",
        OWNERS,
        daemon.socket,
        str(count),
        core=bed.LOAD_CORE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owners:
        pids = [int(owners.stdout.readline()) for _ in range(count)]
        leased = {
            lease["owner"]["pid"]: lease["port"]
            for lease in daemon.ask("GET", "/v1/leases?service=mortal&limit=10000")["leases"]
        }
        assert sorted(leased) == sorted(pids), "every owner has its lease"
        watch = _Watch(daemon, pids)
        try:
            began = time.perf_counter()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            killed = time.perf_counter()
            watch.run(set(leased.values()))
        finally:
            watch.close()
        owners.stdin.close()
        owners.wait(bed.DEADLINE_S)
    return {
        "kills_sent_ms": (killed - began) * 1e3,
        "kernel_says_last_ms": (max(watch.gone) - began) * 1e3,
        "first_event_ms": (watch.freed[0] - began) * 1e3,
        "last_port_free_ms": (watch.freed[-1] - began) * 1e3,
    }


class _Watch:
    """One loop over pidfds and the event stream; binds each port as soon as the end of its lease is reported."""

    def __init__(self, daemon: bed.Portd, pids: list[int]) -> None:
        self.gone: list[float] = []
        self.freed: list[float] = []
        self._stream = socket.socket(socket.AF_UNIX)
        self._stream.connect(daemon.socket)
        self._stream.sendall(b"GET /v1/events?service=mortal HTTP/1.1\r\nHost: x\r\n\r\n")
        self._text = b""
        while b"\r\n\r\n" not in self._text:
            self._text += self._stream.recv(65536)
        self._loop = selectors.EpollSelector()
        self._loop.register(self._stream, selectors.EVENT_READ)
        self._pidfds = [os.pidfd_open(pid) for pid in pids]
        for pidfd in self._pidfds:
            self._loop.register(pidfd, selectors.EVENT_READ)

    def run(self, ports: set[int]) -> None:
        """Watch until every process is gone and every port has been bound by this one."""
        while ports or len(self.gone) < len(self._pidfds):
            ready = self._loop.select(bed.DEADLINE_S)
            assert ready, f"{len(ports)} ports are not free"
            for key, _ in ready:
                if key.fileobj is self._stream:
                    self._read(ports)
                else:
                    self.gone.append(time.perf_counter())
                    self._loop.unregister(key.fileobj)

    def _read(self, ports: set[int]) -> None:
        data = self._stream.recv(1 << 20)
        assert data, "the stream of events ended: its follower was too slow"
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and (event := json.loads(line[6:]))["type"] == "ended":
                self._bind(event["lease"]["port"])
                ports.discard(event["lease"]["port"])

    def _bind(self, port: int) -> None:
        end = time.monotonic() + bed.DEADLINE_S
        with socket.socket() as foreign:
            while True:
                try:
                    foreign.bind(("127.0.0.1", port))
                except OSError:  # another program of this host, or a portd of its own, was faster
                    assert time.monotonic() < end, f"port {port} is not free"
                else:
                    break
        self.freed.append(time.perf_counter())

    def close(self) -> None:
        """Close."""
        self._loop.close()
        self._stream.close()
        for pidfd in self._pidfds:
            os.close(pidfd)
