"""The URLs of services at the gateway: `portd url`, and what `run` and `ls` show of them."""

from __future__ import annotations

import sys

from portd._client.client import Client
from portd.cli.options import Command, Option, label
from portd.core.hostnames import GATEWAY_SERVICE, HTTP_PORT, USER_PORT, PublicName, format_url

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

SYSTEM_DIRECTORY = "/run/portd/"
"""Where the system daemon's sockets are: its gateway has port 80."""
SCHEMES = {"main": "http", "https": "https"}
"""Scheme of each endpoint of a gateway, the preferred one first."""


class Gateway:
    """Where the gateway answers; `is_running` False where none does, and the port is the usual one."""

    __slots__ = ("is_running", "port", "scheme")

    def __init__(self, scheme: str, port: int, *, is_running: bool) -> None:
        self.scheme = scheme
        self.port = port
        self.is_running = is_running

    def url(self, name: PublicName) -> str:
        """Return the URL of a name."""
        return format_url(name, self.scheme, self.port)


def find_gateway(client: Client) -> Gateway:
    """Return the gateway of this host, as its lease shows it."""
    ports = {
        lease["endpoint"]: lease["port"]
        for lease in client.leases(service=GATEWAY_SERVICE)
        if lease["state"] == "bound"
    }
    for endpoint, scheme in SCHEMES.items():
        if endpoint in ports:
            return Gateway(scheme, ports[endpoint], is_running=True)
    path = client.endpoint.path
    is_system = not path or path.startswith(SYSTEM_DIRECTORY)
    return Gateway("http", HTTP_PORT if is_system else USER_PORT, is_running=False)


def public_url(gateway: Gateway, lease: Mapping[str, Any], instance: str | None = None) -> str:
    """Return a lease's URL at the gateway: the service's, or the instance's where one was requested by name."""
    return gateway.url(PublicName(lease["service"], instance, lease["endpoint"]))


def shown(gateway: Gateway | None, lease: Mapping[str, Any]) -> str:
    """Return a lease's URL as a listing shows it: "-" where no gateway serves it."""
    if gateway is None or not gateway.is_running or lease["protocol"] == "udp" or lease["service"] == GATEWAY_SERVICE:
        return "-"
    return public_url(gateway, lease)


def url(values: dict[str, Any]) -> int:
    """Print the URL of a service at the gateway."""
    from portd.cli import printing

    client = Client()
    service, instance, endpoint = values["service"], values["instance"], values["endpoint"] or "main"
    leases = [
        lease
        for lease in client.leases(service=service)
        if lease["endpoint"] == endpoint and instance in (None, lease["instance"])
    ]
    if not leases:
        wanted = " ".join(
            [f"service {service}", *([f"instance {instance}"] if instance else []), f"endpoint {endpoint}"]
        )
        printing.error(f"no lease of {wanted}; 'portd ls' lists the leases", code="not_found", as_json=False)
        return 1
    gateway = find_gateway(client)
    print(gateway.url(PublicName(service, instance, endpoint)))
    if not gateway.is_running:
        print("portd: no gateway runs, so the URL does not answer yet: start one with 'portd gateway'", file=sys.stderr)
    return 0


COMMANDS = (
    Command(
        "url",
        ["SERVICE"],
        "Print the URL of a service at the gateway",
        url,
        (
            Option("--instance", "NAME", "of this instance alone", label),
            Option("--endpoint", "NAME", "of another endpoint than main", label),
        ),
        """
    curl "$(portd url orders)/health"      # http://orders.localhost/health

Browsers and curl resolve *.localhost by themselves; glibc programs need
libnss-myhostname. 'portd gateway' is what answers there.""",
    ),
)
