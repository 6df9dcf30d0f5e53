"""A user's service name, instance, port, own address and static port are out of every other user's reach."""

from __future__ import annotations

import pytest

from tests.e2e.harness import Daemon, wait_for
from tests.e2e.puppet import Puppet

WAYS = [
    {"service": "orders"},
    {"service": "orders", "instance": "mine"},
    {"service": "orders", "endpoint": "admin"},
    {"service": "orders", "ttl": 60},
    {"service": "orders", "address": "own"},
    {"service": "orders", "check": {"kind": "tcp"}},
]
"""Requests that would put a lease of another user's beside, or in place of, an instance of `orders`."""


@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("request_", WAYS, ids=str)
def test_a_name_of_another_user_is_refused_every_way(
    guarded: Daemon, victim: Puppet, attacker: Puppet, request_: dict[str, object], over: str
) -> None:
    lease = victim.lease("orders")
    refused = attacker.call("POST", "/v1/leases", request_, over=over)
    assert (refused.status, refused.code) == (409, "service_taken")
    assert [one["id"] for one in guarded.get("/v1/services/orders?held=true")["instances"]] == [lease["id"]]


def test_a_name_is_refused_among_others_in_an_array(victim: Puppet, attacker: Puppet, guarded: Daemon) -> None:
    victim.lease("orders")
    refused = attacker.call("POST", "/v1/leases", [{"service": "own"}, {"service": "orders"}])
    assert (refused.status, refused.code) == (409, "service_taken")
    assert guarded.get("/v1/services/own?held=true")["instances"] == []


def test_a_crashed_instances_name_and_port_stay_its_users(
    guarded: Daemon, victim: Puppet, attacker: Puppet, make_user
) -> None:
    lease = victim.lease("orders")
    victim.end()
    wait_for(lambda: guarded.show(lease["id"])["state"] == "ended", "the lease ends with its process")
    refused = attacker.call("POST", "/v1/leases", {"service": "orders", "instance": lease["instance"]})
    assert refused.code == "service_taken"
    refused = attacker.call("POST", "/v1/leases", {"service": "own", "port": lease["port"], "exact": True})
    assert (refused.status, refused.code) == (409, "port_taken")
    again = make_user(guarded, lease["uid"]).lease("orders", instance=lease["instance"])
    assert again["port"] == lease["port"]


def test_an_own_address_goes_to_no_other_user(guarded: Daemon, victim: Puppet, attacker: Puppet) -> None:
    lease = victim.lease("db", address="own", port=5432, ttl=60)
    assert guarded.call("DELETE", f"/v1/leases/{lease['id']}").status == 204
    other = attacker.lease("theirs", address="own", port=5432)
    assert other["address"] != lease["address"]


def test_a_privileged_static_port_goes_to_its_services_users_alone(
    guarded: Daemon, victim: Puppet, attacker: Puppet
) -> None:
    answer, sockets = attacker.hand_over({"request": {"service": "https", "ttl": 60}, "listen": True})
    assert (answer["problem"]["status"], sockets) == (409, [])
    answer, sockets = victim.hand_over({"request": {"service": "https", "ttl": 60}, "listen": True})
    assert [(one["address"], one["port"]) for one in sockets] == [("127.0.0.9", 443)], answer


def test_a_listed_name_is_shared_by_its_users(guarded: Daemon, victim: Puppet, attacker: Puppet) -> None:
    ids = {victim.lease("team")["id"], attacker.lease("team")["id"]}
    assert {one["id"] for one in guarded.get("/v1/services/team?held=true")["instances"]} == ids


def test_a_lease_of_another_user_is_read_and_never_changed(victim: Puppet, attacker: Puppet, guarded: Daemon) -> None:
    lease = victim.lease("orders")
    path = f"/v1/leases/{lease['id']}"
    for method, where, body in (
        ("PATCH", path, {"tags": ["mine"]}),
        ("DELETE", path, None),
        ("POST", f"{path}/renew", {}),
        ("POST", f"{path}/decline", None),
        ("POST", f"{path}/drain", {"drain": True}),
        ("POST", f"{path}/transfer", {"pid": attacker.pid}),
        ("PUT", f"{path}/health", {"status": "passing"}),
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            refused = attacker.call(method, where, body, **headers)
            assert refused.status in (401, 403), (method, where, refused)
    answer, sockets = attacker.hand_over({"lease": lease["id"], "listen": True})
    assert (answer["problem"]["code"], sockets) == ("not_owner", [])
    seen = guarded.show(lease["id"])
    assert (seen["state"], seen["owner"]["pid"], seen["tags"]) == ("held", victim.pid, [])
