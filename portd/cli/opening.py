"""`portd open`: the dashboard in a browser."""

from __future__ import annotations

import os

from portd._client.client import Client
from portd._client.endpoints import LOOPBACK_PORT
from portd.cli.options import Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def open_dashboard(values: dict[str, Any]) -> int:
    """Open the dashboard, at a port where X is given; print its URL where no browser can be opened."""
    import webbrowser

    from portd.cli import targets

    client = Client()
    number = _port(client, values["x"], targets) if values["x"] is not None else None
    base = f"http://127.0.0.1:{LOOPBACK_PORT}" if client.endpoint.path else client.url
    url = f"{base}/{'' if number is None else f'#{number}'}"
    has_display = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    if not has_display or not webbrowser.open(url):
        print(url)
    return 0


def _port(client: Client, target: str, targets: Any) -> int:
    """Return the port that X means: a number, or the one of a service, an instance or a lease."""
    if target.isascii() and target.isdecimal():
        return int(target)
    leases = list(client.leases(service=target)) or targets.find(client, target)
    return int(leases[0]["port"])


COMMANDS = (
    Command(
        "open",
        ["[X]"],
        "Open the dashboard in a browser, or print its URL",
        open_dashboard,
        (),
        """
X is a service, an instance, a lease id or a port: the dashboard shows its port.
The daemon must answer over TCP ([listen] http).""",
    ),
)
