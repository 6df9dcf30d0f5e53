"""Consul's documents, made of leases: pure functions, field by field as Consul's API documents them.

An instance is passing in Consul where it serves in portd (`core.visibility`); everything else shows as critical, with
the reason as the output of a check. Each instance has a check of its own kind, since some clients ignore those without.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from portd.adapters.consul import naming
from portd.core.bindings import ANY, ANY_V4
from portd.core.model import Check, Lease
from portd.core.visibility import is_healthy, serving

DATACENTER: Final = "dc1"
VERSION: Final = "1.20.0"
"""The version of Consul whose API this is a subset of: clients compare it."""
NODE_CHECK: Final = "serfHealth"
SERF_PORT: Final = 8301
SERVER_PORT: Final = 8300
_ORDER: Final = ("passing", "warning", "critical")

Document = dict[str, Any]


class Node(NamedTuple):
    """This host, as Consul's clients see it. `address` is the one that the client itself has reached."""

    name: str
    address: str

    @property
    def id(self) -> str:
        """Return an id that stays the same for a host name (RFC 9562, version 5)."""
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, self.name))


class Instance(NamedTuple):
    """A lease with what is decided about it together with its service's other leases."""

    lease: Lease
    serves: bool


def instances(leases: Iterable[Lease]) -> list[Instance]:
    """Pair all leases of one portd service with whether they serve, ordered by name."""
    ordered = sorted(leases, key=lambda lease: lease.name)
    serves = {lease.id for lease in serving(ordered)}
    return [Instance(lease, lease.id in serves) for lease in ordered]


def index_of(lease: Lease) -> int:
    """Return the index of a lease's documents: at least 1."""
    return max(lease.revision, 1)


# --- nodes ---


def node_document(node: Node) -> Document:
    """Make the `Node` object."""
    return {
        "ID": node.id,
        "Node": node.name,
        "Address": node.address,
        "Datacenter": DATACENTER,
        "TaggedAddresses": {"lan": node.address, "wan": node.address},
        "Meta": {},
        "CreateIndex": 1,
        "ModifyIndex": 1,
    }


def member_document(node: Node) -> Document:
    """Make the member of agent/members and agent/self."""
    return {
        "Name": node.name,
        "Addr": node.address,
        "Port": SERF_PORT,
        "Tags": {"dc": DATACENTER, "id": node.id, "role": "consul", "build": VERSION},
        "Status": 1,
        "ProtocolMin": 1,
        "ProtocolMax": 5,
        "ProtocolCur": 2,
        "DelegateMin": 2,
        "DelegateMax": 5,
        "DelegateCur": 4,
    }


def self_document(node: Node) -> Document:
    """Make agent/self."""
    return {
        "Config": {
            "Datacenter": DATACENTER,
            "PrimaryDatacenter": DATACENTER,
            "NodeName": node.name,
            "NodeID": node.id,
            "Server": True,
            "Revision": "portd",
            "Version": VERSION,
        },
        "DebugConfig": {},
        "Member": member_document(node),
        "Meta": {},
        "Stats": {},
    }


def node_check_document(node: Node) -> Document:
    """Make the check of the node itself: whoever reads it knows that the host lives."""
    return {
        "Node": node.name,
        "CheckID": NODE_CHECK,
        "Name": "Serf Health Status",
        "Status": "passing",
        "Notes": "",
        "Output": "Agent alive and reachable",
        "ServiceID": "",
        "ServiceName": "",
        "ServiceTags": [],
        "Type": "",
        "Definition": {},
        "CreateIndex": 1,
        "ModifyIndex": 1,
    }


# --- services ---


def service_address(lease: Lease) -> str:
    """Return the address of a service: empty where it listens everywhere, so that clients use the node's."""
    address = lease.listening[0] if lease.listening else lease.address
    return {ANY: "", ANY_V4: "", "localhost": "127.0.0.1"}.get(address, address)


def service_document(lease: Lease) -> Document:
    """Make the `Service` object of agent/services and health/service."""
    return {
        "ID": naming.service_id(lease),
        "Service": naming.service_name(lease),
        "Tags": list(lease.tags),
        "Address": service_address(lease),
        "TaggedAddresses": {},
        "Meta": naming.meta(lease),
        "Port": lease.port,
        "Weights": {"Passing": lease.weight, "Warning": min(lease.weight, 1)},
        "EnableTagOverride": False,
        "Datacenter": DATACENTER,
        "CreateIndex": index_of(lease),
        "ModifyIndex": index_of(lease),
    }


