"""Finds the leases that X names in `portd release X`: a lease id, an instance name, or a port."""

from __future__ import annotations

from portd._client import calls
from portd._client.errors import LeaseLost, PortdError
from portd.cli.options import UsageError, port_argument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portd._client.client import Client
    from portd._client.types import LeaseDocument

ID_LENGTH = 24
"""Characters of a lease id, hex digits all."""


class NoSuchLease(PortdError):
    """X names no lease; the message says what is near."""

    code = "not_found"


def find(client: Client, target: str) -> list[LeaseDocument]:
    """Return the leases of an id, an instance (every endpoint of it) or a port; raises NoSuchLease or UsageError."""
    if _is_id(target):
        try:
            return [client.call(calls.lease(target))]
        except LeaseLost:
            raise NoSuchLease(f"there is no lease {target}") from None
    number = _port(target)
    found = list(client.leases(port=number)) if number else []
    found = found or list(client.leases(instance=target.rpartition("/")[2]))
    if service := target.rpartition("/")[0] if not number else "":
        found = [lease for lease in found if lease["service"] == service]
    owners = sorted({f"{lease['service']}/{lease['instance']}" for lease in found})
    if len(owners) > 1:
        ids = ", ".join(f"{lease['id']} ({lease['service']}/{lease['instance']})" for lease in found)
        raise UsageError(f"{target!r} is not one instance: name a lease: {ids}")
    if not found:
        raise NoSuchLease(f"no lease has the id, instance or port {target!r}{_near(client, target)}")
    return found


def _near(client: Client, target: str) -> str:
    """Return what to append where somebody typed a service's name."""
    instances = (
        sorted({lease["instance"] for lease in client.leases(service=target)})
        if "-" in target or target.isalpha()
        else []
    )
    return f"; the service's instances are {', '.join(instances)}" if instances else "; 'portd ls' lists them"


def _is_id(target: str) -> bool:
    return len(target) == ID_LENGTH and not set(target) - set("0123456789abcdef")


def _port(target: str) -> int | None:
    try:
        return port_argument(target)
    except ValueError:
        return None
