"""HAProxy and Caddy find their servers by portd's DNS alone: who dies leaves their rotation, who joins gets calls."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest

from tests.adapters.dns.bed import CHECK, Station, lease, wait_for

ROUNDS = 24
"""Calls that show which servers are in rotation. With three servers, a random choice misses one in 17,000 rounds; the
round is repeated until it is right."""

HAPROXY = """
global
    maxconn 100
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    retries 0
resolvers portd
    nameserver portd 127.0.0.1:{dns}
    accepted_payload_size 8192
    resolve_retries 3
    timeout resolve 100ms
    timeout retry 100ms
    hold valid 100ms
    hold obsolete 0s
frontend front
    bind 127.0.0.1:{port}
    default_backend web
backend web
    balance roundrobin
    http-reuse never
    server-template web 5 _web._tcp.portd.internal resolvers portd resolve-prefer ipv4 init-addr none
"""

# Caddy asks for SRV by the first `resolvers`, and for the addresses of what it found by the second.
CADDY = """
{{
    admin off
    auto_https off
}}
http://127.0.0.1:{port} {{
    bind 127.0.0.1
    reverse_proxy {{
        dynamic srv _web._tcp.portd.internal {{
            refresh 100ms
            resolvers udp/127.0.0.1:{dns}
        }}
        transport http {{
            resolvers udp/127.0.0.1:{dns}
        }}
        lb_policy round_robin
    }}
}}
"""


class Backend:
    """A web server that answers with its name."""

    def __init__(self, number: int, address: str = "127.0.0.1", port: int = 0) -> None:
        name = str(number).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(name)))
                self.end_headers()
                self.wfile.write(name)

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer((address, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.lease = lease(
            "web",
            number,
            address=address,
            port=self._server.server_port,
            check=CHECK,
            health="passing",
            state="bound",
        )

    def close(self) -> None:
        """Die; nothing happens when it has."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def haproxy(tmp_path, dns, port):
    (tmp_path / "haproxy.cfg").write_text(HAPROXY.format(dns=dns, port=port))
    with program(tmp_path, "haproxy", "-db", "-f", "haproxy.cfg"):
        yield


@contextmanager
def caddy(tmp_path, dns, port):
    (tmp_path / "Caddyfile").write_text(CADDY.format(dns=dns, port=port))
    with program(tmp_path, "caddy", "run", "--config", "Caddyfile", "--adapter", "caddyfile"):
        yield


@contextmanager
def program(tmp_path, *command):
    """Run a program in a directory of its own, and end it."""
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **home}
        )
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{error}\n{(tmp_path / 'log').read_text()[-3000:]}") from error
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)


def call(port):
    """Return the name of the server that a call through the proxy got to, or None when it failed."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
            return int(answer.read())
    except (OSError, urllib.error.URLError):
        return None


def in_rotation(port):
    return {call(port) for _ in range(ROUNDS)}


@pytest.mark.parametrize(
    "consumer",
    [
        pytest.param(start, marks=pytest.mark.skipif(shutil.which(start.__name__) is None, reason="not installed"))
        for start in (haproxy, caddy)
    ],
    ids=["haproxy", "caddy"],
)
def test_who_dies_leaves_the_rotation_and_who_joins_gets_calls(tmp_path, consumer):
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    backends = {number: Backend(number) for number in (1, 2)}
    try:
        with Station() as station:
            station.apply(*(each.lease for each in backends.values()))
            with consumer(tmp_path, station.port, port):
                wait_for(lambda: in_rotation(port) == {1, 2}, "both are in rotation")

                backends.pop(1).close()
                station.apply(lease("web", 1, state="ended"))
                wait_for(lambda: in_rotation(port) == {2}, "the dead one is out, and no call fails")

                backends[3] = Backend(3)
                station.apply(backends[3].lease)
                wait_for(lambda: in_rotation(port) == {2, 3}, "the new one is in")

                drained = msgspec.structs.replace(backends[2].lease, drain=True)
                station.apply(drained)
                wait_for(lambda: in_rotation(port) == {3}, "the drained one gets no calls")
                station.apply(msgspec.structs.replace(drained, drain=False))
                wait_for(lambda: in_rotation(port) == {2, 3}, "it is back")

                station.apply(msgspec.structs.replace(backends[3].lease, health="critical"))
                wait_for(lambda: in_rotation(port) == {2}, "the critical one gets no calls")
    finally:
        for backend in backends.values():
            backend.close()


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="not installed")
def test_haproxy_takes_more_instances_than_a_plain_answer_holds(tmp_path):
    """Its resolver ignores cut answers: it must get all it offered room for."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    backends = [Backend(number) for number in range(1, 31)]
    try:
        with Station() as station:
            station.apply(*(each.lease for each in backends))
            config = HAPROXY.replace("server-template web 5", "server-template web 30")
            (tmp_path / "haproxy.cfg").write_text(config.format(dns=station.port, port=port))
            with program(tmp_path, "haproxy", "-db", "-f", "haproxy.cfg"):
                seen = set()
                wait_for(lambda: seen.add(call(port)) or seen >= set(range(1, 31)), "all thirty get calls")
    finally:
        for backend in backends:
            backend.close()
