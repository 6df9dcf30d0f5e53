"""What is granted: preferred and exact ports, static ones, arrays, addresses; and never the same twice."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import Daemon, Reply, is_bindable, listen_on, owner, unique

EVERYWHERE = ("127.0.0.1", "0.0.0.0", "::", "::1", "127.0.0.2")
PAIRS = [(first, second) for first in EVERYWHERE for second in EVERYWHERE]
APART = {
    frozenset(pair)
    for pair in (("127.0.0.1", "::1"), ("0.0.0.0", "::1"), ("127.0.0.1", "127.0.0.2"), ("127.0.0.2", "::1"))
}
"""Addresses on which one port number can be two leases: the kernel lets both be bound (dual stack `::` none)."""


LEASE_FIELDS = {
    "id",
    "service",
    "instance",
    "endpoint",
    "protocol",
    "address",
    "port",
    "listening",
    "vouched_by",
    "elsewhere",
    "pool",
    "hold",
    "state",
    "health",
    "health_note",
    "health_since",
    "checked_at",
    "drain",
    "lifetime",
    "owner",
    "uid",
    "tags",
    "metadata",
    "weight",
    "priority",
    "check",
    "announce",
    "host",
    "created_at",
    "renewed_at",
    "expires_at",
    "ended_at",
    "ended_because",
    "revision",
}
"""The fields of a lease in the contract."""


@pytest.fixture(autouse=True)
def _leave_nothing(daemon: Daemon) -> Iterator[None]:
    """Release everything after each test."""
    yield
    for lease_id in daemon.leases():
        daemon.call("DELETE", f"/v1/leases/{lease_id}")


def refused(daemon: Daemon, body: Any) -> tuple[int, str | None, str | None]:
    """Ask for a lease that must be refused; returns status, code and pointer."""
    reply = daemon.call("POST", "/v1/leases", body)
    assert reply.status >= 400, reply
    return reply.status, reply.code, reply.body.get("pointer")


def test_a_grant_says_all_that_the_contract_promises(daemon: Daemon) -> None:
    lease = daemon.lease("whole")
    assert lease.keys() == {*LEASE_FIELDS, "token"}
    assert lease["owner"].keys() == {"pid", "uid", "user", "exe", "cmdline", "unit", "started_at", "known_by"}
    assert (
        lease["instance"],
        lease["endpoint"],
        lease["protocol"],
        lease["address"],
        lease["hold"],
        lease["state"],
        lease["health"],
        lease["drain"],
        lease["lifetime"],
    ) == ("whole-1", "main", "tcp", "127.0.0.1", "shared", "held", "unknown", False, "process")
    assert daemon.first_port <= lease["port"] <= daemon.last_port


def test_requested_port_is_granted_or_replaced_unless_exact(daemon: Daemon) -> None:
    requested = daemon.first_port + 50
    assert daemon.lease("requested", port=requested)["port"] == requested
    assert daemon.lease("requested", port=requested)["port"] != requested
    assert refused(daemon, {"service": "requested", "port": requested, "exact": True}) == (409, "port_taken", "/port")
    outside = next(port for port in range(5000, 6000) if is_bindable(port))
    assert daemon.lease("requested", port=outside, exact=True)["port"] == outside
    with listen_on(outside + 1):
        assert refused(daemon, {"service": "requested", "port": outside + 1, "exact": True}) == (
            409,
            "port_taken",
            "/port",
        )


def test_the_longest_unused_port_is_given(make_daemon: MakeDaemon) -> None:
    small = make_daemon(port_count=4)
    small.configure("[leases]\ncooldown = 0")
    small.start()
    order = []
    for _ in range(8):
        lease = small.lease("turn", ttl=60, instance=f"turn-{len(order)}")
        order.append(lease["port"])
        small.call("DELETE", f"/v1/leases/{lease['id']}")
    assert order[:4] == order[4:]
    assert unique(order[:4])


def test_an_array_is_granted_whole_or_not_at_all(daemon: Daemon) -> None:
    good = daemon.call(
        "POST",
        "/v1/leases",
        [
            {"service": "set"},
            {"service": "set", "endpoint": "metrics"},
            {"service": "set", "protocol": "udp", "endpoint": "dns"},
        ],
    )
    assert (good.status, {lease["instance"] for lease in good.body}) == (201, {"set-1"}), "endpoints gather"
    assert unique(lease["token"] for lease in good.body)
    before = daemon.get("/v1/status")["pools"]
    taken = good.body[0]["port"]
    for bad, said in (
        ({"service": "Set"}, (400, "invalid_request", "/2/service")),
        ({"service": "x", "port": taken, "exact": True}, (409, "port_taken", "/2/port")),
        ({"service": "x", "pool": "nowhere"}, (400, "invalid_request", "/2/pool")),
    ):
        assert refused(daemon, [{"service": "x"}, {"service": "x"}, bad]) == said
    assert daemon.leases().keys() == {lease["id"] for lease in good.body}
    assert daemon.get("/v1/status")["pools"] == before


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_port_number_is_shared_only_where_bindings_do_not_conflict(daemon: Daemon, first: str, second: str) -> None:
    port = daemon.first_port + 51 + PAIRS.index((first, second))  # one that is not cooling after another pair
    lease = daemon.lease("overlap", address=first, port=port, exact=True)
    reply = daemon.call(
        "POST", "/v1/leases", {"service": "overlap", "address": second, "port": lease["port"], "exact": True}
    )
    assert reply.status == (201 if frozenset((first, second)) in APART else 409), reply
    other = daemon.call(
        "POST",
        "/v1/leases",
        {"service": "overlap", "address": second, "port": lease["port"], "exact": True, "protocol": "udp"},
    )
    assert other.status == 201, "udp is another matter"
    both = {"service": "overlap", "address": first, "port": lease["port"], "exact": True, "protocol": "both"}
    assert refused(daemon, both)[:2] == (409, "port_taken")


def test_own_address_is_shared_by_one_instances_endpoints_alone(daemon: Daemon) -> None:
    main = daemon.lease("own", address="own", port=80)
    admin = daemon.lease("own", instance=main["instance"], endpoint="admin", address="own", port=8080)
    other = daemon.lease("own", address="own", port=80)
    assert main["address"] == admin["address"] != other["address"]
    assert (main["port"], admin["port"], other["port"]) == (80, 8080, 80)
    assert main["address"].startswith("127.77.")
    assert not is_bindable(80, main["address"])


def test_a_static_port_is_one_services_for_good(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    port = daemon.first_port
    daemon.configure(f"[static.api]\nport = {port}")
    daemon.start()
    assert daemon.verdict(port) == "static"
    assert refused(daemon, {"service": "other", "port": port, "exact": True})[:2] == (409, "port_reserved")
    assert daemon.lease("other", port=port)["port"] != port
    lease = daemon.lease("api")
    assert (lease["port"], lease["lifetime"]) == (port, "static")
    assert refused(daemon, f"{lease['id']}") == (400, "invalid_request", "")
    declined = daemon.call("POST", f"/v1/leases/{lease['id']}/decline")
    assert (declined.status, declined.code) == (409, "not_declinable")


def test_declined_port_is_on_probation_and_lease_goes_on_elsewhere(daemon: Daemon) -> None:
    lease = daemon.lease("moved")
    moved = daemon.call("POST", f"/v1/leases/{lease['id']}/decline").body
    assert (moved["id"], moved["state"]) == (lease["id"], "held")
    assert moved["port"] != lease["port"]
    assert daemon.verdict(lease["port"]) == "declined"
    assert not is_bindable(moved["port"])
    assert is_bindable(lease["port"])
    (stint,) = daemon.get(f"/v1/ports/{lease['port']}/history?at={lease['created_at']}")["leases"]
    assert (stint["id"], stint["port"], stint["state"]) == (lease["id"], lease["port"], "ended")
    assert (stint["ended_because"], stint["ended_at"] > lease["created_at"]) == (None, True)
    assert daemon.get(f"/v1/ports/{moved['port']}/history?at={lease['created_at']}")["leases"] == []
    assert daemon.get(f"/v1/ports/{moved['port']}/history?at={stint['ended_at']}")["leases"] == [moved]
    exact = daemon.lease("moved", port=daemon.last_port, exact=True)
    assert daemon.call("POST", f"/v1/leases/{exact['id']}/decline").code == "not_declinable"


def test_a_hundred_callers_at_once_get_a_hundred_ports(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(port_count=100).start()
    with ThreadPoolExecutor(20) as crowd:
        replies = list(
            crowd.map(
                lambda n: daemon.call(
                    "POST", "/v1/leases", {"service": "crowd", "ttl": 600}, over="tcp" if n % 2 else "unix"
                ),
                range(120),
            )
        )
    granted = [reply.body for reply in replies if reply.status == 201]
    assert len(granted) == 100
    assert {reply.code for reply in replies} == {None, "pool_exhausted"}
    assert unique(lease["port"] for lease in granted)
    assert unique(lease["instance"] for lease in granted)
    daemon.restart(signal.SIGKILL)
    assert daemon.leases().keys() == {lease["id"] for lease in granted}


def test_a_listing_goes_by_pages_and_filters(daemon: Daemon) -> None:
    for n in range(7):
        daemon.lease("paged", tags=[f"t{n % 2}", "all"], ttl=60, endpoint="main" if n % 3 else "other")
    seen, cursor = [], ""
    while True:
        page = daemon.get(f"/v1/leases?service=paged&limit=3{cursor}")
        seen += page["leases"]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert len(seen) == 7
    assert unique(lease["id"] for lease in seen)
    one = seen[0]
    for query, count in (
        ("tag=t0", 4),
        ("tag=t0&tag=t1", 0),
        ("tag=all", 7),
        ("endpoint=other", 3),
        ("state=held", 7),
        ("state=bound", 0),
        (f"port={one['port']}", 1),
        ("uid=0", 7),
        ("uid=1", 0),
        ("pid=1", 0),
        (f"instance={one['instance']}&endpoint={one['endpoint']}", 1),
        ("health=unknown", 7),
        ("protocol=udp", 0),
        ("pool=default", 7),
        ("state=ended", 0),
    ):
        assert len(daemon.get(f"/v1/leases?service=paged&{query}")["leases"]) == count, query


def test_history_says_who_had_a_port_and_when(daemon: Daemon) -> None:
    port = daemon.first_port + 90
    leases = []
    for _ in range(5):
        leases.insert(0, daemon.lease("early", port=port, exact=True, instance="early-a"))
        daemon.call("DELETE", f"/v1/leases/{leases[0]['id']}")
    leases.insert(0, daemon.lease("early", port=port, exact=True, instance="early-a"))
    history = daemon.get(f"/v1/ports/{port}/history")["leases"]
    assert [lease["id"] for lease in history] == [lease["id"] for lease in leases]
    assert [lease["ended_because"] for lease in history] == [None, *["released"] * 5]
    for lease in history:
        then = daemon.get(f"/v1/ports/{port}/history?at={lease['created_at']}")["leases"]
        assert [one["id"] for one in then] == [lease["id"]]
    ended = daemon.get("/v1/leases?state=ended&service=early")["leases"]
    assert {lease["id"] for lease in ended} == {lease["id"] for lease in leases[1:]}


def test_grant_waits_for_its_exact_port(daemon: Daemon) -> None:
    with socket.socket() as foreign:
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        foreign.bind(("127.0.0.1", daemon.first_port))
        foreign.listen()
        body = {"service": "patient", "port": daemon.first_port, "exact": True, "ttl": 60}
        assert daemon.call("POST", "/v1/leases?wait=0.1", body).code == "port_taken"
        replies: list[Reply] = []
        thread = threading.Thread(target=lambda: replies.append(daemon.call("POST", "/v1/leases?wait=20", body)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()
    assert [(reply.status, reply.body["port"]) for reply in replies] == [(201, daemon.first_port)]


def test_grant_with_another_owners_instance_does_not_wait(daemon: Daemon) -> None:
    daemon.lease("named", instance="named-1", ttl=60)
    with owner() as process:
        reply = daemon.call(
            "POST", "/v1/leases?wait=600", {"service": "named", "instance": "named-1", "pid": process.pid}
        )
    assert (reply.status, reply.body.get("pointer")) == (409, "/instance")
