"""The set-ups of docs/resolvers.md work as they are written there."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import dns.exception
import dns.message
import dns.query
import pytest

import portd
from tests.adapters.dns.bed import CHECK, Station, ask_for, lease, wait_for
from tests.adapters.dns.test_dns_consumers import Backend, in_rotation, program

PAGE = Path(portd.__file__).parents[1] / "docs/resolvers.md"


def block(language: str, dns_port: int) -> str:
    """Return the page's block in this language, with the test's port in place of 8600."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"{len(found)} blocks of {language}"
    assert "8600" in found[0]
    return re.sub(r"(127\.0\.0\.1[:#@])8600", rf"\g<1>{dns_port}", found[0])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        return int(chosen.getsockname()[1])


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")


# --- forwarders ---


def dnsmasq(home: Path, text: str, port: int) -> tuple[str, ...]:
    (home / "conf").write_text(text)
    alone = ("--no-daemon", "--no-resolv", "--no-hosts", "--bind-interfaces", "--listen-address=127.0.0.1")
    return ("dnsmasq", *alone, "--stop-dns-rebind", f"--conf-file={home / 'conf'}", f"--port={port}")


ANCHOR = ". DS 20326 8 2 E06D44B80B8F1D39A95C0B0D7C65D08458E880409BBC683457104237C7F8EC8D"
"""The root's: Debian's unbound validates by default."""


def unbound(home: Path, text: str, port: int) -> tuple[str, ...]:
    (home / "page.conf").write_text(text)
    (home / "conf").write_text(f"""
server:
  interface: 127.0.0.1@{port}
  username: ""
  chroot: ""
  directory: "{home}"
  pidfile: "{home}/pid"
  use-syslog: no
  do-daemonize: no
  num-threads: 1
  trust-anchor: "{ANCHOR}"
  private-address: 127.0.0.0/8
remote-control:
  control-enable: no
include: "{home}/page.conf"
""")
    return ("unbound", "-c", str(home / "conf"))


@pytest.mark.parametrize("forwarder", [pytest.param(each, marks=needs(each.__name__)) for each in (dnsmasq, unbound)])
def test_names_resolve_through_the_forwarder_of_the_page(tmp_path: Path, forwarder) -> None:
    port = free_port()

    def ask(name: str, rdtype: str):
        try:
            return dns.query.udp(ask_for(name, rdtype), "127.0.0.1", 2, port)
        except (dns.exception.DNSException, OSError):
            return None

    def texts(name: str, rdtype: str) -> list[str]:
        answer = ask(name, rdtype)
        return [] if answer is None else [record.to_text() for rrset in answer.answer for record in rrset]

    with Station() as station:
        command = forwarder(tmp_path, block(forwarder.__name__, station.port), port)
        served = lease("db", port=5432, check=CHECK, health="passing", address="127.77.0.9")
        station.apply(served)
        with program(tmp_path, *command):
            wait_for(lambda: texts("db", "A") == ["127.77.0.9"], "the name resolves")
            assert texts("_db._tcp", "SRV") == ["0 1 5432 db-1.db.portd.internal."]
            station.apply(lease("db", port=5432, state="ended", address="127.77.0.9"))
            assert texts("db", "A") == []  # the very next answer: a TTL of 0 is kept by nobody


# --- proxies ---


def haproxy(home: Path, dns_port: int, port: int) -> tuple[str, ...]:
    (home / "haproxy.cfg").write_text(f"""
global
    maxconn 100
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
frontend front
    bind 127.0.0.1:{port}
    default_backend orders
{block("haproxy", dns_port)}
""")
    return ("haproxy", "-db", "-f", "haproxy.cfg")


def caddy(home: Path, dns_port: int, port: int) -> tuple[str, ...]:
    (home / "Caddyfile").write_text(f"""{{
    admin off
    auto_https off
}}
http://127.0.0.1:{port} {{
    bind 127.0.0.1
{block("caddyfile", dns_port)}
}}
""")
    return ("caddy", "run", "--config", "Caddyfile", "--adapter", "caddyfile")


@pytest.mark.parametrize("proxy", [pytest.param(each, marks=needs(each.__name__)) for each in (haproxy, caddy)])
def test_proxy_of_the_page_follows_the_instances(tmp_path: Path, proxy) -> None:
    port = free_port()
    with ExitStack() as stack:
        backends = [Backend(number) for number in (1, 2)]
        for backend in backends:
            stack.callback(backend.close)
        leases = [each.lease for each in backends]
        station = stack.enter_context(Station())
        orders = [
            lease("orders", number, address="127.0.0.1", port=each.port) for number, each in enumerate(leases, start=1)
        ]
        station.apply(*orders)
        stack.enter_context(program(tmp_path, *proxy(tmp_path, station.port, port)))
        wait_for(lambda: in_rotation(port) == {1, 2}, "both are in rotation", 40)
        station.apply(lease("orders", 1, address="127.0.0.1", port=leases[0].port, drain=True))
        wait_for(lambda: in_rotation(port) == {2}, "the drained one gets no calls", 40)


@needs("nginx")
def test_nginx_of_page_finds_service_on_its_own_address(tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as stack:
        backend = Backend(1, address="127.77.0.9", port=8080)
        stack.callback(backend.close)
        station = stack.enter_context(Station())
        station.apply(lease("orders", address="127.77.0.9", port=8080))
        user = "user root;" if os.geteuid() == 0 else ""
        (tmp_path / "nginx.conf").write_text(f"""
daemon off; pid {tmp_path}/pid; error_log stderr; {user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {tmp_path}; proxy_temp_path {tmp_path}; fastcgi_temp_path {tmp_path};
    uwsgi_temp_path {tmp_path}; scgi_temp_path {tmp_path};
    server {{
        listen 127.0.0.1:{port};
        {block("nginx", station.port)}
    }}
}}
""")
        stack.enter_context(program(tmp_path, "nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")))
        wait_for(lambda: in_rotation(port) == {1}, "nginx gets to the service")


@needs("promtool")
def test_prometheus_of_the_page_is_well_formed(tmp_path: Path) -> None:
    found = re.findall(r"^```yaml prometheus\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "prometheus.yml").write_text(found[0])
    checked = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
