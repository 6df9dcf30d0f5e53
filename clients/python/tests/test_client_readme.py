"""The README's programs run as they stand."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path
from urllib.request import urlopen

from clients.conformance.bed import Daemon, end, wait_for

SERVICE, LOOK_UP, ASYNC_SERVICE = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL
)


def port_of(program: subprocess.Popen[str]) -> int:
    """Read the port that a program says it is on."""
    assert program.stdout is not None
    line = program.stdout.readline()
    assert line.split()[:-1] == [line.split()[0], "is", "on", "port"], line
    return int(line.split()[-1])


def test_the_service_serves(daemon: Daemon) -> None:
    service = daemon.start_python(SERVICE)
    try:
        port = port_of(service)
        with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
            assert answer.read() == b"ok\n"
    finally:
        end(service)


def test_the_look_up_prints_where_a_working_instance_is(daemon: Daemon) -> None:
    lease = daemon.client.grant({"service": "orders", "ttl": 60})
    with socket.create_server((lease["address"], lease["port"])):
        wait_for(lambda: daemon.client.lease(lease["id"])["state"] == "bound", "it is bound")
        written, _ = daemon.start_python(LOOK_UP).communicate(timeout=20)
    assert written == f"{lease['address']} {lease['port']}\n"


def test_the_asyncio_service_serves(daemon: Daemon) -> None:
    service = daemon.start_python(ASYNC_SERVICE)
    try:
        with socket.create_connection(("127.0.0.1", port_of(service)), 10) as caller:
            assert caller.recv(6) == b"hello\n"
    finally:
        end(service)
