"""A load generator, run as a process of its own on a core of its own: keep-alive connections that each send their next
request when the answer to the last one is there. Prints requests a second and latencies as JSON.

`python -m tests.bench.load URL CONNECTIONS COUNT BODY`, URL being http://host:port/path or unix:/socket:/path.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import uvloop


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._buffer = b""

    def connection_made(self, transport):
        self._transport = transport

    def send(self):
        self._sent = time.perf_counter()
        self._transport.write(self._run.request)

    def data_received(self, data):
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        at = head.lower().index(b"content-length:") + 15
        if len(body) < int(head[at:].split(b"\r\n", 1)[0]):
            return
        self._buffer = b""
        self._run.answered(self, head, time.perf_counter() - self._sent)


class Run:
    """All connections, until `count` answers are in."""

    def __init__(self, request: bytes, count: int) -> None:
        self.request = request
        self.left_to_send = self.left = count
        self.latencies: list[float] = []
        self.failures = 0
        self.done = asyncio.get_running_loop().create_future()

    def answered(self, client, head, seconds):
        self.latencies.append(seconds)
        self.failures += not head.startswith(b"HTTP/1.1 20")
        self.left -= 1
        if self.left_to_send > 0:
            self.left_to_send -= 1
            client.send()
        elif self.left == 0:
            self.done.set_result(None)


async def main(url: str, connections: int, count: int, body: bytes) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    if url.startswith("unix:"):
        _, place, path = url.split(":")
        connect = lambda factory: loop.create_unix_connection(factory, place)  # noqa: E731
        host = "localhost"
    else:
        host, _, path = url.removeprefix("http://").partition("/")
        path = "/" + path
        name, port = host.split(":")
        connect = lambda factory: loop.create_connection(factory, name, int(port))  # noqa: E731
    request = (f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
               f"Content-Length: {len(body)}\r\n\r\n").encode() + body
    run = Run(request, count)
    clients = [(await connect(lambda: Client(run)))[1] for _ in range(connections)]
    started = time.perf_counter()
    for client in clients:
        run.left_to_send -= 1
        client.send()
    await run.done
    seconds = time.perf_counter() - started
    latencies = sorted(run.latencies)
    return {"per_second": count / seconds, "p50_ms": latencies[len(latencies) // 2] * 1e3,
            "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3, "failures": run.failures}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].encode()))))
