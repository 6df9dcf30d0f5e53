"""DNS answers a second: portd, dnsmasq and unbound with the same records, asked by dnsperf, side by side in one run.

`python -m tests.bench dns`; needs dnsperf, dnsmasq and unbound (Debian: dnsperf, dnsmasq-base, unbound). A server has
one core (unbound one thread), dnsperf the other. Two questions over and over: A of a service, SRV of its ports; by
EDNS, so that all fit as much as they send into 1,232 bytes. portd runs as the daemon runs it: on uvloop, counting.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import dns.exception
import dns.flags
import dns.message
import dns.query
import uvloop

from portd.adapters.dns.message import Limits, Responder
from portd.adapters.dns.server import DnsServer
from portd.adapters.dns.zone import Zone
from portd.adapters.metrics import Metrics
from portd.core.model import Lease, Owner
from tests.bench.bed import LOAD_CORE, free_port, running, wait_for

SIZES: Final = (10, 100, 1000)
SECONDS: Final = 2
SERVICE: Final = "orders.portd.internal"
QUESTIONS: Final = {"A": SERVICE, "SRV": "_orders._tcp.portd.internal"}
PAYLOAD_BYTES: Final = 1232
FIRST_RECORD_BYTES: Final = 16
"""A pointer to the question, then an A record: type, class, TTL, length and address."""
Process = subprocess.Popen[Any]
UNBOUND: Final = """\
server:
  interface: 127.0.0.1@{port}
  username: ""
  chroot: ""
  directory: "{directory}"
  pidfile: ""
  use-syslog: no
  do-daemonize: no
  num-threads: 1
  edns-buffer-size: 1232
  max-udp-size: 1232
  minimal-responses: no
  rrset-roundrobin: yes
  module-config: "iterator"
  local-zone: "portd.internal." static
"""


async def measure() -> list[dict[str, Any]]:
    """Return a row for each server, size and type: answers a second, what one costs the server in µs of CPU time (which
    a busy machine disturbs least), latency in ms, the answer's bytes and records; then how evenly portd rotates. A row
    names a program that is missing."""
    return await asyncio.to_thread(lambda: [*_speed(), *_rotation()])


def _speed() -> Iterator[dict[str, Any]]:
    if shutil.which("dnsperf") is None:
        yield {"missing": "dnsperf"}
        return
    for count in SIZES:
        for serve, program in ((_portd, sys.executable), (_dnsmasq, "dnsmasq"), (_unbound, "unbound")):
            if shutil.which(program) is None:
                yield {"server": program, "instances": count, "missing": program}
            else:
                yield from _rows(serve, count)


def _rotation() -> Iterator[dict[str, Any]]:
    """Ask for each of 1,000 instances twice, by UDP and then by TCP as clients do after a cut answer."""
    count = SIZES[-1]
    zone = Zone(SERVICE.partition(".")[2], 0, ["127.0.0.1"])
    for lease in _leases(count):
        zone.apply(lease)
    responder = Responder(zone)
    firsts: dict[str, Counter[str]] = {"udp": Counter(), "tcp": Counter()}
    query = dns.message.make_query(SERVICE, "A").to_wire()
    for _ in range(2 * count):
        for way, size_bytes in (("udp", 512), ("tcp", 65535)):
            answer = responder.respond(query, Limits(size_bytes, size_bytes))
            assert answer is not None
            end = len(query) + FIRST_RECORD_BYTES
            firsts[way][socket.inet_ntoa(answer[end - 4 : end])] += 1
    for way, counts in firsts.items():
        yield {
            "server": "portd",
            "rotation": way,
            "instances": count,
            "ever_first": len(counts),
            "most_often": max(counts.values()),
            "least_often": min(counts.values()),
        }


def _rows(serve: Any, count: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        with serve(Path(directory), port, count) as process:
            for rdtype, name in QUESTIONS.items():
                answer = wait_for(lambda: _ask(port, name, rdtype), f"{serve.__name__} answers")  # noqa: B023
                yield {
                    "server": serve.__name__.strip("_"),
                    "type": rdtype,
                    "instances": count,
                    **_load(directory, port, name, rdtype, process.pid),
                    "bytes": len(answer.to_wire()),
                    "records": sum(map(len, answer.answer)),
                    "cut": bool(answer.flags & dns.flags.TC),
                }


def _ask(port: int, name: str, rdtype: str) -> dns.message.Message | None:
    query = dns.message.make_query(name, rdtype, payload=PAYLOAD_BYTES)
    try:
        answer = dns.query.udp(query, "127.0.0.1", 0.5, port)
    except (OSError, dns.exception.DNSException):
        return None
    return answer if answer.answer or answer.flags & dns.flags.TC else None


def _load(directory: str, port: int, name: str, rdtype: str, pid: int) -> dict[str, Any]:
    questions = Path(directory, "questions")
    questions.write_text(f"{name} {rdtype}\n")
    before_s = _cpu_s(pid)
    shown = subprocess.run(
        [
            "taskset",
            "-c",
            str(LOAD_CORE),
            "dnsperf",
            "-s",
            "127.0.0.1",
            "-p",
            str(port),
            "-e",
            "-c",
            "4",
            "-q",
            "64",
            "-l",
            str(SECONDS),
            "-d",
            str(questions),
        ],
        text=True,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout
    used_s = _cpu_s(pid) - before_s
    completed, lost, rate, latency_s = (
        float(re.search(rf"{label}[^:]*:\s+([\d.]+)", shown)[1])  # type: ignore[index]
        for label in ("Queries completed", "Queries lost", "Queries per second", "Average Latency")
    )
    return {
        "answers_per_s": round(rate),
        "cpu_us": round(used_s / completed * 1e6, 1),
        "latency_ms": round(latency_s * 1000, 2),
        "lost": round(lost),
    }


def _cpu_s(pid: int) -> float:
    """Return what a process has used, from proc(5)."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / 100


