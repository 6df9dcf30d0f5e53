"""Finding others, from blocking programs."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

import portd_client
from clients.conformance.bed import Daemon, wait_for
from portd_client import calls, lookup, steps
from portd_client.errors import DaemonUnavailable, PortdError, problem
from portd_client.types import LeaseRequest


@pytest.fixture(autouse=True)
def listeners() -> Iterator[list[socket.socket]]:
    """Return the sockets of the instances that a test serves, which are closed after it."""
    opened: list[socket.socket] = []
    LISTENERS.append(opened)
    yield opened
    LISTENERS.pop()
    for one in opened:
        one.close()


LISTENERS: list[list[socket.socket]] = []


def grant(daemon: Daemon, service: str, **fields: object) -> str:
    """Lease a port, listen on it, and return the lease's id once the daemon has noticed."""
    requested: LeaseRequest = {"service": service, "ttl": 60, **fields}  # type: ignore[typeddict-item]
    lease = daemon.client.grant(requested)
    listener = socket.socket()
    LISTENERS[-1].append(listener)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((lease["address"], lease["port"]))
    listener.listen()
    wait_for(lambda: daemon.client.lease(lease["id"])["state"] == "bound", "it is bound")
    return lease["id"]


def test_resolve_returns_a_working_instance_by_chance(daemon: Daemon) -> None:
    ports = {daemon.client.lease(grant(daemon, "billing"))["port"] for _ in range(3)}
    found = {portd_client.resolve("billing", client=daemon.client).port for _ in range(100)}
    assert found == ports


def test_an_instance_says_where_it_is_reached(daemon: Daemon) -> None:
    grant(daemon, "wild", address="0.0.0.0", tags=["blue"], metadata={"version": "2"}, instance="wild-one")
    one = portd_client.resolve("wild", client=daemon.client)
    assert (one.name, one.host, one.sockaddr, one.is_stale) == ("wild-one", "127.0.0.1", ("127.0.0.1", one.port), False)
    assert one.authority == f"127.0.0.1:{one.port}"
    assert (one.tags, one.metadata) == (["blue"], {"version": "2"})


def test_what_is_drained_or_not_passing_is_never_returned(daemon: Daemon) -> None:
    drained = grant(daemon, "mixed")
    daemon.client.call(calls.drain(drained))
    critical = grant(daemon, "mixed", check={"kind": "report", "ttl": 60})
    daemon.client.call(calls.report(critical, "critical"))
    with pytest.raises(portd_client.NoInstances):
        portd_client.resolve("mixed", client=daemon.client)
    passing = grant(daemon, "mixed", check={"kind": "report", "ttl": 60})
    daemon.client.call(calls.report(passing, "passing"))
    [only] = portd_client.resolve_all("mixed", client=daemon.client)
    assert only.port == daemon.client.lease(passing)["port"]


def test_resolve_selects_by_tag_and_endpoint(daemon: Daemon) -> None:
    grant(daemon, "sorted", tags=["green"])
    blue = grant(daemon, "sorted", tags=["blue"])
    metrics = grant(daemon, "sorted", endpoint="metrics", instance="sorted-1")
    assert portd_client.resolve("sorted", tags=["blue"], client=daemon.client).port == daemon.client.lease(blue)["port"]
    assert (
        portd_client.resolve("sorted", endpoint="metrics", client=daemon.client).port
        == daemon.client.lease(metrics)["port"]
    )


