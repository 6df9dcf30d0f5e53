"""LeaseService in a world that the test drives: grants, owners, clocks, restarts, failing disks."""

from __future__ import annotations

import asyncio
import functools

import pytest

import portd.clocks
import portd.journal
from portd.core.allocator import Place, StaticPort
from portd.core.errors import (
    AnnounceUnreachable,
    Busy,
    InvalidRequest,
    LeaseEnded,
    NoClock,
    NotDeclinable,
    NotFound,
    NotOwner,
    PoolExhausted,
    PortReserved,
    PortTaken,
    QuotaExceeded,
    StoreLost,
    StoreUnavailable,
    Unauthenticated,
)
from portd.core.model import CommandCheck, HttpCheck, ReportCheck
from portd.core.requests import HealthReport, LeaseRequest, PatchRequest
from portd.core.rights import Caller
from portd.grants import hash_token
from portd.testing.world import World

LOOPBACK = "127.0.0.1"


def in_world(**options):
    """Run a test in a world of its own, and end it well."""
    def decorate(test):
        @functools.wraps(test)
        def run():
            async def inner():
                world = await World(**options).start()
                try:
                    await test(world)
                finally:
                    await world.kill()
            asyncio.run(inner())
        del run.__wrapped__  # pytest would take the test's parameter for a fixture
        return run
    return decorate


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
async def test_the_same_owner_that_asks_again_gets_the_lease_it_has_and_no_token(world):
    world.processes.start(41)
    request = LeaseRequest(service="orders", instance="orders-1")
    first, second = (await asyncio.gather(*(world.ask([request], pid=41) for _ in range(2))))
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
    wishes = [LeaseRequest(service="orders"), LeaseRequest(service="orders", endpoint="metrics"),
              LeaseRequest(service="billing")]
    leases = (await world.ask(wishes, pid=41)).leases
    assert [lease.instance for lease in leases] == ["orders-1", "orders-1", "billing-1"]
    assert len({lease.port for lease in leases}) == 3
    before = (dict(world.holds.held), len(world.table), world.allocator.count("default"))
    world.strangers.add(Place("tcp", LOOPBACK, 9000))
    with pytest.raises(PortTaken) as refused:
        await world.ask([LeaseRequest(service="a"), LeaseRequest(service="b", port=9000, exact=True)], pid=41)
    assert refused.value.pointer == "/1/port"
    assert (dict(world.holds.held), len(world.table), world.allocator.count("default")) == before


@in_world()
async def test_a_port_that_a_stranger_has_is_never_granted_and_goes_on_probation(world):
    world.processes.start(41)
    world.strangers.add(Place("tcp", "0.0.0.0", 20000))
    assert (await world.grant(41, service="orders")).port == 20001
    assert world.allocator.count("default").declined == 1


@in_world()
async def test_an_exact_wish_gets_that_port_or_none(world):
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
async def test_a_ttl_lease_ends_at_its_time_unless_renewed(world):
    lease = await world.grant(service="orders", ttl=30.0)
    world.pass_time(29.0)
    await world.service.renew(lease.id, world.caller(), None)
    world.pass_time(29.0)
    assert world.table.get(lease.id) is not None
    world.pass_time(1.0)
    assert world.events[-1].lease.ended_because == "expired"
    assert world.events[-1].lease.renewed_at is not None
    with pytest.raises(LeaseEnded):
        await world.service.renew(lease.id, world.caller(), None)


@in_world()
async def test_renewing_commits_nothing_and_a_new_period_is_durable(world):
    lease = await world.grant(service="orders", ttl=30.0)
    commits = world.store.commit_count
    for _ in range(10):
        await world.service.renew(lease.id, world.caller(), None)
    assert world.store.commit_count == commits
    await world.service.renew(lease.id, world.caller(), 60.0)
    await world.restart()
    world.pass_time(59.0)
    assert world.table.get(lease.id) is not None
    world.pass_time(1.0)
    assert world.table.get(lease.id) is None


@in_world()
async def test_time_that_the_daemon_lost_is_given_back(world):
    lease = await world.grant(service="orders", ttl=30.0)
    world.clock.lose(3600.0)
    world.service.tend()
    assert world.table.get(lease.id) is not None
    view = world.service.view(lease, cmdline=True)
    assert (view.expires_at - view.created_at).total_seconds() == pytest.approx(3630.0)


