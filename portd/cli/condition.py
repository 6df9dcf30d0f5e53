"""The command `portd status`: the daemon's condition."""

from __future__ import annotations

from portd._client import calls
from portd._client.client import Client
from portd.cli import printing
from portd.cli.options import JSON, Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def status(values: dict[str, Any]) -> int:
    """Show the daemon's condition."""
    client = Client()
    found = client.call(calls.status())
    if values["json"]:
        printing.json(found)
        return 0
    counts = found["counts"]
    lines = [
        ("portd", f"{found['version']} at {client.url}, pid {found['pid']}, up {_long(found['uptime'])}"),
        ("revision", str(found["revision"])),
        (
            "leases",
            f"{counts['leases']} of {counts['services']} services: "
            + ", ".join(f"{counts[state]} {state}" for state in ("bound", "held", "conflict")),
        ),
        *((f"pool {name}", _pool(pool)) for name, pool in found["pools"].items()),
        *((name, _condition(found[name])) for name in ("store", "mdns", "dns", "cluster")),
        *(("warning", warning) for warning in found["warnings"]),
    ]
    printing.facts(lines)
    return 0


def _pool(pool: dict[str, int]) -> str:
    rest = ", ".join(f"{pool[key]} {key}" for key in ("used", "held", "cooling", "declined"))
    return f"{pool['free']} of {pool['size']} ports free; {rest}"


def _condition(part: dict[str, Any]) -> str:
    if part.get("problem"):
        return str(part["problem"])
    if part.get("enabled") is False:
        return "off"
    details = (
        f"{key.replace('_', ' ')} {value}"
        for key, value in part.items()
        if key not in {"enabled", "problem"} and isinstance(value, (str, int, float))
    )
    return "fine; " + ", ".join(details)


def _long(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours // 24} d {hours % 24} h" if hours >= 24 else f"{hours}:{rest // 60:02}:{rest % 60:02} h"


COMMANDS = (Command("status", [], "Show the daemon's condition", status, (JSON,)),)
