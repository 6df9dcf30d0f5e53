"""Looking services up: services, resolve, wait."""

from __future__ import annotations

from time import monotonic, sleep

from portd._client import calls
from portd._client.client import Client
from portd._client.errors import DaemonUnavailable, ProtocolError, Retryable
from portd.cli import printing
from portd.cli.lease_options import WAIT_S
from portd.cli.listing import nothing
from portd.cli.options import JSON, Command, Option, UsageError, choice, duration, label, number, starts_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

POLL_MAX_S = 55.0
"""Seconds that one long poll asks for: less than proxies and the daemon's own bound cut off."""
RETRY_S = 0.2
"""Seconds between tries while the daemon restarts."""
TIMER_S = 0.05
"""A long poll that ends this long before the deadline has reached it."""
COUNTS = ("instances", "serving", "passing", "warning", "critical", "unknown")


def services(values: dict[str, Any]) -> int:
    """List services with counts by health, and why instances don't serve."""
    client = Client()
    found: list[dict[str, Any]] = []
    page = client.call(calls.services())
    while True:
        found += page["services"]
        if not page.get("next"):
            break
        page = client.call(calls.services(cursor=page["next"]))
    if values["json"]:
        printing.json({"services": found})
        return 0
    reasons = _reasons(client, found)
    printing.table(
        ["SERVICE", *(name.upper() for name in COUNTS), "NOTE"],
        [[one["name"], *(str(one.get(name, 0)) for name in COUNTS), reasons.get(one["name"], "-")] for one in found],
        drop=("UNKNOWN", "WARNING"),
    )
    return 0


def resolve(values: dict[str, Any]) -> int:
    """Print where the instances of a service that serve are."""
    client, wait_s = Client(), values["wait"]
    found = _serving(client, values, 1, 0.0 if wait_s is None else monotonic() + wait_s)
    instances = found["instances"]
    if values["one"] and instances:
        from random import choice as pick

        instances = [pick(instances)]
    if values["json"]:
        printing.json({**found, "instances": instances})
    else:
        from portd._client.lookup import reachable_host

        for lease in instances:
            print(printing.host_port(reachable_host(lease["address"]), lease["port"]))
    within = "" if wait_s is None else f" within {wait_s:g} s"
    return (
        0
        if instances
        else nothing(f"no instance of {values['service']} serves{within}{_why(client, values['service'])}", values)
    )


def wait(values: dict[str, Any]) -> int:
    """Return when each service has enough instances that serve."""
    client, count = Client(), values["min"] or values["passing"] or 1
    if values["min"] is not None and values["passing"] is not None:
        raise UsageError("--min and --passing exclude each other")
    deadline = monotonic() + (values["timeout"] or WAIT_S)
    options = {"tag": [], "endpoint": None, "scope": values["scope"], "health": values["passing"] is not None}
    for name in values["service"]:
        found = len(_serving(client, {**options, "service": name}, count, deadline)["instances"])
        if found < count:
            what = "pass" if options["health"] else "serve"
            return nothing(f"{found} of {count} instances of {name} {what}{_why(client, name)}", values)
    return 0


def _serving(client: Client, values: dict[str, Any], count: int, deadline: float) -> Any:
    """Return the instances that serve, once there are `count` or the deadline (seconds of `monotonic`) has passed.

    A daemon that has answered once may restart meanwhile.
    """
    filters = {
        "serving": True,
        "tag": values["tag"] or None,
        "endpoint": values["endpoint"],
        "scope": values["scope"],
        **({"health": "passing"} if values.get("health") else {}),
    }
    if deadline > monotonic():
        client.call(calls.status())
    while True:
        left_s = deadline - monotonic()
        polled: Any = {"min": count, "wait": round(min(left_s, POLL_MAX_S), 3)} if left_s > 0 else {}
        try:
            found: Any = client.service(values["service"], **filters, **polled)
        except (DaemonUnavailable, ProtocolError, Retryable):
            if left_s <= 0:
                raise
        else:
            if len(found["instances"]) >= count or monotonic() >= deadline - TIMER_S:
                return found
        sleep(RETRY_S)  # a restart, or the end of one long poll


def _why(client: Client, name: str) -> str:
    """Return what to append to a no: why the instances that there are don't serve."""
    said = [f"{printing.instance(lease)} {_reason(lease)}" for lease in client.leases(service=name)]
    return f": {'; '.join(said[:3])}{' …' if len(said) > 3 else ''}" if said else ""


def _reason(lease: Any) -> str:
    if lease["drain"]:
        return "is draining"
    if other := printing.elsewhere(lease):
        return f"listens on {other} instead of {lease['port']}"
    if lease["state"] != "bound":
        return {"held": "does not listen yet", "conflict": "has a foreign process on its port"}.get(lease["state"], "")
    note = f" ({lease['health_note']})" if lease.get("health_note") else ""
    return f"is {lease['health']}{note}"


def _reasons(client: Client, found: list[dict[str, Any]]) -> dict[str, str]:
    """Return for each service that lacks serving instances why, from its first instance that does not serve."""
    lacking = {one["name"] for one in found if one.get("serving", 0) < one["instances"]}
    said: dict[str, str] = {}
    for lease in client.leases() if lacking else ():
        is_fine = lease["state"] == "bound" and not lease["drain"] and lease["health"] != "critical"
        if lease["service"] in lacking and lease["service"] not in said and not is_fine:
            said[lease["service"]] = f"{printing.instance(lease)} {_reason(lease)}"
    return said


_WAIT = Option(
    "--wait",
    "SECONDS",
    f"wait until an instance serves ({WAIT_S:g} s)",
    duration,
    bare=WAIT_S,
    starts_value=starts_duration,
)
SCOPE = Option("--scope", "SCOPE", "local, cluster, lan or all", choice("local", "cluster", "lan", "all"))
COMMANDS = (
    Command("services", [], "List services with counts by health", services, (JSON,)),
    Command(
        "resolve",
        ["SERVICE"],
        "Print host:port of a service's instances that serve",
        resolve,
        (
            Option("--one", "", "print one at random"),
            _WAIT,
            Option("--endpoint", "NAME", "another endpoint than main", label),
            Option("--tag", "TAG", "only instances with this tag", many=True),
            SCOPE,
            JSON,
        ),
        """
An instance serves if it listens, is not draining, and its check (if it has
one) is passing or warning. Exit status 1 when none does:

    curl http://$(portd resolve orders --one --wait)/""",
    ),
    Command(
        "wait",
        ["SERVICE…"],
        "Wait until services have instances that serve",
        wait,
        (
            Option("--min", "N", "instances of each service (1)", number),
            Option("--passing", "N", "count only instances whose check is passing", number),
            Option("--timeout", "SECONDS", f"give up after this long ({WAIT_S:g} s); exit status 1", duration),
            SCOPE,
            JSON,
        ),
        """
For the order of start-up in scripts and CI:  portd wait orders billing""",
    ),
)
