"""Looking services up: services, resolve."""

from __future__ import annotations

from portd._client import calls
from portd._client.client import Client
from portd.cli import printing
from portd.cli.listing import nothing
from portd.cli.options import JSON, Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def services(values: dict[str, Any]) -> int:
    """List names with counts by health."""
    found = Client().call(calls.services())
    if values["json"]:
        printing.json(found)
        return 0
    columns = ("instances", "passing", "warning", "critical", "unknown")
    printing.table(
        ["SERVICE", *(name.upper() for name in columns)],
        [[service["name"], *(str(service[name]) for name in columns)] for service in found["services"]],
    )
    return 0


def resolve(values: dict[str, Any]) -> int:
    """Print where a service's working instances are."""
    found = Client().service(
        values["service"], passing=True, tag=values["tag"] or None, endpoint=values["endpoint"], scope=values["scope"]
    )
    instances = found["instances"]
    if values["one"] and instances:
        from random import choice

        instances = [choice(instances)]
    if values["json"]:
        printing.json({**found, "instances": instances})
    else:
        from portd._client.lookup import reachable_host

        for lease in instances:
            print(printing.host_port(reachable_host(lease["address"]), lease["port"]))
    return 0 if instances else nothing(f"no instance of {values['service']} is there to be used")


COMMANDS = (
    Command("services", [], "List services with counts by health", services, (JSON,)),
    Command(
        "resolve",
        ["SERVICE"],
        "Print host:port of a service's working instances",
        resolve,
        (
            Option("--one", "", "one of them, by chance"),
            Option("--endpoint", "NAME", "another endpoint than main"),
            Option("--tag", "TAG", "only instances with this tag", many=True),
            Option("--scope", "SCOPE", "local, cluster, lan or all"),
            JSON,
        ),
        """
Only passing, undrained instances are printed, unless none of them has a check. Exit status 1 when there is none:
curl http://$(portd resolve orders --one)/""",
    ),
)
