"""What the client does with a lease, as sequences of calls without any I/O: the sync and the asyncio lease drive them.

A sequence is a generator: it yields a Request, is sent the decoded answer (or thrown the error that came instead), and
returns its result. This module must not know sockets, threads or event loops.
"""

from __future__ import annotations

from . import calls
from .errors import DaemonUnavailable, LeaseLost, PortTaken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from typing import Any

    from .protocol import Request
    from .types import LeaseDocument, LeaseRequest

    Steps = Generator[Request, Any, Any]

CHECK_S = 30.0
"""Seconds between looks at a lease without a clock: how long it goes unnoticed that a daemon lost its memory."""
RETRY_S = 1.0
"""Seconds between tries while no daemon answers; a restart takes about one."""
DECLINES_MAX = 8
"""Ports that are given back in a row before binding gives up: then something else is wrong than a busy port."""
JITTER = 0.2
"""The share of a period by which renewals are early, by chance: a thousand services must not renew in step."""


def wish(service: str, options: Mapping[str, Any]) -> LeaseRequest:
    """Make a request from what an application says; None leaves an option out.

    `check` may be written short: "tcp", "http:/healthz".
    """
    made: Any = {"service": service, **{key: value for key, value in options.items() if value is not None}}
    check = made.get("check")
    if isinstance(check, str):
        kind, _, rest = check.partition(":")
        field = {"http": "path", "grpc": "service"}.get(kind, "")
        if rest and not field:
            raise ValueError(f"check {check!r}: write it as a dict")
        made["check"] = {"kind": kind, field: rest} if rest else {"kind": kind}
    return made  # type: ignore[no-any-return]


class AdoptedLease:
    """What `portd run` put into the environment for one endpoint."""

    __slots__ = ("host", "lease_id", "port", "token")

    def __init__(self, lease_id: str, token: str | None, host: str, port: int) -> None:
        self.lease_id = lease_id
        self.token = token
        self.host = host
        self.port = port


def given(environ: Mapping[str, str], endpoint: str = "main") -> AdoptedLease | None:
    """Read the environment; None when `portd run` did not start this process, or without that endpoint."""
    suffix = "" if endpoint == "main" else "_" + endpoint.upper().replace("-", "_")
    lease_id, port = environ.get(f"PORTD_LEASE{suffix}"), environ.get(f"PORT{suffix}", "")
    if not lease_id or not port.isdecimal():
        return None
    return AdoptedLease(
        lease_id, environ.get(f"PORTD_TOKEN{suffix}") or None, environ.get("HOST", "127.0.0.1"), int(port)
    )


def adopt(given: AdoptedLease, wish: LeaseRequest) -> Steps:
    """Take over a given lease; returns its document, or None when it is another service's or has ended.

    Without an answer the environment is taken at its word: the port is ours as long as this process lives.
    """
    try:
        document: LeaseDocument = yield calls.lease(given.lease_id)
    except LeaseLost:
        return None
    except DaemonUnavailable:
        return {
            "id": given.lease_id,
            "service": wish["service"],
            "endpoint": wish.get("endpoint", "main"),
            "address": given.host,
            "port": given.port,
            "protocol": wish.get("protocol", "tcp"),
            "lifetime": "process",
        }
    if document["state"] == "ended" or document["service"] != wish["service"]:
        return None
    return document


def keep(document: LeaseDocument, token: str | None, wish: LeaseRequest, *, may_move: bool) -> Steps:
    """Renew a lease (or look whether it is there), and lease again with the same wish where it is lost.

    Returns the document as it is now; raises PortTaken when the port is somebody else's by now and may not change:
    without `may_move`, or where exactly that port was wished for.
    """
    try:
        if document["lifetime"] == "ttl":
            return (yield calls.renew(document["id"], token=token))
        current: LeaseDocument = yield calls.lease(document["id"])
        if current["state"] != "ended":
            return current
    except LeaseLost:
        pass
    again: Any = {**wish, "port": document["port"], "exact": True}
    if document.get("instance"):
        again["instance"] = document["instance"]
    try:
        return (yield calls.grant(again))
    except PortTaken:
        if not may_move or wish.get("exact"):
            raise
    again["exact"] = False
    return (yield calls.grant(again))


def pause_s(document: LeaseDocument, chance: float) -> float:
    """Return the seconds until the next look: a third of the ttl, or CHECK_S, less some jitter (`chance` is 0 to 1)."""
    period = CHECK_S
    if document["lifetime"] == "ttl" and (expires_at := document.get("expires_at")):
        from datetime import datetime

        started_at = document.get("renewed_at") or document["created_at"]
        period = (datetime.fromisoformat(expires_at) - datetime.fromisoformat(started_at)).total_seconds() / 3
    return period * (1 - JITTER * chance)
