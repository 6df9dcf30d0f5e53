"""What `portd run` says on a terminal: where the service is, and soon afterwards what is wrong.

`portd run` becomes the command and can't watch it, so a detached process does for some seconds. `verdict` is a pure
function of what that process sees.
"""

from __future__ import annotations

import os
import sys
from time import monotonic

from portd._client import calls
from portd._client.errors import PortdError
from portd.cli import lease_options, placeholders, printing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from portd._client.client import Client

WATCH_S = 30.0
"""Seconds that the watching process lives at most: a slow service has opened its port by then."""
POLL_S = 0.5
ELSEWHERE_S = 2.0
"""Seconds after which a port opened elsewhere counts: some programs open a side port first."""
DONE = ""
"""The verdict that needs no words."""


def begin(client: Client, lease: Mapping[str, Any], wanted: Any, public_url: str | None = None) -> None:
    """Print the line for a lease, and start the process that watches it.

    `wanted` is the value of --port; `public_url` is the URL at the gateway, None where no gateway runs.
    """
    reason = _other_port(client, lease, wanted)
    public = f", {public_url}" if public_url else ""
    _say(f"{lease['instance']} on {placeholders.url(lease)}{public}{f' ({reason})' if reason else ''}")
    _watch_detached(client, lease)


def verdict(lease: Mapping[str, Any], elapsed_s: float) -> str | None:
    """Return what to say of a lease after some seconds: None to go on watching, DONE for nothing."""
    if lease["state"] == "bound":
        wide = printing.wider(lease)
        return (
            f"{lease['instance']} listens on {wide}: open to the LAN; {{host}} is {lease['address']}" if wide else DONE
        )
    if lease["state"] == "conflict":
        return f"{lease['instance']}: another process listens on port {lease['port']}: portd who {lease['port']}"
    elsewhere = ", ".join(printing.host_port(one["address"], one["port"]) for one in lease.get("elsewhere") or ())
    if lease["state"] == "held" and elsewhere and elapsed_s >= ELSEWHERE_S:
        return (
            f"{lease['instance']} listens on {elsewhere} instead of {lease['port']}: give it {{port}} in COMMAND "
            "($PORT there is expanded by the shell before portd runs)"
        )
    if lease["state"] == "ended":
        if lease.get("ended_because") != "owner_exited":
            return DONE
        hint = (
            "; if it said 'address in use', it binds without SO_REUSEADDR: use --hold none or --socket"
            if lease.get("hold") == "shared"
            else ""
        )
        return f"{lease['instance']} exited without listening on port {lease['port']}{hint}"
    return None


def _other_port(client: Client, lease: Mapping[str, Any], wanted: Any) -> str:
    """Say why a lease has another port than the one asked for, or than the one that the instance had last."""
    try:
        if wanted is not None:
            first = int(str(wanted[0] if isinstance(wanted, list) else wanted).partition("-")[0])
            return "" if lease_options.in_ports(lease["port"], wanted) else _holder(client, first)
        ended = list(client.leases(service=lease["service"], instance=lease["instance"], state="ended"))
        last = max(
            (one for one in ended if one["endpoint"] == lease["endpoint"]),
            key=lambda one: one["created_at"],
            default=None,
        )
        if last is None or last["port"] == lease["port"]:
            return ""
        return f"its last port {_holder(client, last['port'])}"
    except PortdError:
        return ""  # the line is worth more than its reason


def _holder(client: Client, number: int) -> str:
    view = client.call(calls.port(number))
    if lease := view["lease"]:
        return f"{number} is leased to {lease['instance']}"
    if view["listeners"]:
        return f"{number} is taken by {printing.process(view['listeners'][0])}"
    return f"{number} is {view['verdict']}"


def _watch_detached(client: Client, lease: Mapping[str, Any]) -> None:
    """Start the watching process: a grandchild, so that the command never has a child that it did not start."""
    pid = os.getpid()
    try:
        pidfd = os.pidfd_open(pid)
        child = os.fork()
    except OSError:
        return
    if child:
        os.close(pidfd)
        os.waitpid(child, 0)
        return
    try:
        if os.fork() == 0:
            _watch(client, lease, pidfd)
    finally:
        os._exit(0)


def _watch(client: Client, lease: Mapping[str, Any], pidfd: int) -> None:
    """Watch until there is something to say, or nothing will come of it."""
    import select
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)  # a pipe to the command must close with the command
    os.chdir("/")
    started_s, has_exited = monotonic(), False
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    while (elapsed_s := monotonic() - started_s) < WATCH_S:
        if has_exited:  # the daemon has not seen it yet, or a child goes on
            select.select([], [], [], POLL_S)
        has_exited = bool(poller.poll(int(POLL_S * 1000)))
        try:
            said = verdict(client.call(calls.lease(lease["id"])), elapsed_s)
        except PortdError:
            continue  # the daemon restarts
        if said is not None:
            if said:
                _say(said)
            return


def _say(text: str) -> None:
    sys.stderr.write(f"portd: {printing.clean(text)}\n")
    sys.stderr.flush()
