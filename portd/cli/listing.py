"""Who has which port: ls, who, history."""

from __future__ import annotations

import sys

from portd._client import calls
from portd._client.client import Client
from portd.cli import printing
from portd.cli.options import JSON, Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from portd._client.types import LeaseDocument

EXPLAINED = {
    "bound": "leased, and its owner listens",
    "held": "leased; nobody listens yet",
    "conflict": "leased, but a foreign process listens",
    "unmanaged": "no lease; somebody listens",
    "cooling": "no lease; an ended one's port rests",
    "declined": "no lease; found taken, and on probation",
    "static": "kept for one service by the configuration",
    "free": "nobody has it",
}


def ls(values: dict[str, Any]) -> int:
    """List leases."""
    leases = list(
        Client().leases(
            service=values["service"], tag=values["tag"] or None, state="ended" if values["ended"] else None
        )
    )
    if values["json"]:
        printing.json({"leases": leases})
    else:
        printing.table(
            ["SERVICE", "INSTANCE", "PORT", "OWNER", "STATE", "HEALTH", "AGE", "LEASE"],
            [
                [
                    lease["service"],
                    printing.instance(lease),
                    printing.place(lease),
                    printing.owner(lease["owner"]),
                    lease["state"],
                    printing.health(lease),
                    printing.age(lease["created_at"]),
                    lease["id"],
                ]
                for lease in leases
            ],
        )
    if not leases and values["service"]:
        return nothing(f"nobody leases for {values['service']}")
    return 0


def who(values: dict[str, Any]) -> int:
    """Tell who has a port."""
    client = Client()
    view = client.call(calls.port(values["port"], values["protocol"]))
    if values["json"]:
        printing.json(view)
    else:
        others = [
            lease
            for lease in client.leases(port=values["port"])
            if view["lease"] is None or lease["id"] != view["lease"]["id"]
        ]
        printing.facts(_described(view) + [("also leased", _in_short(lease)) for lease in others])
        if others:
            return 0
    return 1 if view["verdict"] == "free" else 0


def history(values: dict[str, Any]) -> int:
    """Tell who had a port."""
    leases = Client().call(calls.history(values["port"], values["at"]))["leases"]
    if values["json"]:
        printing.json({"leases": leases})
    else:
        printing.table(
            ["SERVICE", "INSTANCE", "PORT", "OWNER", "FROM", "UNTIL", "BECAUSE", "LEASE"],
            [
                [
                    lease["service"],
                    printing.instance(lease),
                    printing.place(lease),
                    printing.owner(lease["owner"]),
                    printing.local(lease["created_at"]),
                    printing.local(lease["ended_at"]),
                    lease["ended_because"] or "-",
                    lease["id"],
                ]
                for lease in leases
            ],
        )
    return (
        0
        if leases
        else nothing(
            f"nobody had port {values['port']}"
            + (f" at {values['at']}" if values["at"] else ", as far as is remembered")
        )
    )


def nothing(text: str) -> int:
    """Say a clear no on stderr."""
    print(f"portd: {text}", file=sys.stderr)
    return 1


def _in_short(lease: LeaseDocument) -> str:
    return (
        f"{printing.place(lease)} to {lease['service']} {printing.instance(lease)}, "
        f"{printing.owner(lease['owner'])}, {lease['state']}"
    )


def _described(view: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("port", f"{view['port']}/{view['protocol']}: {view['verdict']} ({EXPLAINED[view['verdict']]})")]
    if lease := view["lease"]:
        name = f"{lease['service']} {printing.instance(lease)} on {printing.place(lease)}"
        lines += [
            ("lease", f"{name}, {lease['lifetime']}, {lease['id']}"),
            ("since", f"{printing.local(lease['created_at'])} ({printing.age(lease['created_at'])})"),
        ]
        if lease["check"]:
            lines.append(("health", printing.health(lease)))
        lines += _process("owner", lease["owner"])
    for listener in view["listeners"]:
        shown = printing.host_port(listener["address"], view["port"])
        if lease and listener["pid"] is not None and listener["pid"] == lease["owner"]["pid"]:
            lines.append(("listens", f"the owner, on {shown}"))
            continue
        lines.append(("listens", f"{printing.owner(listener)} on {shown}"))
        lines += _process("process", listener)[1:]
        if listener["pid"] is None:
            lines.append(("", "the process is hidden from portd: run its daemon as root, or with CAP_SYS_PTRACE"))
    return lines


def _process(title: str, process: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [(title, printing.owner(process))]
    if process["exe"]:
        lines.append(("executable", process["exe"]))
    if process["cmdline"]:
        lines.append(("command", " ".join(process["cmdline"])))
    if process["unit"]:
        lines.append(("unit", process["unit"]))
    if started := process.get("started_at"):
        lines.append(("started", f"{printing.local(started)} ({printing.age(started)})"))
    return lines


COMMANDS = (
    Command(
        "ls",
        ["[SERVICE]"],
        "List leases",
        ls,
        (
            Option("--tag", "TAG", "only leases with this tag", many=True),
            Option("--ended", "", "ended leases instead of live ones, as far as they are remembered"),
            JSON,
        ),
        """
In a pipe the lines are tab-separated, without a header: service, instance, port, owner, state, health, age, lease.""",
    ),
    Command(
        "who",
        ["PORT"],
        "Tell who has a port, by the kernel and by the leases",
        who,
        (Option("--protocol", "PROTO", "tcp or udp; the one in use unless given"), JSON),
        """
Works for programs that never heard of portd, too. Exit status 1 when nobody has the port.""",
    ),
    Command(
        "history",
        ["PORT"],
        "Tell who had a port",
        history,
        (Option("--at", "TIME", "at this moment, in RFC 3339: 2026-03-01T12:00:00Z"), JSON),
    ),
)
