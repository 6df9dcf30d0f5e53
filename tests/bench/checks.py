"""What health checks cost: a thousand services, each checked every ten seconds, as the daemon does it (uvloop).

The services are real listeners of another process; the CPU time is that of the prober's process alone, which does
nothing else. `python -m tests.bench checks`; a row takes ten seconds.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

import uvloop
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import StreamEnded

from portd.adapters.clock import LeaseClock
from portd.adapters.probes.prober import Prober
from portd.core.model import Check, GrpcCheck, HttpCheck, Lease, Owner, TcpCheck

SERVICE_COUNT: Final = 1_000
INTERVAL_S: Final = 10.0
WARM_UP_S: Final = 2.0
HTTP_ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nok\n"
KINDS: Final[dict[str, Check]] = {
    "http": HttpCheck(path="/healthz", interval=INTERVAL_S),
    "https": HttpCheck(path="/healthz", interval=INTERVAL_S, tls=True, tls_verify=False),
    "tcp": TcpCheck(interval=INTERVAL_S),
    "grpc": GrpcCheck(interval=INTERVAL_S),
}


async def measure() -> list[dict[str, Any]]:
    """Return one row for each kind: `kind checks seconds cpu_percent ms_per_check median_ms worst_ms not_passing`."""
    return await asyncio.to_thread(lambda: [_row(kind) for kind in KINDS])


def _row(kind: str) -> dict[str, Any]:
    serving = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, "serve", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert serving.stdin is not None
    assert serving.stdout is not None
    with serving, closing(serving.stdin):  # it serves until its stdin ends
        ports = serving.stdout.readline()
        probing = subprocess.run(
            [sys.executable, "-m", __spec__.name, "probe", kind], input=ports, check=True, stdout=subprocess.PIPE
        )
    row: dict[str, Any] = json.loads(probing.stdout)
    return row


# --- the process that is measured ---


async def _probe(kind: str, ports: list[int]) -> dict[str, Any]:
    results: list[tuple[str, float]] = []
    prober = Prober(
        LeaseClock(),
        lambda lease_id, health, note: None,
        on_result=lambda _, result, seconds: results.append((result, seconds)),
    )
    prober.restore([_lease(KINDS[kind], port) for port in ports])
    running = asyncio.create_task(prober.run())
    await asyncio.sleep(WARM_UP_S)
    results.clear()
    wall_s, cpu_s = time.monotonic(), time.process_time()
    await asyncio.sleep(INTERVAL_S)
    wall_s, cpu_s = time.monotonic() - wall_s, time.process_time() - cpu_s
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    took = [seconds for _, seconds in results]
    return {
        "kind": kind,
        "checks": len(took),
        "seconds": round(wall_s, 1),
        "cpu_percent": round(100 * cpu_s / wall_s, 1),
        "ms_per_check": round(1000 * cpu_s / len(took), 2),
        "median_ms": round(1000 * statistics.median(took), 2),
        "worst_ms": round(1000 * max(took), 1),
        "not_passing": sum(result != "passing" for result, _ in results),
    }


def _lease(check: Check, port: int) -> Lease:
    return Lease(
        id=f"0198c1d2-{port}",
        service="orders",
        instance=f"orders-{port}",
        endpoint="main",
        protocol="tcp",
        address="127.0.0.1",
        port=port,
        pool="default",
        hold="shared",
        state="bound",
        health="passing",
        lifetime="process",
        owner=Owner(known_by="peercred"),
        check=check,
        host="here",
        created_at=0.0,
    )


# --- the services ---


class _Http(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:  # uvloop's are no asyncio.Transport by their class
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(HTTP_ANSWER)


class _Grpc(_Http):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._http2 = H2Connection(H2Configuration(client_side=False))
        self._http2.initiate_connection()

    def data_received(self, data: bytes) -> None:
        for event in self._http2.receive_data(data):
            if isinstance(event, StreamEnded):
                self._http2.send_headers(1, [(":status", "200"), ("content-type", "application/grpc")])
                self._http2.send_data(1, b"\0\0\0\0\x02\x08\x01")
                self._http2.send_headers(1, [("grpc-status", "0")], end_stream=True)
        self._transport.write(self._http2.data_to_send())


async def _serve(kind: str) -> None:
    loop = asyncio.get_running_loop()
    protocol = {"grpc": _Grpc}.get(kind, _Http)
    context = _certificate() if kind == "https" else None
    servers = [await loop.create_server(protocol, "127.0.0.1", 0, ssl=context) for _ in range(SERVICE_COUNT)]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    await asyncio.to_thread(sys.stdin.read)


def _certificate() -> ssl.SSLContext:
    with tempfile.TemporaryDirectory() as home:
        cert, key = Path(home, "cert.pem"), Path(home, "key.pem")
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=portd bench",
                "-keyout",
                key,
                "-out",
                cert,
            ],
            check=True,
            capture_output=True,
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
    return context


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        uvloop.run(_serve(sys.argv[2]))
    elif sys.argv[1:2] == ["probe"]:
        print(json.dumps(uvloop.run(_probe(sys.argv[2], json.loads(sys.stdin.readline())))))
    else:
        for line in asyncio.run(measure()):
            print(line)
