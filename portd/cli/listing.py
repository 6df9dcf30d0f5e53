"""The commands ls, who, history and checks: which process has which port, and its health."""

from __future__ import annotations

import sys

from portd._client import calls
from portd._client.client import Client
from portd.cli import printing, urls
from portd.cli.options import JSON, Command, Option, choice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from portd._client.types import LeaseDocument

EXPLAINED = {
    "bound": "leased, and its owner listens",
    "held": "leased; nobody listens yet",
    "conflict": "leased, but a foreign process listens",
    "unmanaged": "listened on without a lease",
    "taken": "in use without a lease, though nobody listens",
    "cooling": "no lease; quarantined after one ended",
    "declined": "no lease; reported as taken, and on probation",
    "static": "reserved for one service by the configuration",
    "free": "nobody has it",
}
SOCKETS = {"listening": "listens", "bound": "bound", "connected": "connected"}
"""A socket's condition, as the first column of `who`."""
UNKNOWN = "-"


def ls(values: dict[str, Any]) -> int:
    """List leases."""
    client = Client()
    leases = list(
        client.leases(service=values["service"], tag=values["tag"] or None, state="ended" if values["ended"] else None)
    )
    if values["json"]:
        printing.json({"leases": leases})
    else:
        gateway = urls.find_gateway(client) if leases else None
        printing.table(
            ["SERVICE", "INSTANCE", "PORT", "OWNER", "STATE", "HEALTH", "AGE", "LEASE", "NOTE", "URL"],
            [[*_row(lease), lease["state"], printing.health(lease), printing.age(lease["created_at"]), lease["id"],
              printing.note(lease), urls.shown(gateway, lease)] for lease in leases],
            drop=("NOTE", "URL", "LEASE", "AGE", "SERVICE", "HEALTH"),
        )  # fmt: skip
        if sys.stdout.isatty():
            notes = [(printing.instance(lease), printing.note(lease)) for lease in leases]
            printing.facts([(name, said) for name, said in notes if said != UNKNOWN])
    if not leases and values["service"]:
        return nothing(f"no lease of service {values['service']}", values)
    return 0


def who(values: dict[str, Any]) -> int:
    """Show who has a port."""
    client = Client()
    view = client.call(calls.port(values["port"], values["protocol"]))
    if values["json"]:
        printing.json(view)
        return 1 if view["verdict"] == "free" else 0
    known = view["lease"]["id"] if view["lease"] else None
    others = [lease for lease in client.leases(port=values["port"]) if lease["id"] != known]
    lines = _described(view) + [("also leased", _in_short(lease)) for lease in others]
    if view["lease"] is None:
        lines += [("", said) for said in _owners_elsewhere(client, view)]
    printing.facts(lines)
    return 1 if view["verdict"] == "free" and not others else 0


def history(values: dict[str, Any]) -> int:
    """Show who had a port."""
    leases = Client().call(calls.history(values["port"], values["at"]))["leases"]
    if values["json"]:
        printing.json({"leases": leases})
    else:
        printing.table(
            ["SERVICE", "INSTANCE", "PORT", "OWNER", "FROM", "UNTIL", "BECAUSE", "LEASE"],
            [[*_row(lease), printing.local(lease["created_at"]), printing.local(lease["ended_at"]),
              lease["ended_because"] or ("moved" if lease["ended_at"] else UNKNOWN), lease["id"]] for lease in leases],
            drop=("LEASE", "SERVICE", "PORT"),
        )  # fmt: skip
    if leases:
        return 0
    when = f"at {values['at']}" if values["at"] else "in the history that is kept"
    return nothing(f"nobody had port {values['port']} {when}", values)


def checks(values: dict[str, Any]) -> int:
    """List the last result of every check."""
    every: Iterator[Any] = Client().leases(service=values["service"])
    leases = [lease for lease in every if lease.get("check")]
    if values["json"]:
        fields = (
            "id",
            "service",
            "instance",
            "endpoint",
            "health",
            "health_note",
            "health_since",
            "checked_at",
            "check",
        )
        printing.json({"checks": [{name: lease.get(name) for name in fields} for lease in leases]})
    else:
        printing.table(
            ["SERVICE", "INSTANCE", "CHECK", "HEALTH", "SINCE", "CHECKED", "NOTE"],
            [[lease["service"], printing.instance(lease), _check(lease["check"] or {}), str(lease["health"]),
              printing.age(lease.get("health_since")), printing.age(lease.get("checked_at")),
              lease.get("health_note") or UNKNOWN] for lease in leases],
            drop=("SERVICE", "SINCE"),
        )  # fmt: skip
    if leases:
        return 0
    return nothing(f"no lease {'of service ' + values['service'] if values['service'] else 'here'} has a check", values)