@in_world()
async def test_a_process_lease_has_no_clock(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    with pytest.raises(NoClock):
        await world.service.renew(lease.id, world.caller(41), None)


@in_world()
async def test_a_caller_that_is_not_known_must_give_a_ttl(world):
    with pytest.raises(InvalidRequest) as refused:
        await world.service.grant([LeaseRequest(service="orders")], Caller(known_by="token"))
    assert refused.value.pointer == "/ttl"


@in_world()
async def test_a_process_that_is_gone_gets_no_lease(world):
    with pytest.raises(InvalidRequest) as refused:
        await world.grant(4242, service="orders")
    assert refused.value.pointer == "/pid"


@in_world()
async def test_a_process_that_dies_between_request_and_grant_leaves_no_lease(world):
    world.processes.start(41)
    world.store.gate.clear()
    grant = asyncio.create_task(world.grant(41, service="orders"))
    while not world.processes.watched_count:
        await asyncio.sleep(0)
    world.processes.end(41)
    world.store.gate.set()
    await grant
    await world.settle()
    assert len(world.table) == 0
    assert [event.type for event in world.events] == ["granted", "ended"]
    assert world.holds.held == {}


@in_world()
async def test_a_later_process_with_the_same_pid_is_another_owner(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders", instance="orders-1")
    world.processes.end(41)
    world.processes.start(41)
    again = await world.grant(41, service="orders", instance="orders-1")
    assert again.id != lease.id
    assert again.port == lease.port


@in_world()
async def test_a_lease_for_another_users_process_is_refused(world):
    world.processes.start(41, uid=1001)
    with pytest.raises(NotOwner):
        await world.ask([LeaseRequest(service="orders", pid=41)], uid=1000)
    granted = await world.ask([LeaseRequest(service="orders", pid=41)], uid=0, admin=True)
    assert granted.leases[0].owner.uid == 1001


@in_world()
async def test_a_users_new_process_takes_over_the_ttl_lease_of_the_one_that_died(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders", instance="orders-1", ttl=30.0)
    world.processes.end(41)
    assert world.table.get(lease.id) is not None, "a ttl lease outlives the process that asked"
    world.processes.start(42)
    again = await world.ask([LeaseRequest(service="orders", instance="orders-1", ttl=30.0)], pid=42)
    assert again.leases[0].id == lease.id
    assert not again.is_new
    assert world.table.get(lease.id).owner.pid == 42


@in_world(quota_per_uid=2)
async def test_a_user_has_no_more_leases_than_the_quota(world):
    world.processes.start(41)
    for _ in range(2):
        await world.grant(41, service="orders")
    with pytest.raises(QuotaExceeded):
        await world.grant(41, service="orders")
    assert len(world.holds.held) == 2


@in_world()
async def test_only_the_owner_a_token_and_admins_change_a_lease(world):
    world.processes.start(41)
    granted = await world.ask([LeaseRequest(service="orders")], pid=41)
    lease, token = granted.leases[0], granted.tokens[0]
    with pytest.raises(NotOwner):
        await world.service.drain(lease.id, world.caller(uid=1001), True)
    with pytest.raises(Unauthenticated):
        await world.service.drain(lease.id, Caller(), True)
    for caller in (Caller(token_hash=hash_token(token)), world.caller(uid=1000), world.caller(uid=0, admin=True)):
        assert (await world.service.drain(lease.id, caller, True)).drain
        assert not (await world.service.drain(lease.id, caller, False)).drain
    assert token.encode() not in b"".join(world.store._bodies.values())


@in_world()
async def test_releasing_again_does_nothing_and_an_unknown_id_is_not_found(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    await world.service.release(lease.id, world.caller(41))
    revision = world.table.revision
    await world.service.release(lease.id, world.caller(41))
    assert world.table.revision == revision
    assert (await world.service.find(lease.id)).ended_because == "released"
    with pytest.raises(NotFound):
        await world.service.release("nope", world.caller(41))


@in_world()
async def test_a_declined_lease_moves_to_another_port_under_the_same_id(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    world.strangers.add(Place("tcp", LOOPBACK, lease.port))
    moved = await world.service.decline(lease.id, world.caller(41))
    assert (moved.id, moved.port) == (lease.id, 20001)
    assert world.holds.held[lease.id][0].port == 20001
    assert world.allocator.count("default") == (10, 1, 0, 1, 8)
    world.processes.end(41)
    world.strangers.clear()
    assert world.allocator.count("default").used == 0


@in_world(ports=[20000])
async def test_a_decline_without_another_port_leaves_the_lease_as_it_was(world):
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
async def test_a_full_disk_refuses_grants_changes_nothing_and_mends_itself(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    world.store.failing = "unavailable"
    before = (dict(world.holds.held), len(world.table), world.allocator.count("default"))
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await world.grant(41, service="billing")
    with pytest.raises(StoreUnavailable):
        await world.service.release(lease.id, world.caller(41))
    assert (dict(world.holds.held), len(world.table), world.allocator.count("default")) == before
    assert (await world.service.find(lease.id)).state == "held"
    world.store.failing = ""
    assert (await world.grant(41, service="billing")).port == 20001


@in_world()
async def test_an_exit_is_true_while_the_disk_is_full_and_written_when_it_can_be(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    world.store.failing = "unavailable"
    world.processes.end(41)
    assert world.table.get(lease.id) is None
    world.processes.start(42)
    with pytest.raises(StoreUnavailable):
        await world.grant(42, service="orders")
    world.store.failing = ""
    await world.grant(42, service="orders")
    assert (await world.store.lease(lease.id)).ended_because == "owner_exited"


@in_world()
async def test_a_lost_commit_stops_the_journal_and_nothing_of_it_is_answered(world):
    world.processes.start(41)
    world.store.failing = "unknown"
    with pytest.raises(StoreUnavailable):
        await world.grant(41, service="orders")
    with pytest.raises(StoreLost):
        await world._task
    world.store.failing = ""
    await world.restart()
    assert [lease.service for lease in world.table] == ["orders"], "the disk had it: the port is kept, never doubled"


@in_world()
async def test_too_many_waiting_requests_are_told_to_come_back(world):
    world.processes.start(41)
    world.store.gate.clear()
    world.ports.extend(range(30000, 30000 + portd.journal.PENDING_MAX))
    await world.restart()
    tasks = [asyncio.create_task(world.grant(41, service="orders", port=40000 + n))
             for n in range(portd.journal.PENDING_MAX + portd.journal.BATCH_MAX + 2)]
    await asyncio.sleep(0)
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert all(isinstance(task.exception(), Busy) for task in done)
    held = len(world.holds.held)
    world.store.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    granted = [result for result in results if not isinstance(result, Exception)]
    assert len(granted) == held == len(world.table)


@in_world()
async def test_everything_is_as_it_was_after_a_restart(world):
    world.processes.start(41)
    world.processes.start(42)
    process = await world.grant(41, service="orders", tags=("blue",), metadata={"version": "1"})
    timed = await world.grant(service="timed", ttl=30.0)
    gone = await world.grant(42, service="gone")
    ended = await world.grant(41, service="ended")
    await world.service.release(ended.id, world.caller(41))
    revision = world.table.revision
    world.processes.vanish(42)
    world.clock.advance(2.0)
    await world.restart()
    assert world.table.get(process.id) == process
    assert world.table.get(timed.id).ttl == 30.0
    assert world.events[-1].lease.ended_because == "owner_exited"
    assert world.events[-1].lease.id == gone.id
    assert world.events[-1].revision > revision
    assert set(world.holds.held) == {process.id, timed.id}
    world.pass_time(29.0)
    assert world.table.get(timed.id) is not None, "a full period after the restart"
    world.processes.end(41)
    assert world.table.get(process.id) is None, "the pidfd was opened again"
    world.processes.start(43)
    assert (await world.grant(43, service="ended")).port == ended.port, "its last port"


@in_world()
async def test_a_hold_that_a_stranger_stood_against_at_the_start_is_taken_when_it_has_gone(world):
    lease = await world.grant(service="orders", ttl=600.0)
    place = Place("tcp", LOOPBACK, lease.port)
    await world.kill()
    world.strangers.add(place)
    await world.start()
    assert world.holds.held == {}
    assert world.service.without_hold_count == 1
    world.strangers.discard(place)
    world.pass_time(portd.clocks.HOLD_AGAIN_S)
    assert world.holds.held[lease.id][0] == place
    assert world.service.without_hold_count == 0


@in_world()
async def test_a_cooldown_goes_on_over_a_restart(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders")
    await world.service.release(lease.id, world.caller(41))
    world.clock.advance(2.0)
    await world.restart()
    with pytest.raises(PortTaken):
        await world.grant(41, service="billing", port=lease.port, exact=True)
    world.pass_time(3.0)
    assert (await world.grant(41, service="billing", port=lease.port, exact=True)).port == lease.port


@in_world()
async def test_a_new_boot_ends_process_leases_and_the_instance_gets_its_port_again(world):
    world.processes.start(41)
    first = await world.grant(41, service="first")
    lease = await world.grant(41, service="orders")
    timed = await world.grant(service="timed", ttl=30.0)
    world.boot_id = "another boot"
    await world.restart()
    await world.settle()
    assert {event.lease.ended_because for event in world.events if event.type == "ended"} == {"host_rebooted"}
    assert [left.id for left in world.table] == [timed.id]
    assert (await world.store.lease(first.id)).ended_because == "host_rebooted"
    assert (await world.grant(service="orders", ttl=5.0)).port == lease.port


@in_world()
async def test_revisions_grow_over_restarts_and_are_never_given_twice(world):
    seen = []
    for _ in range(3):
        lease = await world.grant(service="orders", ttl=30.0)
        world.store.failing = "unavailable"
        world.service.observe_health(lease.id, "passing", "")
        seen += [event.revision for event in world.events]
        world.events.clear()
        world.store.failing = ""
        await world.restart()
    assert seen == sorted(set(seen))


@in_world()
async def test_states_and_health_are_events_and_a_conflict_names_the_stranger(world):
    world.processes.start(41)
    lease = await world.grant(41, service="orders", check=HttpCheck())
    stranger = world.processes.find(41, "socket").owner
    world.service.observe_state(lease.id, "bound", None)
    world.service.observe_health(lease.id, "passing", "200")
    world.service.observe_health(lease.id, "passing", "200")
    world.service.observe_state(lease.id, "conflict", stranger)
    world.service.observe_state(lease.id, "held", None)
    assert [event.type for event in world.events] == ["granted", "bound", "health", "conflict", "unbound"]
    assert world.events[3].lease.stranger == stranger
    assert world.events[4].lease.health == "unknown"


@in_world()
async def test_a_watcher_sees_events_in_order_even_when_one_of_them_observes(world):
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
    for fields, pointer in (({"check": HttpCheck(), "protocol": "udp"}, "/check/kind"),
                            ({"check": CommandCheck(command=("/bin/sh",))}, "/check/command/0"),
                            ({"hold": "shared", "protocol": "udp"}, "/hold"),
                            ({"pool": "nope"}, "/pool"), ({"exact": True}, "/exact"),
                            ({"address": "example"}, "/address"), ({"address": "224.0.0.1"}, "/address"),
                            ({"ttl": 86_401.0}, "/ttl")):
        with pytest.raises(InvalidRequest) as refused:
            await world.grant(**{"service": "orders", "ttl": 30.0, **fields})
        assert refused.value.pointer == pointer
    with pytest.raises(AnnounceUnreachable):
        await world.grant(service="orders", ttl=30.0, announce=True)
    assert world.holds.held == {}
    assert len(world.table) == 0


@in_world()
async def test_only_a_report_check_takes_reports(world):
    told = []
    world.service.report_to_probes = lambda *report: told.append(report)
    plain = await world.grant(service="plain", ttl=30.0)
    reporting = await world.grant(service="reporting", ttl=30.0, check=ReportCheck())
    with pytest.raises(InvalidRequest):
        await world.service.report(plain.id, world.caller(), HealthReport("passing"))
    await world.service.report(reporting.id, world.caller(), HealthReport("warning", "slow"))
    assert told == [(reporting.id, "warning", "slow")]


@in_world()
async def test_a_disk_that_hangs_is_answered_and_what_it_wrote_late_is_taken_back(world):
    world.processes.start(41)
    world.journal.patience_s = 0.01
    world.store.gate.clear()
    with pytest.raises(StoreUnavailable):
        await world.grant(41, service="orders")
    with pytest.raises(StoreUnavailable):
        await world.grant(41, service="orders")
    world.store.gate.set()
    await world.settle()
    assert [(event.type, event.lease.ended_because) for event in world.events] == [
        ("granted", None), ("ended", "revoked")]
    assert world.holds.held == {}
