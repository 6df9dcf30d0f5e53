"""`portd gateway --caddy`: Caddy in front of services, for HTTPS and HTTP/2.

Caddy finds instances by SRV records of the daemon's DNS server, so its configuration never changes while it runs: a
reload would cut every open websocket. Certificates are of Caddy's own authority, made when a name is first used, and
only for names that `GET /v1/names/ask` confirms.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

from portd._client import calls
from portd._client.client import Client
from portd._client.errors import PortdError
from portd.cli import printing
from portd.core.hostnames import GATEWAY_SERVICE, HTTP_PORT, HTTPS_PORT, USER_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

USER_HTTPS_PORT = 7443
DAEMON_URL = "http://127.0.0.1:7783"
"""Where a daemon answers over TCP unless configured otherwise; PORTD_URL=http://… names another."""
START_S = 20.0
"""Seconds for Caddy to listen."""
CADDYFILE = """\
# Written by 'portd gateway --caddy' at every start. Instances come from portd's DNS server: no reload is ever needed.
{{
	admin unix/{directory}/admin.sock
	storage file_system {directory}
	skip_install_trust
	auto_https disable_redirects
	http_port {http}
	https_port {https}
	default_bind {hosts}
	on_demand_tls {{
		ask {ask}
	}}
}}

(upstreams) {{
	resolvers udp/{dns}
	refresh 1s
}}

(proxying) {{
	lb_policy least_conn
	lb_try_duration 2s
	lb_try_interval 50ms
	flush_interval -1
	transport http {{
		resolvers udp/{dns}
		keepalive off
	}}
}}

(services) {{
	@endpoint header_regexp endpoint Host ^([a-z0-9-]+?)--([a-z0-9-]+)\\.localhost(:[0-9]+)?$
	handle @endpoint {{
		reverse_proxy {{
			dynamic srv {{
				service {{re.endpoint.1}}
				proto tcp
				name {{re.endpoint.2}}.{zone}
				import upstreams
			}}
			import proxying
		}}
	}}
	@instance header_regexp instance Host ^([a-z0-9-]+)\\.([a-z0-9-]+)\\.localhost(:[0-9]+)?$
	handle @instance {{
		reverse_proxy {{
			dynamic srv {{
				name {{re.instance.1}}.{{re.instance.2}}.{zone}
				import upstreams
			}}
			import proxying
		}}
	}}
	@service header_regexp service Host ^([a-z0-9-]+)\\.localhost(:[0-9]+)?$
	handle @service {{
		reverse_proxy {{
			dynamic srv {{
				service {{re.service.1}}
				proto tcp
				name {zone}
				import upstreams
			}}
			import proxying
		}}
	}}
	handle {{
		respond "{{host}} is no name of portd: names are SERVICE.localhost and INSTANCE.SERVICE.localhost." 404
	}}
	handle_errors {{
		respond "{{host}} does not answer: no instance serves it. 'portd ls' shows what portd knows."
	}}
}}

https:// {{
	tls internal {{
		on_demand
	}}
	import services
}}
"""
PLAIN_SITE = """
http:// {
	import services
}
"""


class CaddyError(PortdError):
    """Caddy can't be run here; the message says why."""

    code = "failed"


