"""The commands on one lease: lease, renew, release, drain."""

from __future__ import annotations

import os
import sys

from portd._client import calls
from portd._client.client import Client
from portd.cli import wishing
from portd.cli.options import JSON, Command, Option, duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def lease(values: dict[str, Any]) -> int:
    """Lease one port and print its number alone; without --ttl and --pid it belongs to the calling shell."""
    wish = wishing.wish(values)
    if values["endpoint"] is not None:
        wish["endpoint"] = values["endpoint"]
    if "ttl" not in wish and "pid" not in wish:
        wish["pid"] = os.getppid()
    document = Client().call(calls.grant(wish))  # type: ignore[arg-type]
    _show(document, str(document["port"]), as_json=values["json"])
    return 0


def renew(values: dict[str, Any]) -> int:
    """Restart the clock of a ttl lease; print when it ends."""
    document = Client().call(calls.renew(values["id"], values["ttl"], values["token"]))
    _show(document, str(document["expires_at"]), as_json=values["json"])
    return 0


def release(values: dict[str, Any]) -> int:
    """Release a lease: its port goes into cooldown, then back to the pool."""
    Client().call(calls.release(values["id"], values["token"]))
    return 0


def drain(values: dict[str, Any]) -> int:
    """Take an instance out of look-ups; it keeps its port."""
    document = Client().call(calls.drain(values["id"], not values["undo"], values["token"]))
    if values["json"]:
        _show(document, "", as_json=True)
    return 0


def _show(document: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        import json

        text = json.dumps(document, indent=2)
    sys.stdout.write(text + "\n")


TOKEN = Option("--token", "TOKEN", "the lease's token, for a lease of another user")
COMMANDS = (
    Command(
        "lease",
        ["SERVICE"],
        "Lease a port, and print it",
        lease,
        (*wishing.OPTIONS, Option("--endpoint", "NAME", "which of the instance's ports this is (main)"), JSON),
        """
The port is printed alone, so that a script can take it:  PORT=$(portd lease orders)
Without --ttl and --pid the lease belongs to the calling shell: it ends when that shell does.
'portd run' is for a service: then the lease belongs to the service itself.""",
    ),
    Command(
        "renew",
        ["ID"],
        "Restart the clock of a ttl lease",
        renew,
        (Option("--ttl", "SECONDS", "the new period; the old one unless given", duration), TOKEN, JSON),
    ),
    Command("release", ["ID"], "Give a lease back before its time", release, (TOKEN, JSON)),
    Command(
        "drain",
        ["ID"],
        "Take an instance out of look-ups; it keeps its port",
        drain,
        (Option("--undo", "", "take it in again"), TOKEN, JSON),
    ),
)
