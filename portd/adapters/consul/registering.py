"""From a Consul registration to a request for a lease: every field that portd understands, a refusal for the others.

Clients write `HTTP`, `http`, `TLSSkipVerify` or `tls_skip_verify`: names are compared without case and underscores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from portd.adapters.consul import naming
from portd.core.model import Check
from portd.core.requests import LeaseRequest

DEREGISTER_MIN_S: Final = 60.0
"""Consul's own minimum of DeregisterCriticalServiceAfter."""
_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)(ns|us|µs|ms|s|m|h)")

_IGNORED: Final = {
    "id", "name", "tags", "address", "port", "meta", "weights", "check", "checks", "enabletagoverride",
    "taggedaddresses", "namespace", "partition", "kind", "token", "locality",
}  # fmt: skip
_CHECK_FIELDS: Final = {
    "id", "checkid", "name", "notes", "http", "tcp", "ttl", "grpc", "grpcusetls", "tlsskipverify", "tlsservername",
    "interval", "timeout", "method", "header", "status", "successbeforepassing", "failuresbeforecritical",
    "failuresbeforewarning", "deregistercriticalserviceafter", "serviceid", "outputmaxsize", "disableredirects",
    "namespace", "partition", "body", "tcpusetls",
}  # fmt: skip


class BadRegistration(Exception):
    """A registration that portd can't do; the message names the field as Consul writes it."""


class Registration(msgspec.Struct, frozen=True):
    """A registration as a request for a lease; `status` is the first result of its check, where one was given."""

    request: LeaseRequest
    status: str | None = None


def plain_names(document: Any) -> dict[str, Any]:
    """Return an object with its names in lower case and without underscores; raises BadRegistration for no object."""
    if not isinstance(document, Mapping):
        raise BadRegistration("the body must be a JSON object")
    return {str(name).lower().replace("_", ""): value for name, value in document.items()}