def nothing(text: str, values: dict[str, Any]) -> int:
    """Print a clear no on stderr, and return its exit status."""
    printing.error(text, code="not_found", as_json=values["json"])
    return 1


def _row(lease: LeaseDocument) -> list[str]:
    return [lease["service"], printing.instance(lease), printing.binding(lease), printing.owner(lease["owner"])]


def _check(check: dict[str, Any]) -> str:
    detail = check.get("path") if check["kind"] == "http" else check.get("service") or ""
    endpoint = f" of {check['endpoint']}" if check.get("endpoint") else ""
    return f"{check['kind']}{':' if detail else ''}{detail}{endpoint}"


def _in_short(lease: LeaseDocument) -> str:
    name = f"{lease['service']} {printing.instance(lease)}"
    return f"{printing.binding(lease)} to {name}, {printing.owner(lease['owner'])}, {lease['state']}"


def _described(view: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("port", f"{view['port']}/{view['protocol']}: {view['verdict']} ({EXPLAINED[view['verdict']]})")]
    lease = view["lease"]
    if lease:
        lines += _lease(lease)
    if left_over_of := view.get("left_over_of"):
        lines.append(("left over", f"by {_former(left_over_of)}: its lease ended, its process still has the port"))
    for socket in view["listeners"]:
        shown = printing.host_port(socket["address"], view["port"])
        title = SOCKETS.get(socket.get("socket", "listening"), "listens")
        if lease and socket["pid"] is not None and socket["pid"] == lease["owner"]["pid"]:
            lines.append((title, f"the owner, on {shown}"))
            continue
        lines.append((title, f"{printing.owner(socket)} on {shown}"))
        lines += _process("process", socket)[1:]
        if socket["pid"] is None:
            lines.append(("", "portd can't see this process: start portd-inspector.socket, or run the daemon as root"))
    return lines


def _lease(lease: dict[str, Any]) -> list[tuple[str, str]]:
    name = f"{lease['service']} {printing.instance(lease)} on {printing.binding(lease)}"
    lines = [
        ("lease", f"{name}, {lease['lifetime']}, {lease['id']}"),
        ("since", f"{printing.local(lease['created_at'])} ({printing.age(lease['created_at'])})"),
    ]
    if lease["check"]:
        reason = f": {lease['health_note']}" if lease.get("health_note") else ""
        since = f", for {printing.age(lease['health_since'])}" if lease.get("health_since") else ""
        checked = f", checked {printing.age(lease['checked_at'])} ago" if lease.get("checked_at") else ""
        lines.append(("health", f"{printing.health(lease)}{reason}{since}{checked}"))
    if lease.get("workspace"):
        lines.append(("directory", lease["workspace"] + (f" ({lease['branch']})" if lease.get("branch") else "")))
    lines += _process("owner", lease["owner"])
    if other := printing.elsewhere(lease):
        lines.append(("elsewhere", f"the owner listens on {other} instead: give it this port ({{port}} or $PORT)"))
    if wide := printing.wider(lease):
        lines.append(("open", f"listens on {wide}, wider than {lease['address']}: open to the LAN"))
    return lines


def _owners_elsewhere(client: Client, view: dict[str, Any]) -> list[str]:
    """Return the leases whose owners listen on this port instead of on their own."""
    leases: Iterable[Any] = client.leases() if view["listeners"] else ()
    return [
        f"owner of {lease['service']} {printing.instance(lease)}, which leased {lease['port']} and listens here instead"
        for lease in leases
        if any(one["port"] == view["port"] for one in lease.get("elsewhere") or ())
    ]


def _former(lease: Any) -> str:
    return f"{lease['service']} {printing.instance(lease)}" if isinstance(lease, dict) else str(lease)


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
            Option("--ended", "", "the ended leases that are still remembered"),
            JSON,
        ),
        """
In a pipe the lines are tab-separated, without a header: service, instance,
port, owner, state, health, age, lease, note, URL ('-' for none).""",
    ),
    Command(
        "who",
        ["PORT"],
        "Show who has a port: its lease, and the processes with a socket there",
        who,
        (
            Option("--protocol", "PROTO", "tcp or udp (the one in use)", choice("tcp", "udp")),
            JSON,
        ),
        """
Works for every program of this host, with a lease or without. PORT may be
copied as it stands: 8080, :8080, localhost:8080. Exit status 1 when nobody
has the port.""",
    ),
    Command(
        "history",
        ["PORT"],
        "Show who had a port",
        history,
        (Option("--at", "TIME", "at one moment, in RFC 3339: 2026-03-01T12:00:00Z"), JSON),
    ),
    Command(
        "checks",
        ["[SERVICE]"],
        "List the last result, reason and age of each health check",
        checks,
        (JSON,),
    ),
)
