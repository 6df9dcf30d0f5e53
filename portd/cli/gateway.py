"""`portd gateway`: serves leases under their names, by the gateway of its own or by Caddy."""

from __future__ import annotations

import os
import socket
import sys

from portd.cli.options import Command, Option, port
from portd.core.hostnames import USER_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FIRST_FD = 3
"""Number of the first socket that a service manager passes (sd_listen_fds(3))."""
LOOPBACK = ("127.0.0.1", "::1")


def address(text: str) -> tuple[str, int]:
    """Read HOST:PORT, [HOST]:PORT, HOST or PORT; a missing host is 127.0.0.1, a missing port the usual one."""
    import ipaddress

    host, colon, rest = text.rpartition(":")
    if text.isdecimal():
        host, rest = LOOPBACK[0], text
    elif (text.startswith("[") and text.endswith("]")) or not colon or (":" in host and not host.startswith("[")):
        host, rest = text, str(USER_PORT)
    try:
        return str(ipaddress.ip_address(host.strip("[]").replace("localhost", LOOPBACK[0]))), port(rest)
    except ValueError:
        raise ValueError("expected an IP address, with or without a port: 127.0.0.1:8080, [::1]:8080") from None


def gateway(values: dict[str, Any]) -> int:
    """Serve leases under their names until SIGTERM or Ctrl-C."""
    from portd._client.client import Client

    if values["caddy"]:
        from portd.cli import caddy

        return caddy.run(Client(), values)
    listeners = _passed_sockets() if not values["listen"] else []
    from portd.adapters.gateway import server

    try:
        listeners = listeners or server.open_listeners(values["listen"] or [(host, USER_PORT) for host in LOOPBACK])
    except OSError as error:
        from portd.cli import printing

        shown = ", ".join(printing.host_port(*one) for one in values["listen"] or [(LOOPBACK[0], USER_PORT)])
        said = (
            f"can't listen on {shown}: {(error.strerror or str(error)).lower()}; choose another address with --listen"
        )
        printing.error(said, code="failed", as_json=False)
        return 1
    import logging

    from portd import runtime
    from portd._client.aio import AsyncClient
    from portd.cli.printing import host_port

    logging.basicConfig(format="portd: %(message)s", level=logging.WARNING)
    shown = ", ".join(f"http://{host_port(*listener.getsockname()[:2])}" for listener in listeners)
    print(f"portd: the gateway listens on {shown}", file=sys.stderr, flush=True)
    runtime.run(server.serve(AsyncClient(), listeners))
    return 0


def _passed_sockets() -> list[socket.socket]:
    """Return the listening sockets that a service manager has passed to this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    return [socket.socket(fileno=fd) for fd in range(FIRST_FD, FIRST_FD + count)]


COMMANDS = (
    Command(
        "gateway",
        [],
        "Serve http://SERVICE.localhost, a process of its own",
        gateway,
        (
            Option(
                "--listen",
                "ADDR",
                f"listen on HOST:PORT (127.0.0.1:{USER_PORT} and [::1]:{USER_PORT}, or the unit's sockets)",
                address,
                many=True,
            ),
            Option("--caddy", "", "run Caddy instead: HTTPS and HTTP/2, on the daemon's DNS server"),
            Option("--directory", "DIR", "where --caddy keeps its Caddyfile and certificates"),
            Option("--print", "", "with --caddy: print the Caddyfile and exit"),
        ),
        """
    http://orders.localhost:7780  an instance of orders that serves
    http://orders-1.orders.localhost:7780  this instance
    http://metrics--orders.localhost:7780  another endpoint

Requests go to the least loaded instance; one for a service that restarts waits
up to 2 s. It is a client of the daemon: the daemon never carries the traffic.

--caddy needs 'caddy' in PATH, [dns] listen and [listen] http in the daemon's
configuration. Certificates come from Caddy's own authority: 'caddy trust'
makes browsers accept it.""",
    ),
)