# --- the servers ---


def _instances(count: int) -> Iterator[tuple[str, str, int]]:
    for number in range(1, count + 1):
        yield f"orders-{number}.{SERVICE}", f"127.77.{number // 250}.{number % 250 + 1}", 20000 + number


@contextmanager
def _portd(directory: Path, port: int, count: int) -> Iterator[Process]:
    with running(sys.executable, "-m", "tests.bench.dns", str(port), str(count)) as process:
        yield process


@contextmanager
def _dnsmasq(directory: Path, port: int, count: int) -> Iterator[Process]:
    lines = [
        f"port={port}",
        "listen-address=127.0.0.1",
        "bind-interfaces",
        "no-resolv",
        "no-hosts",
        "user=root",
        f"pid-file={directory}/pid",
        "local=/portd.internal/",
        f"edns-packet-max={PAYLOAD_BYTES}",
    ]
    for host, address, its_port in _instances(count):
        lines += [
            f"host-record={host},{address}",
            f"host-record={SERVICE},{address}",
            f"srv-host={QUESTIONS['SRV']},{host},{its_port}",
        ]
    (directory / "dnsmasq.conf").write_text("\n".join(lines) + "\n")
    with running("dnsmasq", "-k", "-C", str(directory / "dnsmasq.conf")) as process:
        yield process


@contextmanager
def _unbound(directory: Path, port: int, count: int) -> Iterator[Process]:
    lines = [UNBOUND.format(port=port, directory=directory)]
    for host, address, its_port in _instances(count):
        lines += [
            f'local-data: "{host}. 0 IN A {address}"',
            f'local-data: "{SERVICE}. 0 IN A {address}"',
            f'local-data: "{QUESTIONS["SRV"]}. 0 IN SRV 0 1 {its_port} {host}."',
        ]
    (directory / "unbound.conf").write_text("\n".join(lines))
    with running("unbound", "-d", "-c", str(directory / "unbound.conf"), stderr=subprocess.DEVNULL) as process:
        yield process


async def _serve(port: int, count: int) -> None:
    server = DnsServer([("127.0.0.1", port)], on_query=Metrics().query)
    server.restore(_leases(count))
    await server.start()
    await asyncio.Event().wait()


def _leases(count: int) -> Iterator[Lease]:
    for host, address, port in _instances(count):
        yield Lease(
            id=str(port),
            service="orders",
            instance=host.partition(".")[0],
            endpoint="main",
            protocol="tcp",
            address=address,
            port=port,
            pool="default",
            hold="shared",
            state="bound",
            lifetime="process",
            host="here",
            created_at=0.0,
            owner=Owner(known_by="peercred"),
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        uvloop.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
    else:
        print(json.dumps(asyncio.run(measure()), indent=1))
