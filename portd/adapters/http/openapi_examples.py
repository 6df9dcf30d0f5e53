"""Examples of the OpenAPI document: bodies of requests, and answers that are put together from a value for each name.

Answers follow the schemas, so an example is never out of date with its type.
"""

from __future__ import annotations

from typing import Any, Final

_LEASE_PATH: Final = "/v1/leases/{id}"

REQUESTS: Final[dict[tuple[str, str], Any]] = {
    ("POST", "/v1/leases"): {
        "service": "orders",
        "tags": ["blue"],
        "metadata": {"version": "1.4.2"},
        "check": {"kind": "http", "path": "/healthz"},
    },
    ("PATCH", _LEASE_PATH): {"tags": ["green"], "announce": None},
    ("POST", f"{_LEASE_PATH}/renew"): {"seconds": 60},
    ("POST", f"{_LEASE_PATH}/drain"): {"drain": True},
    ("POST", f"{_LEASE_PATH}/transfer"): {"pid": 4712},
    ("PUT", f"{_LEASE_PATH}/health"): {"status": "warning", "note": "the queue is long"},
}
"""Bodies of requests, by method and path."""

VALUES: Final[dict[str, Any]] = {
    "id": "01a2270bf5f0bb1ac66a6097",
    "service": "orders",
    "instance": "orders-1",
    "endpoint": "main",
    "name": "orders",
    "address": "127.0.0.1",
    "port": 20000,
    "pool": "default",
    "listening": ["127.0.0.1"],
    "elsewhere": [],
    "vouched_by": "owner",
    "state": "bound",
    "verdict": "bound",
    "health": "passing",
    "health_note": "200 OK",
    "health_since": "2026-01-01T12:00:02Z",
    "checked_at": "2026-01-01T12:00:12Z",
    "pid": 4711,
    "uid": 1000,
    "user": "alice",
    "users": ["alice"],
    "exe": "/usr/bin/node",
    "cmdline": ["node", "orders.js"],
    "unit": "orders.service",
    "tags": ["blue"],
    "metadata": {"version": "1.4.2"},
    "check": {"kind": "http", "path": "/healthz"},
    "host": "workshop",
    "created_at": "2026-01-01T12:00:00Z",
    "started_at": "2026-01-01T11:59:59Z",
    "at": "2026-01-01T12:00:02Z",
    "revision": 44,
    "token": "MkfmxwFatDr4FHC3ALrHh7UuQGEj3kKz",
    "type": "_http._tcp",
    "addresses": ["192.0.2.10"],
    "txt": {"service": "orders"},
    "targets": ["127.0.0.1:20000"],
    "labels": {"__meta_portd_service": "orders"},
    "version": "0.2.0",
    "path": "/var/lib/portd/portd.db",
    "status": "ok",
    "reasons": ["store: the disk is full"],
    "warnings": [],
    "openapi": "3.1.0",
    "info": {"title": "portd", "version": "0.2.0"},
    "counts": {"leases": 12, "services": 3},
}
"""An example of each property of answers, by name; without one, null or the least that the schema allows is shown."""

TEXTS: Final = {
    "text/event-stream": 'id: 44\nevent: bound\ndata: {"revision": 44, "type": "bound", "service": "orders"}\n\n',
    "text/plain": '# TYPE portd_leases gauge\nportd_leases{state="bound"} 12.0\n',
    "text/html": "<!doctype html>",
}
"""Answers that are not JSON, by media type."""


def sample(schema: dict[str, Any], components: dict[str, Any], name: str = "") -> Any:
    """Make an example of a schema; `name` is that of the property which has it."""
    if "$ref" in schema:
        return sample(components[schema["$ref"].rpartition("/")[2]], components, name)
    if "const" in schema:
        return schema["const"]
    value = VALUES.get(name)
    if value is not None and _allows(schema, components, value):
        return value
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return None if {"type": "null"} in choices else sample(choices[0], components, name)
    if "enum" in schema:
        return schema["enum"][0]
    return _least(schema, components)


def _least(schema: dict[str, Any], components: dict[str, Any]) -> Any:
    kind = schema.get("type")
    if kind == "object":
        example = {key: sample(part, components, key) for key, part in schema.get("properties", {}).items()}
        if not example and isinstance(schema.get("additionalProperties"), dict):
            example = {"default": sample(schema["additionalProperties"], components)}
        return example
    if kind == "array":
        return [sample(schema["items"], components)] if "items" in schema else []
    if kind in ("integer", "number"):
        return schema.get("minimum", 0)
    if kind == "string":
        return "2026-01-01T12:00:00Z" if schema.get("format") == "date-time" else ""
    return False if kind == "boolean" else None


def _allows(schema: dict[str, Any], components: dict[str, Any], value: Any) -> bool:
    """Return whether a schema allows a value, as far as its type and enumeration say."""
    if "$ref" in schema:
        return _allows(components[schema["$ref"].rpartition("/")[2]], components, value)
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return any(_allows(choice, components, value) for choice in choices)
    if "enum" in schema:
        return value in schema["enum"]
    kinds = {"string": str, "integer": int, "number": int | float, "boolean": bool, "array": list, "object": dict}
    wanted = kinds.get(schema.get("type", ""))
    if wanted is None or not isinstance(value, wanted):
        return False
    if isinstance(value, list):
        return all(_allows(schema.get("items", {}), components, item) for item in value)
    return not isinstance(value, dict) or set(schema.get("required", ())) <= value.keys()
