"""What the client does with a lease, as sequences of calls without any I/O: the sync and the asyncio lease drive them.

A sequence is a generator: it yields a Request, is sent the decoded answer (or thrown the error that came instead), and
returns its result. This module must not know sockets, threads or event loops.
"""

from __future__ import annotations

import os

from . import calls
from .errors import DaemonUnavailable, LeaseLost, PortTaken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from typing import Any

    from .protocol import Request
    from .types import LeaseChange, LeaseDocument, LeaseRequest

    Steps = Generator[Request[Any], Any, Any]

CHECK_S = 30.0
"""Seconds between checks of a lease without a clock: how long it goes unnoticed that a daemon lost its store."""
RETRY_S = 1.0
"""Seconds between tries while no daemon answers; a restart takes about one."""
DECLINES_MAX = 8
"""Ports that are declined in a row before binding gives up: then something else is wrong than a busy port."""
JITTER = 0.2
"""The share of a period by which renewals are early, at random: a thousand services must not renew in step."""
CHANGEABLE = ("tags", "metadata", "weight", "check", "announce")
"""The fields of a lease that PATCH replaces."""


def request(service: str, options: Mapping[str, Any]) -> LeaseRequest:
    """Make a lease request from a program's options; None leaves an option out.

    `check` may be written short: "tcp", "http:/healthz". Raises ValueError for a short check with an unknown part.
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


_adopted: set[tuple[int, str]] = set()
"""The leases of the environment that a process (by its pid) has adopted: each belongs to one handle."""


def from_environment(environ: Mapping[str, str], endpoint: str = "main") -> AdoptedLease | None:
    """Read the environment; None when `portd run` did not start this process, or without that endpoint.

    None as well for a lease that this process has adopted before: a second one is another instance.
    """
    suffix = "" if endpoint == "main" else "_" + endpoint.upper().replace("-", "_")
    lease_id, port = environ.get(f"PORTD_LEASE{suffix}"), environ.get(f"PORT{suffix}", "")
    if not lease_id or not port.isdecimal() or (os.getpid(), lease_id) in _adopted:
        return None
    token = environ.get(f"PORTD_TOKEN{suffix}") or None
    return AdoptedLease(lease_id, token, environ.get("HOST", "127.0.0.1"), int(port))


def adopt(given: AdoptedLease, request: LeaseRequest) -> Steps:
    """Adopt a lease of the environment, and apply to it what the program requests.

    Returns its document, or None when it is another service's or has ended. If no daemon answers, trust the
    environment: the lease of `portd run` lasts as long as this process.
    """
    try:
        document: LeaseDocument = yield calls.lease(given.lease_id)
        if document["state"] == "ended" or document["service"] != request["service"]:
            if document["state"] != "ended":
                _warn_of_another_service(given, document, request)
            return None
        if missing := differences(document, request):
            document = yield calls.change(given.lease_id, missing, given.token)
    except LeaseLost:
        return None
    except DaemonUnavailable:
        _adopted.add((os.getpid(), given.lease_id))
        return {
            "id": given.lease_id,
            "service": request["service"],
            "endpoint": request.get("endpoint", "main"),
            "address": given.host,
            "port": given.port,
            "protocol": request.get("protocol", "tcp"),
            "lifetime": "process",
        }
    _adopted.add((os.getpid(), given.lease_id))
    return document


def differences(document: LeaseDocument, request: LeaseRequest) -> LeaseChange:
    """Return the requested fields that a lease does not have yet and that PATCH can give it."""
    wanted: Any = {name: request[name] for name in CHANGEABLE if name in request}  # type: ignore[literal-required]
    missing: Any = {name: value for name, value in wanted.items() if not _has(document.get(name), value)}
    return missing  # type: ignore[no-any-return]


def _has(actual: Any, wanted: Any) -> bool:
    """Return whether a lease's field is what is wanted; a check is shown with its defaults filled in."""
    if isinstance(wanted, bool):
        return bool(actual) is wanted
    if isinstance(wanted, dict) and isinstance(actual, dict) and "kind" in wanted:
        return all(actual.get(name) == value for name, value in wanted.items())
    return bool(actual == wanted)


_warned: set[str] = set()


def _warn_of_another_service(given: AdoptedLease, document: LeaseDocument, request: LeaseRequest) -> None:
    if given.lease_id in _warned or any(lease_id == given.lease_id for _, lease_id in _adopted):
        return
    _warned.add(given.lease_id)
    import logging

    logging.getLogger("portd_client").warning(
        "portd: 'portd run' leased port %s for %s, but this program leases for %s: use one name, "
        "or the port of 'portd run' stays unused",
        given.port,
        document["service"],
        request["service"],
    )


def keep(document: LeaseDocument, token: str | None, request: LeaseRequest, *, may_move: bool) -> Steps:
    """Renew a lease (or check that it is there), and lease again by the same request where it is lost.

    A port that this process listens on is leased back as it is. Returns the newest document. Raises PortTaken when
    somebody else has the port by now and it may not change: without `may_move`, or where it was to be `exact`.
    """
    try:
        if document["lifetime"] == "ttl":
            return (yield calls.renew(document["id"], token=token))
        current: LeaseDocument = yield calls.lease(document["id"])
        if current["state"] != "ended":
            return current
    except LeaseLost:
        pass
    again: Any = {**request, "port": document["port"], "exact": True}
    if document.get("instance"):
        again["instance"] = document["instance"]
    try:
        return (yield calls.grant(again))
    except PortTaken as error:
        taken = error
    adopted: LeaseDocument | None = yield from _adopt_listener(again)
    if adopted is not None:
        return adopted
    if not may_move or request.get("exact"):
        raise taken
    again["exact"] = False
    return (yield calls.grant(again))


def _adopt_listener(again: Mapping[str, Any]) -> Steps:
    """Lease a port for this process, which listens on it; None where another process does."""
    from .errors import Problem

    wanted: Any = {name: value for name, value in again.items() if name not in {"exact", "hold", "pool"}}
    try:
        wanted["adopt"] = True
        found: LeaseDocument = yield calls.grant(wanted)
    except Problem:
        return None
    if found.get("owner", {}).get("pid") == os.getpid():
        return found
    yield calls.release(found["id"], found.get("token"))  # another process of this user listens there
    return None


def pause_s(document: LeaseDocument, random: float) -> float:
    """Return the seconds until the next check: a third of the ttl, or CHECK_S, less jitter (`random` is 0 to 1)."""
    period = CHECK_S
    if document["lifetime"] == "ttl" and (expires_at := document.get("expires_at")):
        from datetime import datetime

        started_at = document.get("renewed_at") or document["created_at"]
        period = (datetime.fromisoformat(expires_at) - datetime.fromisoformat(started_at)).total_seconds() / 3
    return period * (1 - JITTER * random)