def duration_s(text: Any, field: str) -> float:
    """Read a duration as Go writes it ("1m30s", "500ms") or a number of nanoseconds; seconds."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text) * 1e-9
    found = _DURATION.findall(text) if isinstance(text, str) else []
    if not found or "".join(number + unit for number, unit in found) != text:
        raise BadRegistration(f"{field} {text!r} is not a duration like 10s")
    return sum(float(number) * _UNITS[unit] for number, unit in found)


def read_service(document: Any) -> Registration:
    """Read the body of agent/service/register. Raises BadRegistration."""
    fields = plain_names(document)
    for field, value in fields.items():
        if field not in _IGNORED and value:
            raise BadRegistration(f"{field} is not supported by portd: leave it out")
    if fields.get("kind"):
        raise BadRegistration("Kind is not supported by portd: only plain services are")
    name = fields.get("name")
    if not isinstance(name, str) or not naming.label(name):
        raise BadRegistration("Name must be a non-empty string with a letter or digit")
    service_id = fields.get("id") or name
    port = fields.get("port")
    if not isinstance(port, int) or not 1 <= port <= 65535:
        raise BadRegistration("Port must be 1 to 65535: portd leases it")
    checks = [each for each in [fields.get("check"), *(fields.get("checks") or [])] if each]
    if len(checks) > 1:
        raise BadRegistration("Checks has more than one check: portd makes one for each service")
    metadata = {str(key): str(value) for key, value in (fields.get("meta") or {}).items()}
    metadata |= {naming.ID_KEY: str(service_id), naming.NAME_KEY: name}
    check: Check | None = None
    status: str | None = None
    if checks:
        check, more, status = read_check(checks[0], port)
        metadata |= more
    weights = plain_names(fields.get("weights") or {})
    body = {
        "service": naming.label(name),
        "instance": naming.label(str(service_id)) or naming.label(name),
        "port": port,
        "exact": True,
        "address": str(fields.get("address") or "127.0.0.1"),
        "tags": list(fields.get("tags") or []),
        "metadata": metadata,
        "check": check,
        "weight": int(weights.get("passing", 1)),
    }
    try:
        return Registration(msgspec.convert(body, LeaseRequest), status)
    except msgspec.ValidationError as error:
        raise BadRegistration(str(error)) from error


def read_check(document: Any, port: int) -> tuple[Check, dict[str, str], str | None]:
    """Read a check definition; returns the check, metadata that remembers its names, and its first status."""
    fields = plain_names(document)
    for field, value in fields.items():
        if field not in _CHECK_FIELDS and value:
            raise BadRegistration(f"{field} is not supported in a check by portd: use HTTP, TCP, GRPC or TTL")
    found = [kind for kind in _KINDS if fields.get(kind)]
    if len(found) != 1:
        raise BadRegistration("a check must have exactly one of HTTP, TCP, GRPC and TTL")
    body = _KINDS[found[0]](fields, port) | {"kind": {"ttl": "report"}.get(found[0], found[0])}
    for ours, theirs in (("interval", "interval"), ("timeout", "timeout")):
        if fields.get(theirs) and found[0] != "ttl":
            body[ours] = duration_s(fields[theirs], theirs.title())
    body["timeout"] = min(body.get("timeout", 10.0), body.get("interval", 10.0), 60.0)
    if fields.get("successbeforepassing"):
        body["rise"] = fields["successbeforepassing"]
    if fields.get("failuresbeforecritical"):
        body["fall"] = fields["failuresbeforecritical"]
    metadata = {}
    if check_id := fields.get("checkid") or fields.get("id"):
        metadata[naming.CHECK_ID_KEY] = str(check_id)
    if fields.get("name"):
        metadata[naming.CHECK_NAME_KEY] = str(fields["name"])
    if after := fields.get("deregistercriticalserviceafter"):
        seconds = max(duration_s(after, "DeregisterCriticalServiceAfter"), DEREGISTER_MIN_S)
        metadata[naming.DEREGISTER_KEY] = f"{seconds:g}"
    try:
        return msgspec.convert(body, Check), metadata, fields.get("status")
    except msgspec.ValidationError as error:
        raise BadRegistration(f"the check can't be made: {error}") from error


def _same_port(host_port: str, port: int, field: str) -> None:
    found = host_port.rpartition(":")[2]
    if not found.isdecimal() or int(found) != port:
        raise BadRegistration(f"{field} checks port {found or '?'}: portd checks the service's own port {port} alone")


def _http(fields: Mapping[str, Any], port: int) -> dict[str, Any]:
    url = urlsplit(str(fields["http"]))
    if url.scheme not in ("http", "https"):
        raise BadRegistration(f"HTTP {fields['http']!r} is not an http or https URL")
    _same_port(url.netloc if url.port else f"{url.netloc}:{443 if url.scheme == 'https' else 80}", port, "HTTP")
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    headers = {name: ", ".join(values) for name, values in (fields.get("header") or {}).items()}
    body: dict[str, Any] = {"path": path, "method": fields.get("method") or "GET", "headers": headers}
    if url.scheme == "https":
        body["tls"] = True
        body["tls_verify"] = not fields.get("tlsskipverify", False)
    if fields.get("tlsservername"):
        body["server_name"] = fields["tlsservername"]
    return body


def _tcp(fields: Mapping[str, Any], port: int) -> dict[str, Any]:
    _same_port(str(fields["tcp"]), port, "TCP")
    return {"tls": True} if fields.get("tcpusetls") else {}


def _grpc(fields: Mapping[str, Any], port: int) -> dict[str, Any]:
    target, _, service = str(fields["grpc"]).partition("/")
    _same_port(target, port, "GRPC")
    return {"service": service} | ({"tls": True} if fields.get("grpcusetls") else {})


def _ttl(fields: Mapping[str, Any], port: int) -> dict[str, Any]:
    return {"ttl": duration_s(fields["ttl"], "TTL")}


_KINDS: Final[dict[str, Callable[[Mapping[str, Any], int], dict[str, Any]]]] = {
    "http": _http,
    "tcp": _tcp,
    "grpc": _grpc,
    "ttl": _ttl,
}
