"""The OpenAPI 3.1 document, generated from the routes and from the very types that validate requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from portd import __version__
from portd.adapters.http.calls import Answer, Call, Route, encode
from portd.adapters.http.problems import PROBLEM_TYPE, STATUS, TITLE, Problem

_REF = "#/components/schemas/{name}"


def openapi_route(routes: Iterable[Route]) -> Route:
    """Make the route that serves the document of all `routes` and itself; rendered once."""
    rendered: list[bytes] = []

    async def show(call: Call) -> Answer:
        if not rendered:
            rendered.append(encode(document([*routes, route])))
        return Answer(rendered[0])

    route = Route("GET", "/openapi.json", show, "This document", {200: dict[str, Any]})
    return route


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """Make the document."""
    routes = list(routes)
    types = [Problem]
    for route in routes:
        types += [kind for kind in (route.body, *route.answers.values()) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = dict(zip(map(repr, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of, components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "portd",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "Leases ports to the processes of a host, and helps callers find the healthy ones.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {code: _refusal(code) for code in STATUS},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _operation(route: Route, schema_of: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler.__qualname__.replace("Calls.", "_").replace(".<locals>.", "_").lower(),
        "summary": route.summary,
        "responses": {str(status): _answer(route, status, kind, schema_of) for status, kind in route.answers.items()},
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _path_schema(name)}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    parameters += _query_parameters(route, components)
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {
            "required": route.body_required,
            "content": {"application/json": {"schema": schema_of[repr(route.body)]}},
        }
    codes = {"invalid_request", "forbidden_origin", "method_not_allowed", *route.refusals}
    if route.body is not None:
        codes |= {"too_large", "unsupported_media_type", "request_timeout"}
    if route.access == "known":
        codes.add("unauthenticated")
    by_status: dict[int, list[str]] = {}
    for code in sorted(codes):
        by_status.setdefault(STATUS[code], []).append(code)
    for status, same in by_status.items():
        if len(same) == 1:
            operation["responses"][str(status)] = {"$ref": f"#/components/responses/{same[0]}"}
        else:
            operation["responses"][str(status)] = _refusal(*same)
    return operation


def _path_schema(name: str) -> dict[str, Any]:
    if name == "port":
        return {"type": "integer", "minimum": 1, "maximum": 65535}
    return {"type": "string", "minLength": 1}


def _query_parameters(route: Route, components: dict[str, Any]) -> list[dict[str, Any]]:
    if route.query is None:
        return []
    (_,), found = msgspec.json.schema_components([route.query], ref_template=_REF)
    schema = found.pop(route.query.__name__)
    components.update(found)
    required = schema.get("required", ())
    return [
        {"name": name, "in": "query", "required": name in required, "schema": _without_null(field)}
        for name, field in schema["properties"].items()
    ]


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query has no null: a parameter is there or not."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1 and len(schema["anyOf"]) == 2:
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        return {**kinds[0], **rest}
    return schema


def _answer(route: Route, status: int, kind: Any, schema_of: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": {200: "Done", 201: "Granted", 204: "Done"}.get(status, "Not well")}
    if kind is not None:
        answer["content"] = {route.media_type: {"schema": schema_of[repr(kind)]}}
    if route.access != "anybody":
        answer["headers"] = {"X-Portd-Revision": {"schema": {"type": "integer"}, "description": "the newest revision"}}
    return answer


def _refusal(*codes: str) -> dict[str, Any]:
    return {
        "description": "; or: ".join(TITLE[code] for code in codes),
        "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
