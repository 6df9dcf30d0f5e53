"""A load generator, run as a process of its own on a core of its own: connections that each go on when the answer to
the last request is there. Prints grants (or requests) a second and latencies as JSON.

`python -m tests.bench.load WAY URL CONNECTIONS COUNT [BODY]`. WAY is `http` (a POST where there is a BODY, else a GET),
`etcd` (a grant is a lease and a put-if-absent under it) or `portserver` (a grant is a connection of its own); URL is
http://host:port/path or unix:/socket:/path.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

import uvloop

Script = Generator[bytes, bytes, None]
"""The requests of one grant; each is sent when the answer's body to the one before has come in."""


class Run:
    """All grants of a run; each connection takes the next one when it is done with one."""

    def __init__(self, count: int) -> None:
        self.left_to_start = self.left = count
        self.latencies: list[float] = []
        self.failures = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self) -> bool:
        """Return whether there is another grant to be made."""
        self.left_to_start -= 1
        return self.left_to_start >= 0

    def granted(self, seconds: float) -> None:
        """Count one."""
        self.latencies.append(seconds)
        self.left -= 1
        if self.left == 0:
            self.done.set_result(None)


class Client(asyncio.Protocol):
    """One keep-alive connection of HTTP."""

    def __init__(self, run: Run, script: Callable[[int], Script]) -> None:
        self._run = run
        self._script = script
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        """Wait for `start`."""
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """Give up: a server that cuts connections off is not measured."""
        if not self._run.done.done():
            self._run.done.set_exception(error or ConnectionResetError("the server closed a connection"))

    def start(self) -> None:
        """Make the next grant."""
        if self._run.take():
            self._began = time.perf_counter()
            self._steps = self._script(self._run.left_to_start)
            self._transport.write(next(self._steps))

    def data_received(self, data: bytes) -> None:
        """Read an answer, and go on."""
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        at = head.lower().index(b"content-length:") + 15
        if len(body) < int(head[at:].split(b"\r\n", 1)[0]):
            return
        self._buffer = b""
        self._run.failures += not head.startswith(b"HTTP/1.1 20")
        try:
            self._transport.write(self._steps.send(body))
        except StopIteration:
            self._run.granted(time.perf_counter() - self._began)
            self.start()


def request(host: str, path: str, body: bytes) -> bytes:
    """Make a request."""
    head = f"Host: {host}\r\n"
    if not body:
        return f"GET {path} HTTP/1.1\r\n{head}\r\n".encode()
    return (
        f"POST {path} HTTP/1.1\r\n{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def plain(host: str, path: str, body: bytes) -> Callable[[int], Script]:
    """Make the script of a grant that is one request."""
    sent = request(host, path, body)

    def script(_: int) -> Script:
        yield sent

    return script


def etcd(host: str) -> Callable[[int], Script]:
    """Make the script of a lease and a put-if-absent, as etcd's JSON gateway wants them."""

    def script(number: int) -> Script:
        lease = json.loads((yield request(host, "/v3/lease/grant", b'{"TTL": "600"}')))["ID"]
        key = base64.b64encode(f"/ports/{os.getpid()}/{number}".encode()).decode()
        value = base64.b64encode(b'{"service": "bench", "pid": %d}' % os.getpid()).decode()
        answer = yield request(
            host,
            "/v3/kv/txn",
            json.dumps(
                {
                    "compare": [{"key": key, "target": "CREATE", "create_revision": "0"}],
                    "success": [{"requestPut": {"key": key, "value": value, "lease": lease}}],
                }
            ).encode(),
        )
        assert json.loads(answer)["succeeded"], answer

    return script


async def over_http(run: Run, way: str, url: str, connections: int, body: bytes) -> float:
    """Run over HTTP; returns when the first grant began."""
    loop = asyncio.get_running_loop()
    if url.startswith("unix:"):
        _, place, path = url.split(":", 2)
        host = "localhost"
    else:
        place = ""
        host, _, path = url.removeprefix("http://").partition("/")
        path = "/" + path
    script = etcd(host) if way == "etcd" else plain(host, path, body)
    name, _, port = host.partition(":")
    clients = []
    for _ in range(connections):
        make = lambda: Client(run, script)  # noqa: E731
        _, client = await (
            loop.create_unix_connection(make, place) if place else loop.create_connection(make, name, int(port))
        )
        clients.append(client)
    began = time.perf_counter()
    for client in clients:
        client.start()
    await run.done
    return began


async def over_portserver(run: Run, url: str, connections: int) -> float:
    """Run against a portserver; returns when the first grant began."""
    path = url.removeprefix("unix:")
    began = time.perf_counter()

    async def ask() -> None:
        while run.take():
            asked = time.perf_counter()
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"%d\n" % os.getpid())
            run.failures += not await reader.read()
            writer.close()
            run.granted(time.perf_counter() - asked)

    await asyncio.gather(*(ask() for _ in range(connections)))
    return began


async def main(way: str, url: str, connections: int, count: int, body: bytes) -> dict[str, float]:
    """Run, and return the figures."""
    run = Run(count)
    if way == "portserver":
        began = await over_portserver(run, url, connections)
    else:
        began = await over_http(run, way, url, connections, body)
    seconds = time.perf_counter() - began
    latencies = sorted(run.latencies)
    return {
        "per_second": count / seconds,
        "p50_ms": latencies[len(latencies) // 2] * 1e3,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
        "failures": run.failures,
    }


if __name__ == "__main__":
    words = [*sys.argv[1:], ""]
    print(json.dumps(uvloop.run(main(words[0], words[1], int(words[2]), int(words[3]), words[4].encode()))))