def catalog_document(node: Node, lease: Lease) -> Document:
    """Make an entry of catalog/service."""
    return {
        "ID": node.id,
        "Node": node.name,
        "Address": node.address,
        "Datacenter": DATACENTER,
        "TaggedAddresses": {"lan": node.address, "wan": node.address},
        "NodeMeta": {},
        "ServiceKind": "",
        "ServiceID": naming.service_id(lease),
        "ServiceName": naming.service_name(lease),
        "ServiceTags": list(lease.tags),
        "ServiceAddress": service_address(lease),
        "ServiceTaggedAddresses": {},
        "ServiceWeights": {"Passing": lease.weight, "Warning": min(lease.weight, 1)},
        "ServiceMeta": naming.meta(lease),
        "ServicePort": lease.port,
        "ServiceEnableTagOverride": False,
        "CreateIndex": index_of(lease),
        "ModifyIndex": index_of(lease),
    }


# --- checks ---


def check_documents(node: Node, instance: Instance) -> list[Document]:
    """Make the checks of an instance: that its process listens, its own check, and maintenance while it drains."""
    lease = instance.lease
    listens, output = _listening(instance)
    name = naming.service_name(lease)
    checks = []
    if lease.check is None or listens != "passing":
        checks.append(_check(node, lease, f"portd:{naming.service_id(lease)}", f"Process of {name}", listens, output))
    if lease.check is not None:
        title = lease.metadata.get(naming.CHECK_NAME_KEY) or f"Service '{name}' check"
        status = "critical" if lease.health == "unknown" else lease.health
        document = _check(node, lease, naming.check_id(lease), title, status, lease.health_note)
        checks.append(document | {"Type": check_type(lease.check), "Interval": f"{lease.check.interval:g}s"})
    if lease.drain:
        maintenance = f"_service_maintenance:{naming.service_id(lease)}"
        checks.append(_check(node, lease, maintenance, "Service Maintenance Mode", "critical", "The instance drains."))
    return checks


def _listening(instance: Instance) -> tuple[str, str]:
    lease = instance.lease
    if lease.state == "bound" and (instance.serves or lease.drain or not is_healthy(lease)):
        return "passing", "The process listens on its port."
    if lease.state == "bound":
        return "critical", "Another endpoint of the instance drains or is critical."
    if lease.state == "conflict":
        return "critical", "Another process listens on the port."
    return "critical", "Nobody listens on the port yet."


def _check(node: Node, lease: Lease, check_id: str, name: str, status: str, output: str) -> Document:
    return {
        "Node": node.name,
        "CheckID": check_id,
        "Name": name,
        "Status": status,
        "Notes": "",
        "Output": output,
        "ServiceID": naming.service_id(lease),
        "ServiceName": naming.service_name(lease),
        "ServiceTags": list(lease.tags),
        "Type": "",
        "Interval": "",
        "Timeout": "",
        "ExposedPort": 0,
        "Definition": {},
        "CreateIndex": index_of(lease),
        "ModifyIndex": index_of(lease),
    }


def check_type(check: Check) -> str:
    """Return Consul's name for the kind of a check."""
    kind: str = type(check).__struct_config__.tag  # type: ignore[assignment]
    return {"report": "ttl", "listen": "tcp", "command": "script"}.get(kind, kind)


def aggregated(checks: Iterable[Mapping[str, Any]]) -> str:
    """Return the worst status of some checks, `maintenance` before all others; `passing` where there is none."""
    worst = 0
    for check in checks:
        if str(check["CheckID"]).startswith(("_service_maintenance", "_node_maintenance")):
            return "maintenance"
        worst = max(worst, _ORDER.index(check["Status"]))
    return _ORDER[worst]


def health_document(node: Node, instance: Instance) -> Document:
    """Make an entry of health/service."""
    return {
        "Node": node_document(node),
        "Service": service_document(instance.lease),
        "Checks": [node_check_document(node), *check_documents(node, instance)],
    }
