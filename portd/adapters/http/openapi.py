"""The OpenAPI 3.1 document, generated from the routes and from the very types that validate requests.

Types give schemas, `openapi_texts` the words, `openapi_examples` the examples. Patterns are Python's in the types and
ECMA-262's in the document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from portd import __version__
from portd.adapters.http.calls import Answer, Call, Route, encode
from portd.adapters.http.openapi_examples import REQUESTS, TEXTS, VALUES, sample
from portd.adapters.http.openapi_texts import DESCRIPTIONS, OPERATIONS, RESPONSES, TAGS, Texts
from portd.adapters.http.problems import PROBLEM_TYPE, STATUS, TITLE, Problem

_REF: Final = "#/components/schemas/{name}"
_DETAILS: Final = {
    "revision": "The newest revision of what the answer shows; long polls and event streams begin after it.",
    "store": "The random id of the store that the revision is of.",
    "retry": "Seconds after which the same request may succeed, where that is known.",
    "authenticate": "How to authenticate (RFC 6750).",
    "allow": "The methods of the path.",
}
_RETRYABLE: Final = frozenset(
    {"port_taken", "quota_exceeded", "pool_exhausted", "busy", "store_unavailable", "port_reserved"}
)
"""Refusals that may know when the same request succeeds."""


class ApiDocument(msgspec.Struct, frozen=True):
    """An OpenAPI 3.1 document."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]


def openapi_route(routes: Iterable[Route]) -> Route:
    """Make the route that serves the document of all `routes` and itself; rendered once."""
    rendered: list[bytes] = []

    async def show(call: Call) -> Answer:
        if not rendered:
            rendered.append(encode(document([*routes, route])))
        return Answer(rendered[0])

    route = Route("GET", "/openapi.json", show, "Show this document", {200: ApiDocument})
    return route


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """Make the document."""
    routes = list(routes)
    types = [Problem]
    for route in routes:
        types += [kind for kind in (route.body, *route.answers.values()) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = dict(zip(map(repr, types), map(_portable, schemas), strict=True))
    components = {name: _described(name, _portable(schema)) for name, schema in components.items()}
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
        "servers": [{"url": "http://127.0.0.1:7783", "description": "The system daemon, over loopback TCP."}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {code: _refusal(code) for code in STATUS},
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A lease's token, or a token of the configuration. Local callers need none: the "
                    "kernel identifies them.",
                }
            },
        },
        "security": [{}, {"token": []}],
    }


def _operation(route: Route, schema_of: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    texts = _texts(route)
    operation: dict[str, Any] = {
        "operationId": texts.id,
        "tags": [texts.tag],
        "summary": route.summary,
        "description": texts.description,
        "responses": {
            str(status): _answer(route, status, kind, schema_of, components) for status, kind in route.answers.items()
        },
    }
    if parameters := [*_path_parameters(route), *_query_parameters(route, components), *_header_parameters(route)]:
        operation["parameters"] = parameters
    if route.body is not None:
        content: dict[str, Any] = {"schema": schema_of[repr(route.body)]}
        if (example := REQUESTS.get((route.method, route.path))) is not None:
            content["example"] = example
        operation["requestBody"] = {"required": route.body_required, "content": {"application/json": content}}
    by_status: dict[int, list[str]] = {}
    for code in sorted(_codes(route)):
        by_status.setdefault(STATUS[code], []).append(code)
    for status, codes in by_status.items():
        if str(status) in operation["responses"]:
            continue  # the route's own answer has this status
        operation["responses"][str(status)] = (
            {"$ref": f"#/components/responses/{codes[0]}"} if len(codes) == 1 else _refusal(*codes)
        )
    return operation


def _texts(route: Route) -> Texts:
    """Return the words of an operation; one that has none is named after its method and path."""
    if known := OPERATIONS.get((route.method, route.path)):
        return known
    words = re.findall(r"[a-z0-9]+", route.path.removeprefix("/v1"))
    return Texts("_".join([route.method.lower(), *words]), "daemon", f"{route.summary}.")


def _codes(route: Route) -> set[str]:
    """Return the codes of every refusal that an operation may be answered with."""
    codes = {"invalid_request", "forbidden_origin", "method_not_allowed", "internal_error", *route.refusals}
    if route.body is not None:
        codes |= {"too_large", "unsupported_media_type", "request_timeout"}
    if route.access != "anybody":
        codes.add("unauthenticated")
    if route.method == "GET":
        codes.add("busy")
    return codes


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": DESCRIPTIONS[name],
            "schema": {"type": "integer", "minimum": 1, "maximum": 65535} if name == "port" else _NOT_EMPTY,
            "example": VALUES[name],
        }
        for name in re.findall(r"{(\w+)}", route.path)
    ]


