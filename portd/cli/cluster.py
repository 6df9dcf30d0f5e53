"""The commands `portd hosts` and `portd cluster status`: the other hosts, and the condition of what connects them."""

from __future__ import annotations

from portd._client import calls
from portd._client.client import Client
from portd.cli import printing
from portd.cli.options import JSON, Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def hosts(values: dict[str, Any]) -> int:
    """List the hosts of the cluster, this one first."""
    found = Client().call(calls.hosts())
    if values["json"]:
        printing.json(found)
        return 0
    printing.table(
        ["HOST", "ADDRESS", "VERSION", "SERVICES", "INSTANCES", "SEEN", "NOTE"],
        [
            [
                host["host"],
                host["address"] or "-",
                host["version"],
                str(host["services"]),
                str(host["instances"]),
                printing.age(host["seen"]),
                "this host" if host["self"] else "-",
            ]
            for host in found
        ],
        drop=("NOTE", "VERSION"),
    )
    return 0


def cluster(values: dict[str, Any]) -> int:
    """Show the cluster's condition; 1 where no cluster is configured, or it has a problem."""
    found = Client().call(calls.status())["cluster"]
    if values["json"]:
        printing.json(found)
    elif not found["enabled"]:
        printing.facts([("cluster", "off: set [cluster] engine and endpoints")])
    else:
        printing.facts(_lines(found))
    return 1 if not found["enabled"] or found["problem"] else 0


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    stale_s, lease = found["stale"], found["lease"]
    return [
        ("node", f"{found['node']}, {found['state']}"),
        ("member", f"{found['member'] or 'none answers'}; etcd {found['etcd_version'] or 'version unknown'}"),
        ("lease", f"{lease}, {found['ttl']} s" if lease else "none"),
        ("published", f"{found['published']} keys, {found['waiting']} changes wait"),
        ("known", f"{found['hosts']} hosts, {found['instances']} endpoints of others; follows {found['follows']}"),
        ("view", "fresh" if stale_s is None else f"stale: etcd was last heard from {stale_s:.0f} s ago"),
        ("database", f"{found['db_size_bytes'] / 1e6:.1f} MB at revision {found['revision']}"),
        *([("problem", found["problem"])] if found["problem"] else []),
    ]


COMMANDS = (
    Command("hosts", [], "List the hosts of the cluster", hosts, (JSON,)),
    Command("cluster", ["ACTION"], "Show the condition of the cluster: portd cluster status", cluster, (JSON,)),
)