def test_last_answer_is_given_as_stale_without_a_daemon(own_daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    grant(own_daemon, "remembered")
    fresh = portd_client.resolve("remembered", client=own_daemon.client)
    own_daemon.stop()
    stale = portd_client.resolve("remembered", client=own_daemon.client)
    assert (stale.port, stale.is_stale, fresh.is_stale) == (fresh.port, True, False)
    with pytest.raises(DaemonUnavailable):
        portd_client.resolve("never-asked", client=own_daemon.client)
    monkeypatch.setattr(lookup, "STALE_MAX_S", -1.0)
    with pytest.raises(DaemonUnavailable):
        portd_client.resolve("remembered", client=own_daemon.client)


def follow(answers: Iterator[list[portd_client.Instance]]) -> list[list[int]]:
    """Follow a watch in a thread of its own, which ends when its daemon is gone for good."""
    seen: list[list[int]] = []

    def run() -> None:
        with suppress(PortdError, RuntimeError):
            seen.extend(sorted(one.port for one in instances) for instances in answers)

    threading.Thread(target=run, daemon=True).start()
    return seen


def test_watch_reports_every_change_of_its_service_alone(daemon: Daemon) -> None:
    answers = portd_client.watch("watched", client=daemon.client)
    assert next(answers) == []
    first = grant(daemon, "watched")
    assert [one.port for one in next(answers)] == [daemon.client.lease(first)["port"]]
    grant(daemon, "watched-not")
    grant(daemon, "watched")
    assert len(next(answers)) == 2
    daemon.client.call(calls.release(first))
    assert len(next(answers)) == 1


def test_watch_waits_out_a_restart_of_the_daemon(own_daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "RETRY_S", 0.02)
    seen = follow(portd_client.watch("patient", client=own_daemon.client))
    wait_for(lambda: seen == [[]], "the first answer")
    own_daemon.stop(signal.SIGKILL)
    own_daemon.start()
    port = own_daemon.client.lease(grant(own_daemon, "patient"))["port"]
    wait_for(lambda: seen[-1] == [port], "the change after the restart")


def test_a_look_up_goes_as_far_as_its_scope(daemon: Daemon) -> None:
    """The daemon of these tests has no multicast DNS: it sees nothing on the LAN."""
    port = daemon.client.lease(grant(daemon, "near"))["port"]
    for scope in ("local", "cluster", "all", None):
        assert portd_client.resolve("near", scope=scope, client=daemon.client).port == port
    assert portd_client.resolve_all("near", scope="lan", client=daemon.client) == []
    assert next(portd_client.watch("near", scope="lan", client=daemon.client)) == []
    with pytest.raises(portd_client.Problem, match="world"):
        portd_client.resolve("near", scope="world", client=daemon.client)  # type: ignore[arg-type]


def instance(**fields: object) -> lookup.Instance:
    """Make an instance whose lease has these fields."""
    return lookup.Instance({"instance": "orders-1", "address": "127.0.0.1", "port": 1, **fields})  # type: ignore[typeddict-item]


def test_instances_of_the_lowest_priority_come_first_by_weight() -> None:
    spare, heavy, idle = instance(priority=1), instance(priority=0, weight=5), instance(priority=0, weight=0)
    assert {lookup.pick("orders", [spare, idle, heavy]) for _ in range(200)} == {heavy}
    assert lookup.pick("orders", [spare]) is spare
    assert {lookup.pick("orders", [idle, instance(weight=0)]) for _ in range(200)} > {idle}


def answer(revision: int, *ports: int) -> Any:
    """Make the daemon's answer to a look-up."""
    leases = [{"id": str(port), "address": "127.0.0.1", "port": port} for port in ports]
    return {"service": "orders", "revision": revision, "instances": leases}


def test_watch_goes_on_from_the_stores_own_revision() -> None:
    watch = lookup.Watch(lookup.Query("orders"))
    assert "after" not in watch.request().target
    assert [one.port for one in watch.news(answer(7, 1), {"x-portd-store": "abc"}) or ()] == [1]
    assert "after=abc%3A7" in watch.request().target
    assert watch.news(answer(8, 1), {"x-portd-store": "abc"}) is None


def test_watch_lists_again_at_once_when_its_revision_is_gone() -> None:
    watch = lookup.Watch(lookup.Query("orders"))
    watch.news(answer(7, 1), {"x-portd-store": "abc"})
    assert watch.failed(problem({"code": "revision_gone"}, 410)) == 0.0
    assert "after" not in watch.request().target
    assert watch.news(answer(2, 1), {"x-portd-store": "def"}) is None


def test_watch_without_an_answer_yet_raises_what_went_wrong() -> None:
    with pytest.raises(DaemonUnavailable):
        lookup.Watch(lookup.Query("orders")).failed(DaemonUnavailable([]))
