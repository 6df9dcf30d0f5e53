"""Follows changes as they happen: watch, browse."""

from __future__ import annotations

import sys
import time

from portd._client import calls, documents
from portd._client.client import Client
from portd._client.errors import DaemonUnavailable, Problem, ProtocolError
from portd.cli import printing
from portd.cli.options import JSON, Command, Option, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RECONNECT_S = 1.0
"""Seconds between tries while the daemon is away."""
BROWSE_S = 1.0
"""Seconds between polls of the daemon, which listens to the LAN all the time: a poll sends nothing there."""


def watch(values: dict[str, Any]) -> int:
    """Print events until interrupted; resumes after a restart of the daemon."""
    client, last = Client(), values["after"]
    client.call(calls.status())  # no daemon now is an error; a later restart is waited for
    while True:
        try:
            for event in client.events(last, values["service"]):
                last = event.revision
                _show(event.data, as_json=values["json"])
            _note("the daemon ended the stream; reconnecting")
        except (DaemonUnavailable, ProtocolError):
            _note("the daemon does not answer; waiting for it")
        except Problem as problem:
            if problem.code != "revision_gone" or last is None:
                raise
            _note(f"events since revision {last} are no longer kept; continuing from now")
            last = None
        time.sleep(RECONNECT_S)


def browse(values: dict[str, Any]) -> int:
    """Print the LAN's services: once in a pipe or as JSON, else live until interrupted."""
    client, type_ = Client(), values["type"]
    if values["json"] or values["once"]:
        found = client.call(calls.lan(type_))
        if values["json"]:
            printing.json(found)
        else:
            printing.table(
                ["TYPE", "NAME", "HOST", "PORT", "ADDRESSES", "OURS"], [_row(service) for service in found["services"]]
            )
        return 0
    seen: set[tuple[str, ...]] = set()
    while True:
        now = {tuple(_row(service)) for service in client.call(calls.lan(type_))["services"]}
        for sign, rows in (("-", seen - now), ("+", now - seen)):
            for row in sorted(rows):
                print(sign, "\t".join(printing.clean(cell) for cell in row), flush=True)
        seen = now
        time.sleep(BROWSE_S)


def _row(service: dict[str, Any]) -> list[str]:
    return [
        service["type"],
        service["name"],
        service["host"],
        str(service["port"]),
        " ".join(service["addresses"]),
        "ours" if service["ours"] else "-",
    ]


def _show(event: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(printing.escaped(documents.encode(event).decode()), flush=True)
        return
    lease = event["lease"]
    words = [
        printing.local(event["at"]),
        f"{event['type']:9}",
        lease["service"],
        printing.instance(lease),
        printing.binding(lease),
        _more(event),
    ]
    print("  ".join(printing.clean(word) for word in words).rstrip(), flush=True)


def _more(event: dict[str, Any]) -> str:
    lease = event["lease"]
    match event["type"]:
        case "health":
            return f"{lease['health']}{': ' + event['note'] if event['note'] else ''}"
        case "ended":
            return str(lease["ended_because"])
        case "conflict":
            return f"{printing.owner(event['foreign'])} listens"
        case "granted" | "bound":
            return printing.owner(lease["owner"])
    return ""


def _note(text: str) -> None:
    print(f"portd: {text}", file=sys.stderr, flush=True)


COMMANDS = (
    Command(
        "watch",
        ["[SERVICE]"],
        "Print events as they happen",
        watch,
        (Option("--after", "REVISION", "begin after this revision (now)", number), JSON),
        """
Runs until it is interrupted, across restarts of the daemon too.""",
    ),
    Command(
        "browse",
        ["[TYPE]"],
        "Print the LAN's DNS-SD services, live",
        browse,
        (Option("--once", "", "print what is known now, and exit"), JSON),
        """
TYPE is a DNS-SD type like _http._tcp; all types by default. A line with +
appeared, one with - disappeared.""",
    ),
)
