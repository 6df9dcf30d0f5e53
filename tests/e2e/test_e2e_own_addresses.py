"""Own addresses: the free choice of port that people use virtual machines for, with real servers that want one port."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import Daemon, program, wait_for

REDIS_PORT = 6379


def redis(host: str, *words: str) -> str:
    """Run a command on a Redis server; returns what it says, or an empty text while it does not answer."""
    asked = subprocess.run(
        ["redis-cli", "-h", host, "-p", str(REDIS_PORT), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=10,
    )
    return asked.stdout.strip() if asked.returncode == 0 else ""


def test_two_redis_servers_use_the_same_port(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon().start()
    command = [
        sys.executable,
        "-m",
        "portd",
        "run",
        "cache",
        "--own-address",
        "--port",
        str(REDIS_PORT),
        "--exact",
        "--",
        "redis-server",
        "--bind",
        "{host}",
        "--port",
        "{port}",
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    with program(*command, env=daemon.environ), program(*command, env=daemon.environ):
        wait_for(lambda: [lease["state"] for lease in daemon.leases().values()] == ["bound"] * 2, "both listen")
        bound = sorted(lease["address"] for lease in daemon.leases().values())
        assert len(set(bound)) == 2
        assert {lease["port"] for lease in daemon.leases().values()} == {REDIS_PORT}
        for address in bound:
            assert redis(address, "set", "whose", address) == "OK"
        assert [redis(address, "get", "whose") for address in bound] == bound


def test_instances_of_ten_services_each_get_their_requested_port(own_daemon: Daemon) -> None:
    listeners = []
    try:
        for service, instance in itertools.product(range(10), range(10)):
            port = 5432 if service % 2 else 8080
            lease = own_daemon.lease(
                f"service{service}",
                address="own",
                port=port,
                exact=True,
                ttl=60,
                instance=f"service{service}-{instance}",
            )
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
            listener.bind((lease["address"], port))
            listener.listen()
            listeners.append(listener)
        addresses = {listener.getsockname() for listener in listeners}
        assert len(addresses) == 100
        wait_for(lambda: {lease["state"] for lease in own_daemon.leases().values()} == {"bound"}, "all are bound")
    finally:
        for listener in listeners:
            listener.close()
