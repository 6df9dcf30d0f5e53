"""The daemon's API as requests: what each call of version 1 looks like, and nothing about how it travels."""

from __future__ import annotations

from .protocol import Request, query, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .types import LeaseRequest


def grant(wish: LeaseRequest | Sequence[LeaseRequest], wait_s: float | None = None) -> Request:
    """Request one lease, or several, all or none; `wait_s` lets the daemon wait for an exact or the previous port."""
    return Request("POST", query("/v1/leases", {"wait": wait_s}), wish if isinstance(wish, dict) else list(wish))


def leases(**filters: Any) -> Request:
    """List leases: service, instance, endpoint, protocol, port, pid, uid, pool, state, health, tag, limit, cursor."""
    return Request("GET", query("/v1/leases", filters))


def lease(lease_id: str) -> Request:
    """Show one lease."""
    return Request("GET", _lease(lease_id))


def renew(lease_id: str, seconds: float | None = None, token: str | None = None) -> Request:
    """Restart the clock of a ttl lease, with a new period where `seconds` gives one."""
    return Request("POST", _lease(lease_id) + "/renew", None if seconds is None else {"seconds": seconds}, token)


def decline(lease_id: str, token: str | None = None) -> Request:
    """Ask for another port under the same lease: somebody else has this one."""
    return Request("POST", _lease(lease_id) + "/decline", token=token)


def drain(lease_id: str, on: bool = True, token: str | None = None) -> Request:
    """Take no new work, or take it again."""
    return Request("POST", _lease(lease_id) + "/drain", {"drain": on}, token)


def transfer(lease_id: str, pid: int, token: str | None = None) -> Request:
    """Make another process the lease's owner."""
    return Request("POST", _lease(lease_id) + "/transfer", {"pid": pid}, token)


def change(lease_id: str, fields: dict[str, Any], token: str | None = None) -> Request:
    """Replace tags, metadata, check or announce."""
    return Request("PATCH", _lease(lease_id), fields, token)


def report(lease_id: str, status: str, note: str = "", token: str | None = None) -> Request:
    """Report the result of a `report` check."""
    return Request("PUT", _lease(lease_id) + "/health", {"status": status, "note": note}, token)


def release(lease_id: str, token: str | None = None) -> Request:
    """Release; a lease that is released already stays so."""
    return Request("DELETE", _lease(lease_id), token=token)


def ports() -> Request:
    """List every port of the host that is leased, static, cooling or listened on."""
    return Request("GET", "/v1/ports")


def port(number: int, protocol: str | None = None) -> Request:
    """Ask who has a port."""
    return Request("GET", query(f"/v1/ports/{number}", {"protocol": protocol}))


def history(number: int, at: str | None = None) -> Request:
    """Ask who had a port, newest first; `at` (RFC 3339) asks for one moment."""
    return Request("GET", query(f"/v1/ports/{number}/history", {"at": at}))


def services(**filters: Any) -> Request:
    """List names with counts by health; pages by `limit` and `cursor`."""
    return Request("GET", query("/v1/services", filters))


def service(name: str, **filters: Any) -> Request:
    """List a service's instances: passing, tag, endpoint, scope; `after` and `wait` (seconds) make a long poll."""
    return Request("GET", query(f"/v1/services/{quote(name)}", filters))


def events(after: int | None = None, service: str | None = None) -> Request:
    """Follow the event stream from a revision on; None starts now."""
    return Request("GET", query("/v1/events", {"after": after, "service": service}))


def lan(type: str | None = None) -> Request:
    """List the DNS-SD services seen on the LAN."""
    return Request("GET", query("/v1/lan", {"type": type}))


def status() -> Request:
    """Show the daemon's condition."""
    return Request("GET", "/v1/status")


def _lease(lease_id: str) -> str:
    return f"/v1/leases/{quote(lease_id)}"
