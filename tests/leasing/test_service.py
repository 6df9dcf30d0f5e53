"""LeaseService in a world that the test drives: what is granted, moved, changed and observed."""

from __future__ import annotations

import asyncio

import pytest

from portd.core.bindings import Binding
from portd.core.errors import (
    AnnounceUnreachable,
    InvalidRequest,
    NotDeclinable,
    PoolExhausted,
    PortReserved,
    PortTaken,
)
from portd.core.model import CommandCheck, HttpCheck, ReportCheck
from portd.core.requests import HealthReport, LeaseRequest, PatchRequest
from portd.core.static_ports import StaticPort
from portd.testing.world import in_world

LOOPBACK = "127.0.0.1"


@in_world()
async def test_a_lease_belongs_to_its_caller_and_ends_with_it(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    assert (lease.instance, lease.port, lease.state, lease.lifetime) == ("orders-1", 20000, "held", "process")
    assert lease.owner.pid == 41
    world.processes.end(41)
    ended = world.events[-1].lease
    assert (ended.id, ended.state, ended.ended_because) == (lease.id, "ended", "owner_exited")
    assert world.holds.held == {}
    assert world.processes.watched_count == 0


@in_world()
async def test_repeated_request_gets_the_same_lease_without_its_token(world):
    world.processes.start(41)
    request = LeaseRequest(service="orders", instance="orders-1")
    first, second = await asyncio.gather(*(world.ask([request], pid=41) for _ in range(2)))
    assert first.leases[0].id == second.leases[0].id
    assert first.is_new
    assert not second.is_new
    assert second.tokens == [None]


@in_world()
async def test_another_owner_is_refused_a_taken_instance(world):
    world.processes.start(41)
    world.processes.start(42)
    await world.grant(41, service="orders", instance="orders-1")
    with pytest.raises(PortTaken) as refused:
        await world.grant(42, service="orders", instance="orders-1")
    assert refused.value.pointer == "/instance"


@in_world(has_shared_names=True)
async def test_an_instance_is_one_users_with_all_its_endpoints(world):
    world.processes.start(41)
    world.processes.start(42, uid=2000)
    world.processes.start(43)
    lease = await world.grant(41, service="orders", instance="orders-1", address="own")
    with pytest.raises(PortTaken) as refused:
        await world.grant(42, uid=2000, service="orders", instance="orders-1", endpoint="metrics", address="own")
    assert refused.value.pointer == "/instance"
    for pid, admin in ((43, False), (42, True)):
        endpoint = await world.grant(
            pid,
            uid=2000 if admin else 1000,
            admin=admin,
            service="orders",
            instance="orders-1",
            endpoint=f"of-{pid}",
            address="own",
        )
        assert endpoint.address == lease.address
    for each in list(world.service.table):
        await world.service.release(each.id, world.caller(41, admin=True))
    assert (await world.grant(42, uid=2000, service="orders", instance="orders-1")).instance == "orders-1"


@in_world()
async def test_without_an_instance_each_grant_takes_the_lowest_free_number(world):
    world.processes.start(41)
    leases = [await world.grant(41, service="orders") for _ in range(3)]
    assert [lease.instance for lease in leases] == ["orders-1", "orders-2", "orders-3"]
    await world.service.release(leases[1].id, world.caller(41))
    assert (await world.grant(41, service="orders")).instance == "orders-2"


@in_world()
async def test_an_array_is_granted_whole_or_not_at_all(world):
    world.processes.start(41)
    requests = [
        LeaseRequest(service="orders"),
        LeaseRequest(service="orders", endpoint="metrics"),
        LeaseRequest(service="billing"),
    ]
    leases = (await world.ask(requests, pid=41)).leases
    assert [lease.instance for lease in leases] == ["orders-1", "orders-1", "billing-1"]
    assert len({lease.port for lease in leases}) == 3
    before = (dict(world.holds.held), len(world.table), world.allocator.count("default"))
    world.foreign.add(Binding("tcp", LOOPBACK, 9000))
    with pytest.raises(PortTaken) as refused:
        await world.ask([LeaseRequest(service="a"), LeaseRequest(service="b", port=9000, exact=True)], pid=41)
    assert refused.value.pointer == "/1/port"
    assert (dict(world.holds.held), len(world.table), world.allocator.count("default")) == before


@in_world()
async def test_port_of_a_foreign_process_goes_on_probation(world):
    world.processes.start(41)
    world.foreign.add(Binding("tcp", "0.0.0.0", 20000))
    assert (await world.grant(41, service="orders")).port == 20001
    assert world.allocator.count("default").declined == 1


@in_world()
async def test_exact_request_gets_its_port_or_none(world):
    world.processes.start(41)
    assert (await world.grant(41, service="orders", port=8080, exact=True)).port == 8080
    with pytest.raises(PortTaken):
        await world.grant(41, service="billing", port=8080, exact=True)
    assert (await world.grant(41, service="billing", port=8080)).port == 20000
    assert (await world.grant(41, service="billing", port=8080, exact=True, address="127.0.0.2")).port == 8080


@in_world(statics=[StaticPort("orders", 8080, "tcp", LOOPBACK)])
async def test_a_static_port_is_its_services_for_good(world):
    world.processes.start(41)
    world.processes.start(42)
    lease = await world.grant(41, service="orders")
    assert (lease.port, lease.lifetime) == (8080, "static")
    with pytest.raises(NotDeclinable):
        await world.service.decline(lease.id, world.caller(41))
    with pytest.raises(PortReserved):
        await world.grant(42, service="billing", port=8080, exact=True)
    world.processes.end(41)
    assert (await world.grant(42, service="orders")).port == 8080


@in_world(
    statics=[
        StaticPort("names", 5353, "udp", LOOPBACK),
        StaticPort("web", 8080, "tcp", LOOPBACK),
        StaticPort("any", 8081, "both", LOOPBACK),
    ]
)
async def test_static_port_has_its_protocol_unless_another_is_requested(world):
    world.processes.start(41)

    async def given(**requested):
        lease = await world.grant(41, **requested)
        return lease.protocol, lease.port, lease.lifetime

    assert await given(service="names") == ("udp", 5353, "static")
    assert await given(service="web") == ("tcp", 8080, "static")
    assert await given(service="web", protocol="udp") == ("udp", 8080, "static")
    assert await given(service="any", protocol="both") == ("both", 8081, "static")


@in_world(statics=[StaticPort("web", 80, "tcp", LOOPBACK)], listed={"web": {1000}})
async def test_a_static_port_opens_no_other_privileged_one(world):
    world.processes.start(41)
    with pytest.raises(PortReserved):
        await world.grant(41, service="web", port=443, exact=True)
    assert (await world.grant(41, service="web", port=443)).port == 20000
    assert (await world.grant(41, service="web")).port == 80


@in_world()
async def test_privileged_ports_are_for_admins_and_own_addresses(world):
    world.processes.start(41)
    with pytest.raises(PortReserved):
        await world.grant(41, service="web", port=443, exact=True)
    assert (await world.grant(41, service="web", port=443, exact=True, address="own")).port == 443
    assert (await world.grant(41, admin=True, service="web", port=443, exact=True)).port == 443


@in_world()
async def test_endpoints_of_an_instance_share_its_own_address(world):
    world.processes.start(41)
    main = await world.grant(41, service="db", instance="db-1", address="own", port=5432)
    metrics = await world.grant(41, service="db", instance="db-1", endpoint="metrics", address="own", port=80)
    other = await world.grant(41, service="db", instance="db-2", address="own", port=5432)
    assert main.address == metrics.address == "127.77.0.1"
    assert other.address == "127.77.0.2"
    assert [main.port, other.port] == [5432, 5432]


@in_world()
async def test_declined_lease_moves_to_another_port_under_same_id(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    world.foreign.add(Binding("tcp", LOOPBACK, lease.port))
    moved = await world.service.decline(lease.id, world.caller(41))
    assert (moved.id, moved.port) == (lease.id, 20001)
    assert world.holds.held[lease.id][0].port == 20001
    assert world.allocator.count("default") == (10, 1, 0, 1, 8)
    world.processes.end(41)
    world.foreign.clear()
    assert world.allocator.count("default").used == 0


@in_world(ports=[20000])
async def test_decline_without_another_port_leaves_lease_as_it_was(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    with pytest.raises(PoolExhausted):
        await world.service.decline(lease.id, world.caller(41))
    assert world.table.get(lease.id).port == 20000
    assert world.holds.held[lease.id][0].port == 20000


@in_world()
async def test_an_exact_lease_is_not_declinable(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders", port=8080, exact=True)
    with pytest.raises(NotDeclinable):
        await world.service.decline(lease.id, world.caller(41))


@in_world()
async def test_state_and_health_are_events_and_conflicts_name_the_process(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders", check=HttpCheck())
    foreign = world.processes.find(41, "socket").owner
    world.service.observe_state(lease.id, "bound", None)
    world.service.observe_health(lease.id, "passing", "200")
    world.service.observe_health(lease.id, "passing", "200")
    world.service.observe_state(lease.id, "conflict", foreign)
    world.service.observe_state(lease.id, "held", None)
    assert [event.type for event in world.events] == ["granted", "bound", "health", "conflict", "unbound"]
    assert world.events[3].lease.foreign == foreign
    assert world.events[4].lease.health == "unknown"


@in_world()
async def test_watchers_see_events_in_order_while_one_observes(world):
    seen = []

    def reacting(event):
        if event.type == "bound":
            world.service.observe_health(event.lease.id, "critical", "a watcher's word")

    world.journal.subscribe(reacting)
    world.journal.subscribe(lambda event: seen.append(event.revision))
    lease = await world.grant(service="orders", ttl=30.0)
    world.service.observe_state(lease.id, "bound", None)
    assert seen == sorted(seen)
    assert len(seen) == 3


@in_world()
async def test_patching_replaces_what_is_given_and_nothing_else(world):
    lease = await world.grant(service="orders", ttl=30.0, tags=("blue",), metadata={"a": "1"})
    patched = await world.service.patch(lease.id, world.caller(), PatchRequest(tags=("green",)))
    assert (patched.tags, patched.metadata) == (("green",), {"a": "1"})
    revision = world.table.revision
    await world.service.patch(lease.id, world.caller(), PatchRequest(tags=("green",)))
    assert world.table.revision == revision, "no change is no event"


@in_world()
async def test_checks_that_can_not_work_are_refused_at_the_grant(world):
    for fields, pointer in (
        ({"check": HttpCheck(), "protocol": "udp"}, "/check/kind"),
        ({"check": CommandCheck(command=("/bin/sh",))}, "/check/command/0"),
        ({"hold": "shared", "protocol": "udp"}, "/hold"),
        ({"pool": "nope"}, "/pool"),
        ({"exact": True}, "/exact"),
        ({"address": "example"}, "/address"),
        ({"address": "224.0.0.1"}, "/address"),
        ({"ttl": 86_401.0}, "/ttl"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await world.grant(**{"service": "orders", "ttl": 30.0, **fields})
        assert refused.value.pointer == pointer
    with pytest.raises(AnnounceUnreachable):
        await world.grant(service="orders", ttl=30.0, announce=True)
    assert world.holds.held == {}
    assert len(world.table) == 0


@in_world()
async def test_only_a_report_check_takes_reports(world):
    reports = []
    world.engine.service.report_to_probes = lambda *report: reports.append(report)
    plain = await world.grant(service="plain", ttl=30.0)
    reporting = await world.grant(service="reporting", ttl=30.0, check=ReportCheck())
    with pytest.raises(InvalidRequest):
        await world.service.report(plain.id, world.caller(), HealthReport("passing"))
    await world.service.report(reporting.id, world.caller(), HealthReport("warning", "slow"))
    assert reports == [(reporting.id, "warning", "slow")]
