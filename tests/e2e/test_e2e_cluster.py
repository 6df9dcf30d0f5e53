"""Several daemons on a real etcd: look-ups across hosts, and every failure of a host, of etcd, or of a name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.etcd.bed import Member, etcd, needs_etcd
from tests.e2e.harness import Daemon, free_tcp_port, listen_on, wait_for

pytestmark = needs_etcd
TTL_S = 3
ADDRESS = {"a": "10.99.0.1", "b": "10.99.0.2", "c": "10.99.0.3"}


class Host:
    """A daemon with a node name, and services of its own."""

    def __init__(self, directory: Path, node: str, urls: list[str], sockets: ExitStack, address: str = "") -> None:
        self.daemon = Daemon(directory)
        self.sockets = sockets
        self.dns_port = free_tcp_port()
        quoted = ", ".join(f'"{url}"' for url in urls)
        self.daemon.configure(
            f'[cluster]\nengine = "etcd"\nendpoints = [{quoted}]\nnode = "{node}"\n'
            f'advertise = "{address or ADDRESS[node]}"\nttl = {TTL_S}',
            listen=f'"127.0.0.1:{self.dns_port}"',
        )

    def serve(self, service: str, **fields: Any) -> Any:
        lease = self.daemon.lease(service, address="0.0.0.0", **fields)
        self.sockets.enter_context(listen_on(lease["port"], "0.0.0.0"))
        self.daemon.wait_state(lease["id"], "bound")
        return lease

    def look_up(self, service: str, query: str = "") -> list[tuple[str, str]]:
        found = self.daemon.get(f"/v1/services/{service}{query}")["instances"]
        return [(one["host"], one["address"]) for one in found]

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.daemon.get("/v1/status")["cluster"])


@contextmanager
def hosts(tmp_path: Path, *nodes: str, members: int = 1) -> Iterator[tuple[list[Member], list[Host]]]:
    with etcd(tmp_path, members) as running, ExitStack() as stack:
        urls = [member.url for member in running]
        made = [Host(tmp_path / f"{n}-{node}", node, urls, stack) for n, node in enumerate(nodes)]
        for host in made:
            stack.enter_context(host.daemon)
            host.daemon.start()
        yield running, made


def test_instances_of_other_hosts_are_found_at_their_addresses(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "b") as (_, [a, b]):
        a.serve("orders")
        b.serve("orders")
        wait_for(lambda: b.look_up("orders") == [("b", "127.0.0.1"), ("a", "10.99.0.1")], "b finds both, its own first")
        assert b.look_up("orders", "?scope=local") == [("b", "127.0.0.1")]
        assert b.look_up("orders", "?serving=true&limit=1") == [("b", "127.0.0.1")]
        targets = b.daemon.get("/v1/prometheus")
        assert {one["labels"]["__meta_portd_host"] for one in targets} == {"a", "b"}
        assert [one["host"] for one in b.daemon.get("/v1/hosts")] == ["b", "a"]
        assert b.daemon.get("/v1/hosts")[1]["instances"] == 1
        assert (b.status["state"], b.status["stale"], b.status["problem"]) == ("claimed", None, None)


def test_command_line_shows_hosts_and_the_clusters_condition(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "b") as ([member], [a, b]):
        a.serve("orders")
        wait_for(lambda: b.look_up("orders"), "b finds it")

        def portd(*words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "portd", *words]
            return subprocess.run(command, env=b.daemon.environ, capture_output=True, text=True, timeout=20)

        assert [one["host"] for one in json.loads(portd("hosts", "--json").stdout)] == ["b", "a"]
        assert "this host" in portd("hosts").stdout
        shown = portd("cluster", "status")
        assert (shown.returncode, member.url in shown.stdout, "fresh" in shown.stdout) == (0, True, True)
        assert portd("cluster", "stop").returncode == 2


def test_loopback_instances_are_not_published(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "b") as (_, [a, b]):
        lease = a.daemon.lease("private", address="127.0.0.1")
        a.sockets.enter_context(listen_on(lease["port"]))
        a.serve("orders")
        wait_for(lambda: b.look_up("orders"), "b finds the other service")
        assert b.look_up("private") == []


def test_change_on_another_host_wakes_a_long_poll(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "b") as (_, [a, b]):
        a.serve("orders")
        wait_for(lambda: b.look_up("orders"), "b finds it")
        revision = b.daemon.get("/v1/services/orders")["revision"]
        found: list[Any] = []

        def poll() -> None:
            found.append(b.daemon.get(f"/v1/services/orders?after={revision}&wait=15"))

        waiting = threading.Thread(target=poll)
        waiting.start()
        a.serve("orders")
        waiting.join()
        assert len(found[0]["instances"]) == 2
        assert found[0]["revision"] > revision


def test_instances_of_one_name_on_two_hosts_are_two(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "b") as (_, [a, b]):
        one = a.serve("orders", instance="orders-1")
        b.serve("orders", instance="orders-1")
        wait_for(lambda: len(b.look_up("orders")) == 2, "b finds both")
        a.daemon.call("POST", f"/v1/leases/{one['id']}/drain", {})
        wait_for(lambda: b.look_up("orders", "?serving=true") == [("b", "127.0.0.1")], "the drained one is left out")


def test_killed_host_disappears_and_a_restart_is_not_noticed(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "b") as (_, [a, b]):
        a.serve("orders")
        wait_for(lambda: b.look_up("orders"), "b finds it")
        revision = b.daemon.get("/v1/services/orders")["revision"]
        a.daemon.restart(signal.SIGKILL)
        wait_for(lambda: a.status["state"] == "claimed" and not a.status["waiting"], "a is back")
        assert b.daemon.get("/v1/services/orders")["revision"] == revision
        a.daemon.kill()
        killed_at = time.monotonic()
        wait_for(lambda: not b.look_up("orders") and len(b.daemon.get("/v1/hosts")) == 1, "a's instances are gone")
        assert time.monotonic() - killed_at < TTL_S + 5, "the bound is ttl + 1 s; the rest is for a loaded machine"


def test_suspended_host_is_fenced_and_comes_back(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "b") as (_, [a, b]):
        a.serve("orders")
        wait_for(lambda: b.look_up("orders"), "b finds it")
        assert a.daemon.process is not None
        a.daemon.process.send_signal(signal.SIGSTOP)
        wait_for(lambda: not b.look_up("orders"), "the suspended host is gone")
        a.daemon.process.send_signal(signal.SIGCONT)
        wait_for(lambda: b.look_up("orders") == [("a", "10.99.0.1")], "it is back")


def test_answers_go_on_and_say_their_age_while_etcd_is_away(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "b") as ([member], [a, b]):
        a.serve("orders")
        wait_for(lambda: b.look_up("orders"), "b finds it")
        assert "x-portd-stale" not in b.daemon.call("GET", "/v1/services/orders").headers
        member.kill()
        stale = wait_for(
            lambda: b.daemon.call("GET", "/v1/services/orders").headers.get("x-portd-stale"), "the answer is stale"
        )
        reply = b.daemon.call("GET", "/v1/services/orders")
        assert int(stale) > 0
        assert reply.body["stale"] > 0
        assert [one["host"] for one in reply.body["instances"]] == ["a"]
        assert "x-portd-stale" not in b.daemon.call("GET", "/v1/services/orders?scope=local").headers
        assert any("stale" in warning for warning in b.daemon.get("/v1/status")["warnings"])
        member.start().wait_ready()
        wait_for(lambda: b.status["stale"] is None, "it is fresh again")
        assert b.look_up("orders") == [("a", "10.99.0.1")]


def test_wiped_etcd_takes_nothing_from_look_ups(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "b") as ([member], [a, b]):
        a.serve("orders")
        wait_for(lambda: b.look_up("orders"), "b finds it")
        member.wipe()
        member.start().wait_ready()
        wait_for(lambda: b.status["stale"] is None and b.look_up("orders"), "b is connected and finds it")
        a.serve("orders")
        wait_for(lambda: len(b.look_up("orders")) == 2, "news arrives after the wipe")


def test_second_host_of_a_name_says_who_has_it(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "a", "b") as (_, [first, second, b]):
        wait_for(lambda: {first.status["state"], second.status["state"]} == {"claimed", "refused"}, "one is refused")
        refused, holder = sorted((first, second), key=lambda one: one.status["state"] != "refused")
        holder.serve("orders")
        refused.serve("cart")
        wait_for(lambda: b.look_up("orders"), "b finds the holder's")
        assert b.look_up("cart") == []
        assert "taken by another machine" in refused.status["problem"]
        assert any("another machine" in warning for warning in refused.daemon.get("/v1/status")["warnings"])
        refused.daemon.errors.append("is taken by another machine")


def test_dns_answers_are_cluster_wide(tmp_path: Path) -> None:
    with hosts(tmp_path, "a", "b") as (_, [a, b]):
        lease = a.serve("orders", instance="orders-1")
        b.serve("orders", instance="orders-1")

        def dig(*words: str) -> list[str]:
            command = ["dig", "@127.0.0.1", "-p", str(b.dns_port), "+short", "+tries=3", "+time=1", *words]
            return sorted(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())

        wait_for(lambda: dig("orders.portd.internal", "A") == ["10.99.0.1", "127.0.0.1"], "DNS knows both")
        assert f"0 1 {lease['port']} orders-1--a.orders.portd.internal." in dig("_orders._tcp.portd.internal", "SRV")
        assert dig("orders-1--a.orders.portd.internal", "A") == ["10.99.0.1"]
        a.daemon.kill()
        wait_for(lambda: dig("orders.portd.internal", "A") == ["127.0.0.1"], "the dead host's are gone")


@pytest.mark.parametrize("kind", [signal.SIGSTOP, signal.SIGKILL])
def test_daemons_leave_a_member_that_does_not_answer(tmp_path: Path, kind: signal.Signals) -> None:
    with hosts(tmp_path, "a", "b", members=3) as (members, [a, b]):
        wait_for(lambda: a.status["state"] == b.status["state"] == "claimed", "both are connected")
        members[0].send(kind)
        a.serve("orders")
        wait_for(lambda: b.look_up("orders"), "b finds what a published by another member")
        members[0].send(signal.SIGCONT)