_NOT_EMPTY: Final = {"type": "string", "minLength": 1}


def _query_parameters(route: Route, components: dict[str, Any]) -> list[dict[str, Any]]:
    if route.query is None:
        return []
    (_,), found = msgspec.json.schema_components([route.query], ref_template=_REF)
    name = route.query.__name__
    schema = _described(name, _portable(found.pop(name)))
    components.update({other: _described(other, _portable(part)) for other, part in found.items()})
    required = schema.get("required", ())
    parameters = []
    for field, part in schema["properties"].items():
        bare = {key: value for key, value in _without_null(part).items() if key != "description"}
        description = part.get("description") or _without_null(part).get("description", "")
        parameters.append(
            {"name": field, "in": "query", "required": field in required, "description": description, "schema": bare}
        )
    return parameters


def _header_parameters(route: Route) -> list[dict[str, Any]]:
    if route.media_type != "text/event-stream":
        return []
    return [
        {
            "name": "Last-Event-ID",
            "in": "header",
            "required": False,
            "description": DESCRIPTIONS["Last-Event-ID"],
            "schema": {"type": "string", "maxLength": 64},
        }
    ]


def _answer(
    route: Route, status: int, kind: Any, schema_of: dict[str, Any], components: dict[str, Any]
) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": RESPONSES[status]}
    if kind is not None:
        schema = schema_of[repr(kind)]
        media = {"schema": schema, "example": TEXTS.get(route.media_type) or sample(schema, components)}
        answer["content"] = {route.media_type: media}
    answer["headers"] = {
        "X-Portd-Revision": {"schema": {"type": "integer"}, "description": _DETAILS["revision"]},
        "X-Portd-Store": {"schema": {"type": "string"}, "description": _DETAILS["store"]},
    }
    return answer


def _refusal(*codes: str) -> dict[str, Any]:
    content = {"schema": {"$ref": "#/components/schemas/Problem"}, "example": _problem_example(codes[0])}
    refusal: dict[str, Any] = {
        "description": "; or: ".join(f"{TITLE[code]} (`{code}`)" for code in codes),
        "content": {PROBLEM_TYPE: content},
    }
    headers = {}
    if _RETRYABLE.intersection(codes):
        headers["Retry-After"] = {"schema": {"type": "integer"}, "description": _DETAILS["retry"]}
    if "unauthenticated" in codes:
        headers["WWW-Authenticate"] = {"schema": {"type": "string"}, "description": _DETAILS["authenticate"]}
    if "method_not_allowed" in codes:
        headers["Allow"] = {"schema": {"type": "string"}, "description": _DETAILS["allow"]}
    if headers:
        refusal["headers"] = headers
    return refusal


def _problem_example(code: str) -> dict[str, Any]:
    return {
        "type": f"urn:portd:problem:{code}",
        "title": TITLE[code],
        "status": STATUS[code],
        "detail": "what failed, on which value, and what to do",
        "code": code,
    }


def _described(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Give every property of a component its description: its own, else by its name."""
    properties = {
        field: part
        if "description" in part or (text := DESCRIPTIONS.get(f"{name}.{field}") or DESCRIPTIONS.get(field)) is None
        else {**part, "description": text}
        for field, part in schema.get("properties", {}).items()
    }
    return {**schema, "properties": properties} if properties else schema


def _portable(schema: Any) -> Any:
    r"""Rewrite Python's patterns as ECMA-262's: `\Z`, the end of the text, is `$` there (without the `m` flag)."""
    if isinstance(schema, list):
        return [_portable(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.replace(r"\Z", "$") if key == "pattern" and isinstance(value, str) else _portable(value)
        for key, value in schema.items()
    }


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query has no null: a parameter is there or not."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1 and len(schema["anyOf"]) == 2:
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        return {**kinds[0], **rest}
    return schema
