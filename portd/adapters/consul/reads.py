"""The reading half: catalog, health and agent. Unknown query parameters are ignored, as Consul does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec
from aiohttp import web

from portd.adapters.consul import naming, shapes
from portd.adapters.consul.answers import Answer, Answers, Key
from portd.adapters.consul.registering import BadRegistration, duration_s
from portd.adapters.consul.shapes import Instance, Node
from portd.core.model import Lease
from portd.leasing.queries import LeaseQueries

WAIT_DEFAULT_S: Final = 300.0
WAIT_MAX_S: Final = 600.0
"""Consul's default and longest wait of a blocking query."""
_STATUS: Final = {"passing": 200, "warning": 429, "critical": 503, "maintenance": 503}


class Reads:
    """Handlers of the GET half. `node_of` says which node a request sees, by the address that it reached."""

    def __init__(self, queries: LeaseQueries, answers: Answers, node_of: Callable[[web.Request], Node]) -> None:
        self._queries = queries
        self._answers = answers
        self._node_of = node_of

    def routes(self) -> list[tuple[str, Callable[[web.Request], Any]]]:
        """Return path and handler of each call."""
        return [
            ("/v1/agent/self", self._agent_self),
            ("/v1/agent/members", self._members),
            ("/v1/agent/services", self._agent_services),
            ("/v1/agent/service/{id}", self._agent_service),
            ("/v1/agent/checks", self._agent_checks),
            ("/v1/agent/health/service/id/{id}", self._health_by_id),
            ("/v1/agent/health/service/name/{name}", self._health_by_name),
            ("/v1/catalog/datacenters", self._datacenters),
            ("/v1/catalog/services", self._catalog_services),
            ("/v1/catalog/service/{name}", self._catalog_service),
            ("/v1/catalog/nodes", self._catalog_nodes),
            ("/v1/catalog/node/{node}", self._catalog_node),
            ("/v1/health/service/{name}", self._health_service),
            ("/v1/health/checks/{name}", self._health_checks),
            ("/v1/health/state/{state}", self._health_state),
            ("/v1/health/node/{node}", self._health_node),
            ("/v1/status/leader", self._leader),
            ("/v1/status/peers", self._peers),
            ("/v1/kv/{key:.*}", self._kv),
        ]

    # --- what there is ---

    def all(self) -> list[Instance]:
        """Return every lease with whether it serves, ordered by name."""
        return [each for service in sorted(self._queries.services()) for each in self._of_service(service)]

    def named(self, name: str) -> list[Instance]:
        """Return the instances of a Consul service."""
        return [each for each in self.all() if naming.service_name(each.lease) == name]

    def by_id(self, service_id: str) -> Instance | None:
        """Return the instance with this Consul service id, or None."""
        return next((each for each in self.all() if naming.service_id(each.lease) == service_id), None)

    def _of_service(self, service: str) -> list[Instance]:
        return shapes.instances(self._queries.of_service(service))

    # --- agent ---

    async def _agent_self(self, request: web.Request) -> web.Response:
        return self._plain(shapes.self_document(self._node_of(request)))

    async def _members(self, request: web.Request) -> web.Response:
        return self._plain([shapes.member_document(self._node_of(request))])

    async def _agent_services(self, request: web.Request) -> web.Response:
        return self._plain({naming.service_id(each.lease): shapes.service_document(each.lease) for each in self.all()})

    async def _agent_service(self, request: web.Request) -> web.StreamResponse:
        service_id = request.match_info["id"]
        if self.by_id(service_id) is None:
            raise web.HTTPNotFound(text=f"unknown service ID: {service_id}")

        def make() -> Any:
            found = self.by_id(service_id)
            return None if found is None else shapes.service_document(found.lease)

        key = Key(f"agent/service/{service_id}", None)
        known = request.query.get("hash", "")
        answer = self._answers.get(key, make)
        if known == _content_hash(answer):
            answer = await self._answers.wait(key, make, answer.at, _wait_s(request))
        if answer.body == b"null":
            raise web.HTTPNotFound(text=f"unknown service ID: {service_id}")
        return _send(answer, {"X-Consul-ContentHash": _content_hash(answer)})

    async def _agent_checks(self, request: web.Request) -> web.Response:
        node = self._node_of(request)
        checks = [check for each in self.all() for check in shapes.check_documents(node, each)]
        return self._plain({check["CheckID"]: check for check in checks})

    async def _health_by_id(self, request: web.Request) -> web.Response:
        service_id = request.match_info["id"]
        found = self.by_id(service_id)
        if found is None:
            return self._health(request, {"AggregatedStatus": "critical", "Service": None}, 404)
        document = self._agent_health(request, found)
        return self._health(request, document, _STATUS[document["AggregatedStatus"]])

    async def _health_by_name(self, request: web.Request) -> web.Response:
        documents = [self._agent_health(request, each) for each in self.named(request.match_info["name"])]
        status = max((_STATUS[document["AggregatedStatus"]] for document in documents), default=404)
        return self._health(request, documents, status)

    def _agent_health(self, request: web.Request, instance: Instance) -> dict[str, Any]:
        checks = shapes.check_documents(self._node_of(request), instance)
        return {
            "AggregatedStatus": shapes.aggregated(checks),
            "Service": shapes.service_document(instance.lease),
            "Checks": checks,
        }

    def _health(self, request: web.Request, document: Any, status: int) -> web.Response:
        if request.query.get("format") == "text":
            words = {200: "passing", 429: "warning", 503: "critical", 404: "not found"}
            return web.Response(status=status, text=words[status])
        return self._plain(document, status)

    # --- catalog ---

    async def _datacenters(self, request: web.Request) -> web.Response:
        return self._plain([shapes.DATACENTER])

    async def _catalog_services(self, request: web.Request) -> web.StreamResponse:
        def make() -> Any:
            tags: dict[str, dict[str, None]] = {}
            for each in self.all():
                tags.setdefault(naming.service_name(each.lease), {}).update(dict.fromkeys(each.lease.tags))
            return {name: list(found) for name, found in sorted(tags.items())}

        return await self._blocking(request, "catalog/services", None, make)

    async def _catalog_service(self, request: web.Request) -> web.StreamResponse:
        name, node, tags = request.match_info["name"], self._node_of(request), _tags(request)

        def make() -> Any:
            return [
                shapes.catalog_document(node, each.lease) for each in self.named(name) if _has_tags(each.lease, tags)
            ]

        return await self._blocking(request, f"catalog/service/{name}?{node.address}&{tags}", name, make)

    async def _catalog_nodes(self, request: web.Request) -> web.StreamResponse:
        node = self._node_of(request)
        return await self._blocking(request, f"catalog/nodes?{node.address}", "", lambda: [shapes.node_document(node)])

    async def _catalog_node(self, request: web.Request) -> web.StreamResponse:
        node = self._node_of(request)
        if request.match_info["node"] != node.name:
            return self._plain(None)

        def make() -> Any:
            services = {naming.service_id(each.lease): shapes.service_document(each.lease) for each in self.all()}
            return {"Node": shapes.node_document(node), "Services": services}

        return await self._blocking(request, f"catalog/node?{node.address}", None, make)

    # --- health ---

    async def _health_service(self, request: web.Request) -> web.StreamResponse:
        name, node, tags = request.match_info["name"], self._node_of(request), _tags(request)
        passing = _is_set(request, "passing")

        def make() -> Any:
            documents = [shapes.health_document(node, each) for each in self.named(name) if _has_tags(each.lease, tags)]
            return [each for each in documents if not passing or shapes.aggregated(each["Checks"]) == "passing"]

        return await self._blocking(request, f"health/service/{name}?{node.address}&{tags}&{passing}", name, make)

    async def _health_checks(self, request: web.Request) -> web.StreamResponse:
        name, node = request.match_info["name"], self._node_of(request)

        def make() -> Any:
            return [check for each in self.named(name) for check in shapes.check_documents(node, each)]

        return await self._blocking(request, f"health/checks/{name}", name, make)

    async def _health_state(self, request: web.Request) -> web.StreamResponse:
        state, node = request.match_info["state"], self._node_of(request)
        if state not in ("any", "passing", "warning", "critical"):
            raise web.HTTPBadRequest(text=f"{state!r} is not any, passing, warning or critical")

        def make() -> Any:
            return [check for check in self._all_checks(node) if state in ("any", check["Status"])]

        return await self._blocking(request, f"health/state/{state}", None, make)

    async def _health_node(self, request: web.Request) -> web.StreamResponse:
        node = self._node_of(request)
        is_own = request.match_info["node"] == node.name
        return await self._blocking(
            request, f"health/node/{is_own}", None, lambda: self._all_checks(node) if is_own else []
        )

    def _all_checks(self, node: Node) -> list[dict[str, Any]]:
        return [
            shapes.node_check_document(node),
            *(check for each in self.all() for check in shapes.check_documents(node, each)),
        ]

    # --- the rest ---

    async def _leader(self, request: web.Request) -> web.Response:
        return self._plain(f"127.0.0.1:{shapes.SERVER_PORT}")

    async def _peers(self, request: web.Request) -> web.Response:
        return self._plain([f"127.0.0.1:{shapes.SERVER_PORT}"])

    async def _kv(self, request: web.Request) -> web.StreamResponse:
        """There are no keys: 404 with an index that never changes, after the wait that was asked for."""
        key = Key("kv", "")
        answer = await self._answers.wait(key, lambda: None, _index(request), _wait_s(request))
        return web.Response(status=404, headers=_headers(answer.at))

    # --- answering ---

    def _plain(self, document: Any, status: int = 200) -> web.Response:
        body = msgspec.json.encode(document)
        return web.Response(status=status, body=body, content_type="application/json", headers=_headers(1))

    async def _blocking(
        self, request: web.Request, name: str, service: str | None, make: Callable[[], Any]
    ) -> web.Response:
        if request.query.get("filter"):
            raise web.HTTPBadRequest(text="filter is not supported by portd: select by tag, or in the client")
        answer = await self._answers.wait(Key(name, service), make, _index(request), _wait_s(request))
        return _send(answer)


