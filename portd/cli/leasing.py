"""The commands on one lease: lease, adopt, renew, release, drain, transfer."""

from __future__ import annotations

import os
import sys

from portd._client import calls, documents
from portd._client.client import Client
from portd._client.errors import Problem
from portd.cli import lease_options
from portd.cli.options import JSON, Command, Option, UsageError, duration, label

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from portd._client.protocol import Request
    from portd._client.types import LeaseDocument


def lease(values: dict[str, Any]) -> int:
    """Lease one port and print its number alone; without --ttl and --pid it belongs to the calling shell or script."""
    request = lease_options.request(values)
    if values["endpoint"] is not None:
        request["endpoint"] = values["endpoint"]
    client, surprise = Client(), ""
    if "ttl" not in request:
        _check_pid_namespace()
    if "ttl" not in request and "pid" not in request:
        from portd.cli import callers

        request["pid"], surprise = callers.choose(os.getppid(), os.getuid(), callers.read_process)
    document = grant(client, request, values["wait"])
    text = str(document["port"])
    if values["export"] or values["env_file"] is not None:
        from portd.cli import assignments

        made = assignments.variables({document["endpoint"]: document}, client.url)
        if values["env_file"] is not None:
            try:
                assignments.write_env_file(values["env_file"], made)
            except BaseException:
                client.call(calls.release(document["id"], document.get("token")))
                raise
        if values["export"]:
            text = assignments.shell_lines(made).rstrip("\n")
    _show(document, text, as_json=values["json"])
    if surprise:
        _note(f"{document['instance']} belongs to {surprise}; choose otherwise with --pid PID or --ttl SECONDS")
    if document.get("hold") == "exclusive" and not values["json"]:
        _note(f"only portd can open port {document['port']}: it hands the socket over for lease {document['id']}")
    return 0


def adopt(values: dict[str, Any]) -> int:
    """Lease a port for the process that listens there already."""
    request = {**lease_options.request(values), "adopt": True}
    if values["endpoint"] is not None:
        request["endpoint"] = values["endpoint"]
    from portd.cli import printing

    try:
        document = grant(Client(), request)
    except Problem as problem:
        if problem.code != "invalid_request" or problem.pointer != "/port":
            raise
        if values["json"]:
            print(printing.escaped(documents.encode(problem.document).decode()), file=sys.stderr)
        else:
            _note(problem.detail)
        return 1  # nobody listens there: a clear no

    shown = f"{document['instance']} on {printing.binding(document)}, {printing.owner(document['owner'])}"
    _show(document, printing.clean(shown), as_json=values["json"])
    return 0


def grant(client: Client, request: Any, wait_s: float | None = None) -> Any:
    """Send a lease request, or a list of them; `wait_s` lets the daemon wait for the port."""
    return client.call(calls.grant(request, wait_s), timeout_s=None if wait_s is None else wait_s + 10.0)


def renew(values: dict[str, Any]) -> int:
    """Restart the clock of a ttl lease; print when it ends."""
    return _on_each(
        values,
        lambda lease_id: calls.renew(lease_id, values["ttl"], values["token"]),
        lambda document: str(document["expires_at"]),
    )


def release(values: dict[str, Any]) -> int:
    """Release a lease: its port goes into cooldown, then back to the pool."""
    return _on_each(values, lambda lease_id: calls.release(lease_id, values["token"]))


def drain(values: dict[str, Any]) -> int:
    """Take an instance out of lookups; it keeps its ports."""
    return _on_each(values, lambda lease_id: calls.drain(lease_id, not values["undo"], values["token"]))


def transfer(values: dict[str, Any]) -> int:
    """Hand a lease on to another process."""
    return _on_each(values, lambda lease_id: calls.transfer(lease_id, values["pid"], values["token"]))


def _on_each(
    values: dict[str, Any],
    make: Callable[[str], Request[Any]],
    describe: Callable[[LeaseDocument], str] | None = None,
) -> int:
    """Make a call for every lease that X means, and print what came of it."""
    from portd.cli import targets

    client = Client()
    changed = [client.call(make(lease["id"])) for lease in targets.find(client, values["x"])]
    documents = [document for document in changed if document is not None]
    if values["json"] and documents:
        from portd.cli import printing

        printing.json(documents[0] if len(documents) == 1 else {"leases": documents})
    elif describe is not None:
        sys.stdout.write("".join(describe(document) + "\n" for document in documents))
    return 0


def _check_pid_namespace() -> None:
    """Raise UsageError in a container that shares the daemon's socket alone: a PID there is another process here."""
    from portd._client import endpoints
    from portd.cli.callers import shares_pid_namespace

    shared: bool | None = True
    for endpoint in endpoints.candidates(os.environ, os.getuid()):
        shared = shares_pid_namespace(endpoint.path) if endpoint.path else True
        if shared is not None:
            break
    if shared is False:
        raise UsageError(
            "this process runs in another PID namespace than the daemon, which can't see when it exits: "
            "give --ttl SECONDS, and run 'portd renew' in time"
        )


def _show(document: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        import json

        from portd.cli.printing import escaped

        text = escaped(json.dumps(document, indent=2))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _note(text: str) -> None:
    from portd.cli.printing import clean

    print(f"portd: {clean(text)}", file=sys.stderr)


TOKEN = Option("--token", "TOKEN", "the lease's token, to change a lease of another user")
ENDPOINT = Option("--endpoint", "NAME", "which of the instance's ports this is (main)", label)
X = "\nX is a lease id, an instance name, or a port."
COMMANDS = (
    Command(
        "lease",
        ["SERVICE"],
        "Lease a port, and print it",
        lease,
        (
            *lease_options.REQUEST,
            lease_options.TTL,
            lease_options.PID,
            *lease_options.SHOWN,
            ENDPOINT,
            Option("--export", "", "print shell assignments of PORT, HOST and PORTD_… for eval"),
            Option("--env-file", "FILE", "set the same variables in FILE; its other lines stay"),
            JSON,
        ),
        """
stdout has the port alone:    PORT=$(portd lease orders)
With every variable:          eval "$(portd lease orders --export)"

Without --ttl and --pid the lease belongs to the calling shell or script, and
ends with it. Subshells, wrappers like timeout, and a 'sh -c' that only prints
the port are skipped; name the process with --pid $$ where that is not enough.
'portd run' starts a service that owns its lease itself.""",
    ),
    Command(
        "adopt",
        ["SERVICE", "PORT"],
        "Lease a port for the process that listens there already",
        adopt,
        (*(option for option in lease_options.REQUEST if option.key in {"instance", "protocol", "address"}),
         *lease_options.SHOWN, ENDPOINT, JSON),
        """
For services that portd did not start: they are found, checked and announced
like others, and their leases end when they exit. The process must be yours;
root and the admin group adopt any.

    portd adopt postgres 5432 --check tcp""",
    ),
    Command(
        "renew",
        ["X"],
        "Restart the clock of a ttl lease",
        renew,
        (Option("--ttl", "SECONDS", "the new period (as before)", duration), TOKEN, JSON),
        X,
    ),
    Command("release", ["X"], "End a lease; its process goes on", release, (TOKEN, JSON), X),
    Command(
        "drain",
        ["X"],
        "Take an instance out of lookups; it keeps its ports",
        drain,
        (Option("--undo", "", "put it back"), TOKEN, JSON),
        X,
    ),
    Command(
        "transfer",
        ["X", "PID"],
        "Make another process the owner of a lease",
        transfer,
        (TOKEN, JSON),
        X,
    ),
)  # fmt: skip
