"""Many followers of the event stream, in one process: `python -m tests.bench.followers SOCKET COUNT [SERVICE]`.

Prints `ready` when all of them follow; then, for each revision that all have seen, a line of JSON: when the first and
the last had it, by the monotonic clock that all processes of a host share. Ends when its input closes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
import time
from collections import defaultdict
from typing import Any

import uvloop

IDS = re.compile(rb"^id: (\d+)$", re.MULTILINE)


class Follower(asyncio.Protocol):
    """One stream; data is searched whole, without parsing: the reader shares its core with whoever makes the events."""

    def __init__(
        self, seen: dict[int, list[float]], count: int, request: bytes, following: asyncio.Future[None]
    ) -> None:
        self._seen = seen
        self._count = count
        self._request = request
        self._following = following

    def connection_made(self, transport: Any) -> None:
        """Ask for the stream."""
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note what came."""
        now = time.monotonic()
        if not self._following.done():
            self._following.set_result(None)
        for found in IDS.findall(data):
            times = self._seen[int(found)]
            times.append(now)
            if len(times) == self._count:
                del self._seen[int(found)]
                print(json.dumps({"revision": int(found), "first": times[0], "last": now}), flush=True)


async def main(path: str, count: int, service: str) -> None:
    """Follow until the input closes."""
    loop = asyncio.get_running_loop()
    query = f"?service={service}" if service else ""
    request = f"GET /v1/events{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    seen: dict[int, list[float]] = defaultdict(list)
    for _ in range(count):
        following = loop.create_future()
        make = lambda: Follower(seen, count, request, following)  # noqa: B023, E731
        await loop.create_unix_connection(make, path)
        await following
    gc.freeze()
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), (sys.argv[3:] or [""])[0]))
