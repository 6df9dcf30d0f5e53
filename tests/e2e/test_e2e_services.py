"""Callers are given the instances that serve: over HTTP, in every filter and every way of waiting."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import Daemon, listen_on, wait_for

REPORT = {"kind": "report", "ttl": 600}


@contextlib.contextmanager
def instance(daemon: Daemon, service: str, health: str | None = None, **fields: Any) -> Iterator[Any]:
    """Lease for this process and listen; with a health, the lease has a check and reports it."""
    lease = daemon.lease(service, **(fields if health is None else {"check": REPORT, **fields}))
    with listen_on(lease["port"], lease["address"]):
        daemon.wait_state(lease["id"], "bound")
        if health:
            report(daemon, lease, health)
        yield lease


def report(daemon: Daemon, lease: Any, health: str, note: str = "") -> None:
    reply = daemon.call("PUT", f"/v1/leases/{lease['id']}/health", {"status": health, "note": note})
    assert reply.status == 200, reply


def names(daemon: Daemon, service: str, query: str = "") -> set[str]:
    return {one["instance"] for one in daemon.get(f"/v1/services/{service}?{query}")["instances"]}


def test_each_instance_counts_for_itself(own_daemon: Daemon) -> None:
    with contextlib.ExitStack() as stack:
        for name, health in (
            ("plain", None),
            ("good", "passing"),
            ("busy", "warning"),
            ("sick", "critical"),
            ("new", ""),
        ):
            stack.enter_context(instance(own_daemon, "orders", health, instance=name))
        own_daemon.lease("orders", instance="held")
        away = stack.enter_context(instance(own_daemon, "orders", "passing", instance="away"))
        own_daemon.call("POST", f"/v1/leases/{away['id']}/drain", {})
        for query in ("serving=true", "passing=true"):
            assert names(own_daemon, "orders", query) == {"plain", "good", "busy"}
        assert names(own_daemon, "orders") == {"plain", "good", "busy", "sick", "new", "away"}
        assert names(own_daemon, "orders", "held=true") == names(own_daemon, "orders") | {"held"}
        assert names(own_daemon, "orders", "serving=true&health=passing") == {"good"}
        assert names(own_daemon, "orders", "health=critical") == {"sick"}
        (counted,) = own_daemon.get("/v1/services")["services"]
        assert counted["users"] == [counted["users"][0]]
        assert {key: counted[key] for key in counted if key not in ("name", "users")} == {
            "instances": 7,
            "serving": 3,
            "passing": 2,
            "warning": 1,
            "critical": 1,
            "unknown": 3,
        }


def test_instance_is_one_thing_with_all_its_endpoints(own_daemon: Daemon) -> None:
    with (
        instance(own_daemon, "api", "passing", instance="api-1") as main,
        instance(own_daemon, "api", instance="api-1", endpoint="grpc"),
        instance(own_daemon, "api", "passing", instance="api-1", endpoint="admin") as admin,
    ):
        assert names(own_daemon, "api", "serving=true&endpoint=grpc") == {"api-1"}
        report(own_daemon, admin, "critical")
        assert names(own_daemon, "api", "serving=true&endpoint=admin") == set()
        assert names(own_daemon, "api", "serving=true&endpoint=grpc") == {"api-1"}
        report(own_daemon, main, "critical")
        assert names(own_daemon, "api", "serving=true&endpoint=grpc") == set()
        report(own_daemon, main, "passing")
        assert names(own_daemon, "api", "serving=true&endpoint=grpc") == {"api-1"}
        own_daemon.call("POST", f"/v1/leases/{main['id']}/drain", {})
        assert names(own_daemon, "api", "serving=true&endpoint=grpc") == set()


def test_tags_select_only_what_has_all_of_them(own_daemon: Daemon) -> None:
    with (
        instance(own_daemon, "orders", instance="a", tags=["blue"]),
        instance(own_daemon, "orders", instance="b", tags=["blue", "eu"]),
    ):
        assert names(own_daemon, "orders", "tag=blue&serving=true") == {"a", "b"}
        assert names(own_daemon, "orders", "tag=blue&tag=eu&serving=true") == {"b"}


def test_panic_gives_all_critical_instances_where_configured(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(extra='[services.orders]\nwhen_all_critical = "all"').start()
    with instance(daemon, "orders", "critical", instance="a"), instance(daemon, "other", "critical"):
        assert names(daemon, "orders", "serving=true") == {"a"}
        assert names(daemon, "other", "serving=true") == set()
        with instance(daemon, "orders", "passing", instance="b"):
            assert names(daemon, "orders", "serving=true") == {"b"}
        wait_for(lambda: names(daemon, "orders", "serving=true") == {"a"}, "the sick one is given again")
        daemon.configure('[services.orders]\nwhen_all_critical = "none"')
        os.kill(daemon.pid, signal.SIGHUP)
        wait_for(lambda: not names(daemon, "orders", "serving=true"), "the new setting applies")


def test_waiting_for_instances_ends_when_enough_serve(own_daemon: Daemon) -> None:
    found: list[Any] = []

    def wait() -> None:
        found.append(own_daemon.get("/v1/services/orders?min=2&wait=20&serving=true")["instances"])

    waiter = threading.Thread(target=wait)
    with instance(own_daemon, "orders") as first:
        waiter.start()
        with instance(own_daemon, "orders", "critical") as second:
            with instance(own_daemon, "unrelated"):
                pass
            assert waiter.is_alive()
            report(own_daemon, second, "passing")
            waiter.join(15)
    assert {one["instance"] for one in found[0]} == {first["instance"], second["instance"]}
    began = time.monotonic()
    own_daemon.get("/v1/services/orders?min=9&wait=0.2&serving=true")
    assert time.monotonic() - began >= 0.2


def test_lease_shows_reason_time_and_check_of_its_health(own_daemon: Daemon) -> None:
    with instance(own_daemon, "orders", "passing") as lease:
        before = own_daemon.show(lease["id"])
        report(own_daemon, lease, "passing", "all is well")
        after = own_daemon.show(lease["id"])
        assert after["health_note"] == "all is well"
        assert after["health_since"] == before["health_since"]
        assert after["checked_at"] > before["checked_at"]
        assert after["revision"] == before["revision"]  # a note alone makes no event
        report(own_daemon, lease, "critical", "503 database gone")
        sick = own_daemon.get("/v1/leases?service=orders")["leases"][0]
        assert (sick["health"], sick["health_note"]) == ("critical", "503 database gone")
        assert sick["health_since"] > after["health_since"]


def test_changing_a_check_takes_no_instance_out(own_daemon: Daemon) -> None:
    with instance(own_daemon, "orders", "passing") as lease:
        for check in ({"kind": "report", "ttl": 500}, {"kind": "tcp", "interval": 0.2}):
            changed = own_daemon.call("PATCH", f"/v1/leases/{lease['id']}", {"check": check})
            assert changed.body["health"] == "passing"
            assert names(own_daemon, "orders", "serving=true") == {lease["instance"]}


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "127.0.0.1"])
def test_local_caller_gets_an_address_that_is_listened_on(own_daemon: Daemon, address: str) -> None:
    with instance(own_daemon, "orders", address=address) as lease:
        (found,) = own_daemon.get("/v1/services/orders?serving=true")["instances"]
        (target,) = own_daemon.get("/v1/prometheus")
        with socket.create_connection((found["address"], lease["port"]), 5):
            pass
        assert target["targets"][0].rpartition(":")[0].strip("[]") == found["address"]
        assert found["address"] in ("127.0.0.1", "::1")


def test_colliding_metadata_keys_have_labels_of_their_own(own_daemon: Daemon) -> None:
    metadata = {"a-b": "1", "a_b": "2", "a.b": "3", "plain-key": "4"}
    with instance(own_daemon, "orders", metadata=metadata):
        (target,) = own_daemon.get("/v1/prometheus")
    labels = {name: value for name, value in target["labels"].items() if "_metadata_" in name}
    assert sorted(labels.values()) == ["1", "2", "3", "4"]
    assert labels["__meta_portd_metadata_a_b"] == "2"
    assert labels["__meta_portd_metadata_plain_key"] == "4"


def test_bad_check_of_a_request_is_refused_with_a_pointer(own_daemon: Daemon) -> None:
    for check, pointer in (
        ({"kind": "http", "timeout": 3600}, "/check/timeout"),
        ({"kind": "tcp", "interval": 5, "timeout": 30}, "/check/timeout"),
        ({"kind": "tcp", "server_name": "x"}, "/check/server_name"),
    ):
        reply = own_daemon.call("POST", "/v1/leases", {"service": "x", "check": check})
        assert (reply.status, reply.body["code"], reply.body["pointer"]) == (400, "invalid_request", pointer)


def test_wait_for_reports_is_not_disturbed_by_others(own_daemon: Daemon) -> None:
    with instance(own_daemon, "orders", "passing") as lease:
        revision = own_daemon.get("/v1/services/orders")["revision"]
        own_daemon.lease("other")
        answer = own_daemon.get(f"/v1/services/orders?after={revision}&wait=0.3")
        assert [one["revision"] for one in answer["instances"]] == [own_daemon.show(lease["id"])["revision"]]
        wait_for(lambda: names(own_daemon, "orders", "serving=true"), "it serves")
