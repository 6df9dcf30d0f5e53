"""Real etcd members on loopback, and sessions with them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from portd.adapters.etcd.gateway import Login
from portd.adapters.etcd.session import EtcdSession
from portd.cluster.entries import HostEntry
from portd.cluster.publisher import Publisher
from portd.cluster.view import Follow, View
from portd.core.model import Lease, Owner

DEADLINE_S = 20.0
needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="needs Debian's etcd-server")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Member:
    """One etcd process, which survives kill, suspension and restarts on its directory."""

    def __init__(self, directory: Path, name: str = "m0", cluster: str = "", ports: tuple[int, int] = (0, 0)) -> None:
        self.directory, self.name = directory, name
        self.client, self.peer = ports if ports[0] else (free_port(), free_port())
        self.url = f"http://127.0.0.1:{self.client}"
        self.cluster = cluster or f"{name}=http://127.0.0.1:{self.peer}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> Member:
        peer = f"http://127.0.0.1:{self.peer}"
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *("etcd", "--name", self.name, "--data-dir", str(self.directory / self.name)),
                    *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", self.cluster, "--initial-cluster-state", "new"),
                    *("--heartbeat-interval", "100", "--election-timeout", "600", *options),
                ],
                stdout=log,
                stderr=log,
            )
        return self

    def wait_ready(self) -> Member:
        end = time.monotonic() + DEADLINE_S
        while not self.answers():
            assert time.monotonic() < end, f"etcd {self.name} does not answer"
            time.sleep(0.05)
        return self

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1) as answer:
                return bool(json.load(answer)["health"] == "true")
        except (OSError, ValueError):
            return False

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def wipe(self) -> None:
        self.kill()
        shutil.rmtree(self.directory / self.name)


@contextlib.contextmanager
def etcd(directory: Path, count: int = 1) -> Iterator[list[Member]]:
    """Start a cluster of so many members."""
    ports = [(free_port(), free_port()) for _ in range(count)]
    cluster = ",".join(f"m{n}=http://127.0.0.1:{peer}" for n, (_, peer) in enumerate(ports))
    members = [Member(directory, f"m{n}", cluster, pair) for n, pair in enumerate(ports)]
    try:
        for member in members:
            member.start()
        for member in members:
            member.wait_ready()
        yield members
    finally:
        for member in members:
            member.kill()


def lease(host: str, number: int = 1, service: str = "orders", **fields: object) -> Lease:
    return Lease(
        **{
            "id": f"{host}-{number}",
            "service": service,
            "instance": f"{service}-{number}",
            "endpoint": "main",
            "protocol": "tcp",
            "address": "0.0.0.0",
            "port": 20000 + number,
            "pool": "default",
            "hold": "shared",
            "state": "bound",
            "lifetime": "process",
            "owner": Owner(known_by="socket"),
            "host": host,
            "created_at": 1.0,
            **fields,
        }
    )


class Node:
    """A host's publisher, view and session."""

    def __init__(
        self,
        name: str,
        members: list[Member],
        machine: str = "",
        ttl_s: int = 3,
        follow: Follow = "all",
        login: Login = Login(),  # noqa: B008 - immutable
        urls: list[str] | None = None,
    ) -> None:
        about = HostEntry(machine=machine or name, address="10.0.0.1")
        self.publisher = Publisher(name, about, ("10.0.0.1",))
        self.view = View(name, ttl_s, follow)
        self.session = EtcdSession(urls or [member.url for member in members], login, self.publisher, self.view, ttl_s)
        self.task: asyncio.Task[None] | None = None

    def put(self, *leases: Lease) -> None:
        for one in leases:
            self.publisher.observe(one, asyncio.get_running_loop().time())
        self.session._publish_now.set()

    def ids(self, service: str = "orders") -> set[str]:
        return {one.id for one in self.view.of_service(service)}

    def start(self) -> Node:
        self.task = asyncio.create_task(self.session.run())
        return self

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
            self.task = None


@contextlib.asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    """Run the sessions of these nodes."""
    for node in nodes:
        node.start()
    try:
        yield
    finally:
        for node in nodes:
            await node.stop()


async def until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        await asyncio.sleep(0.01)
