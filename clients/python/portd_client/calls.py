"""The daemon's API as requests: the request of each call of version 1, without any transport.

`Client.call(request)` and `AsyncClient.call(request)` make any of them and return its typed answer.
"""

from __future__ import annotations

from .protocol import Request, query, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Unpack

    from .types import Host, Instances, LeaseChange, LeaseDocument, LeaseRequest, ServiceFilters


def grant(request: LeaseRequest | Sequence[LeaseRequest], wait_s: float | None = None) -> Request[Any]:
    """Request one lease, or several, all or none; `wait_s` lets the daemon wait for an exact or the previous port."""
    return Request("POST", query("/v1/leases", {"wait": wait_s}), request if isinstance(request, dict) else [*request])


def leases(**filters: Any) -> Request[Any]:
    """List leases, one page: see LeaseFilters; `cursor` is the `next` of the page before."""
    return Request("GET", query("/v1/leases", filters))


def lease(lease_id: str) -> Request[LeaseDocument]:
    """Show one lease."""
    return Request("GET", _lease(lease_id))


def renew(lease_id: str, seconds: float | None = None, token: str | None = None) -> Request[LeaseDocument]:
    """Restart the clock of a ttl lease, with a new period where `seconds` gives one."""
    return Request("POST", _lease(lease_id) + "/renew", None if seconds is None else {"seconds": seconds}, token)


def decline(lease_id: str, token: str | None = None) -> Request[LeaseDocument]:
    """Request another port under the same lease: somebody else has this one."""
    return Request("POST", _lease(lease_id) + "/decline", token=token)


def drain(lease_id: str, on: bool = True, token: str | None = None) -> Request[LeaseDocument]:
    """Accept no new work, or accept it again."""
    return Request("POST", _lease(lease_id) + "/drain", {"drain": on}, token)


def transfer(lease_id: str, pid: int, token: str | None = None) -> Request[LeaseDocument]:
    """Hand a lease over to another process of this host."""
    return Request("POST", _lease(lease_id) + "/transfer", {"pid": pid}, token)


def change(lease_id: str, fields: LeaseChange, token: str | None = None) -> Request[LeaseDocument]:
    """Replace tags, metadata, weight, check or announce."""
    return Request("PATCH", _lease(lease_id), fields, token)


def report(lease_id: str, status: str, note: str = "", token: str | None = None) -> Request[LeaseDocument]:
    """Report the result of a `report` check."""
    return Request("PUT", _lease(lease_id) + "/health", {"status": status, "note": note}, token)


def release(lease_id: str, token: str | None = None) -> Request[None]:
    """Release; a lease that is released already stays so."""
    return Request("DELETE", _lease(lease_id), token=token)


def ports() -> Request[Any]:
    """List every port of the host that is leased, static, cooling or listened on."""
    return Request("GET", "/v1/ports")


def port(number: int, protocol: str | None = None) -> Request[Any]:
    """Show who has a port."""
    return Request("GET", query(f"/v1/ports/{number}", {"protocol": protocol}))


def history(number: int, at: str | None = None) -> Request[Any]:
    """Show who had a port, newest first; `at` (RFC 3339) selects one moment."""
    return Request("GET", query(f"/v1/ports/{number}/history", {"at": at}))


def services(**filters: Any) -> Request[Any]:
    """List names with counts by health, one page; `limit` and `cursor` page through them."""
    return Request("GET", query("/v1/services", filters))


def service(name: str, **filters: Unpack[ServiceFilters]) -> Request[Instances]:
    """List a service's instances; `after` and `wait` (seconds) make a long poll."""
    return Request("GET", query(f"/v1/services/{quote(name)}", filters))


def events(after: int | str | None = None, service: str | None = None) -> Request[None]:
    """Follow the event stream after a revision; None starts now."""
    return Request("GET", query("/v1/events", {"after": after, "service": service}))


def lan(type: str | None = None) -> Request[Any]:
    """List the DNS-SD services seen on the LAN."""
    return Request("GET", query("/v1/lan", {"type": type}))


def hosts() -> Request[list[Host]]:
    """List the hosts of the cluster."""
    return Request("GET", "/v1/hosts")


def status() -> Request[dict[str, Any]]:
    """Show the daemon's condition."""
    return Request("GET", "/v1/status")


def _lease(lease_id: str) -> str:
    return f"/v1/leases/{quote(lease_id)}"