def run(client: Client, values: dict[str, Any]) -> int:
    """Write the Caddyfile, run Caddy, and lease its ports; ends with Caddy."""
    directory = os.path.abspath(values["directory"] or _data_directory())
    hosts, http, https = _addresses(values["listen"])
    text = caddyfile(client, directory, hosts, http, https)
    if values["print"]:
        print(text, end="")
        return 0
    program = shutil.which("caddy")
    if program is None:
        raise CaddyError("there is no program 'caddy' in PATH: install Debian's package caddy, or leave out --caddy")
    path = os.path.join(directory, "Caddyfile")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise CaddyError(f"--directory {directory}: {error.strerror or error}") from error
    environ = {**os.environ, "XDG_CONFIG_HOME": directory, "XDG_DATA_HOME": directory}
    with subprocess.Popen([program, "run", "--config", path, "--adapter", "caddyfile"], env=environ) as caddy:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: caddy.send_signal(number))
        if _wait_for_listener(caddy, hosts[0], https):
            _lease(client, hosts, {"https": https} if http is None else {"main": http, "https": https})
            said = f"https://SERVICE.localhost{'' if https == HTTPS_PORT else f':{https}'}"
            print(
                f"portd: Caddy serves {said}; once: caddy trust --address unix/{directory}/admin.sock",
                file=sys.stderr,
                flush=True,
            )
        return 0 if caddy.wait() in (0, -signal.SIGTERM, -signal.SIGINT) else 1


def caddyfile(client: Client, directory: str, hosts: Sequence[str], http: int | None, https: int) -> str:
    """Return the Caddyfile for a daemon; raises CaddyError where the daemon lacks what it needs."""
    dns = client.call(calls.status())["dns"]
    addresses = [dns["listen"]] if isinstance(dns.get("listen"), str) else dns.get("listen") or []
    if not dns.get("enabled") or not addresses:
        raise CaddyError('--caddy needs the daemon\'s DNS server: set [dns] listen = "127.0.0.1:8600"')
    text = CADDYFILE.format(
        directory=directory,
        http=http or HTTP_PORT,
        https=https,
        hosts=" ".join(f"[{host}]" if ":" in host else host for host in hosts),
        ask=f"{_daemon_url(client)}/v1/names/ask",
        dns=addresses[0],
        zone=dns["zone"].rstrip("."),
    )
    return text if http is None else text + PLAIN_SITE


def _daemon_url(client: Client) -> str:
    """Return the daemon's URL over TCP, which Caddy needs; raises CaddyError where it has none."""
    if not client.endpoint.path:
        return client.url
    try:
        _, headers = client.exchange(calls.leases(limit=1))
        _, same = Client(DAEMON_URL).exchange(calls.leases(limit=1))
    except PortdError as error:
        raise CaddyError(
            '--caddy needs the daemon over TCP: set [listen] http = "127.0.0.1:7783", or name its URL in PORTD_URL '
            f"({error})"
        ) from error
    if headers["x-portd-store"] != same["x-portd-store"]:
        raise CaddyError(f"another daemon answers at {DAEMON_URL}: name this one's URL in PORTD_URL")
    return DAEMON_URL


def _addresses(listen: Sequence[tuple[str, int]]) -> tuple[list[str], int | None, int]:
    """Return hosts to bind, the HTTP port and the HTTPS port; with `--listen` there is HTTPS alone, at its address."""
    if listen:
        return [host for host, _ in listen], None, listen[0][1]
    hosts = ["127.0.0.1", *(["::1"] if _has_ipv6() else [])]
    return (hosts, HTTP_PORT, HTTPS_PORT) if os.geteuid() == 0 else (hosts, USER_PORT, USER_HTTPS_PORT)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _wait_for_listener(caddy: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """Wait until Caddy listens; returns False when it exits or takes too long."""
    end = time.monotonic() + START_S
    while caddy.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection((host, port), 1.0).close()
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False


def _lease(client: Client, hosts: Sequence[str], ports: dict[str, int]) -> None:
    """Lease the ports for Caddy's process, so that they are shown, and found by `portd url`."""
    address = "localhost" if {"127.0.0.1", "::1"} <= set(hosts) else hosts[0]
    for endpoint, port in ports.items():
        request: Any = {
            "service": GATEWAY_SERVICE,
            "endpoint": endpoint,
            "port": port,
            "adopt": True,
            "address": address,
        }
        try:
            client.grant(request)
        except PortdError as error:
            printing.error(f"Caddy's port {port} is not leased: {error}", code="failed", as_json=False)


def _data_directory() -> str:
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(base, "portd", "caddy")