def _send(answer: Answer, headers: Mapping[str, str] = {}) -> web.Response:
    return web.Response(body=answer.body, content_type="application/json", headers={**_headers(answer.at), **headers})


def _headers(index: int) -> dict[str, str]:
    return {
        "X-Consul-Index": str(index),
        "X-Consul-KnownLeader": "true",
        "X-Consul-LastContact": "0",
        "X-Consul-Effective-Consistency": "leader",
    }


def _index(request: web.Request) -> int:
    text = request.query.get("index", "0") or "0"
    if not text.isdecimal():
        raise web.HTTPBadRequest(text=f"Invalid index: {text!r}")
    return int(text)


def _wait_s(request: web.Request) -> float:
    text = request.query.get("wait", "")
    if not text:
        return WAIT_DEFAULT_S
    try:
        return min(duration_s(text, "wait"), WAIT_MAX_S)
    except BadRegistration as error:
        raise web.HTTPBadRequest(text=f"Invalid wait time: {error}") from None


def _tags(request: web.Request) -> tuple[str, ...]:
    return tuple(sorted(request.query.getall("tag", [])))


def _has_tags(lease: Lease, tags: Iterable[str]) -> bool:
    return all(tag in lease.tags for tag in tags)


def _is_set(request: web.Request, name: str) -> bool:
    """Read a flag as Consul does: present means yes, unless it says no."""
    return name in request.query and request.query[name].lower() not in ("false", "0")


def _content_hash(answer: Answer) -> str:
    return f"{hash(answer.body) & 0xFFFFFFFFFFFFFFFF:016x}"
