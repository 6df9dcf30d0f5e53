"""Which checks run and when, and which results are reported."""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from portd.adapters.probes.prober import Prober
from portd.core.health import FOREIGN_NOTE
from portd.core.model import (
    Check,
    CommandCheck,
    Event,
    EventType,
    GrpcCheck,
    HttpCheck,
    Lease,
    ListenCheck,
    Owner,
    ReportCheck,
    State,
    TcpCheck,
)
from portd.testing.fakes import FakeClock


class Mood:
    """A service whose answers a test chooses, and its visitors."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.status = "200 OK"
        self.visits = 0
        self.open = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        self.open += 1
        try:
            await reader.readuntil(b"\r\n\r\n")
            if self.status:
                writer.write(self._answer(self.status))
            await reader.read()
        finally:
            self.open -= 1


@pytest.fixture
def mood(answer: Any) -> Mood:
    return Mood(answer)


# --- what is reported ---


def test_first_result_and_then_only_changes_are_reported(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        async with service(mood) as port, bed() as prober:
            prober.bind(HttpCheck(rise=2, fall=3), port)
            await prober.until(lambda: prober.reported)
            await prober.idle()
            assert prober.reported[0][1:] == ("passing", "200 OK")
            mood.status = "500 Oops"
            for _ in range(2):
                await prober.turn()
            assert prober.health == ["passing"]
            for _ in range(4):
                await prober.turn()
            assert prober.reported[1:] == [("lease-1", "critical", "500 Oops")]
            mood.status = "200 OK"
            for _ in range(4):
                await prober.turn()
            assert prober.health == ["passing", "critical", "passing"]
            assert prober.results.count(("http", "critical")) == 6

    run(scenario())


def test_failures_in_the_start_period_are_not_reported(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        mood.status = "503 Starting"
        async with service(mood) as port, bed() as prober:
            prober.bind(HttpCheck(start_period=25), port)
            await prober.until(lambda: prober.results)
            await prober.idle()
            await prober.turn()
            await prober.turn()
            assert prober.reported == []
            await prober.turn()
            assert prober.health == ["critical"]

    run(scenario())


def test_restored_health_stays_until_rise_or_fall(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        mood.status = "500 Oops"
        async with service(mood) as port, bed() as prober:
            prober.prober.restore(
                [
                    prober.lease(HttpCheck(fall=2), port, health="passing"),
                    prober.lease(HttpCheck(fall=2), port, health="critical"),
                    prober.lease(HttpCheck(fall=2), port, state="held"),
                    prober.lease(None, port),
                ]
            )
            await prober.turn()
            assert prober.reported == []
            await prober.turn()
            assert prober.reported == [("lease-1", "critical", "500 Oops")]

    run(scenario())


# --- when checks run ---


@pytest.mark.parametrize("check", [HttpCheck(), TcpCheck(), GrpcCheck(), CommandCheck(command=("/bin/true",))])
def test_nothing_is_checked_before_it_is_bound(run: Any, bed: Any, check: Check) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            for state in ("held", "conflict", "ended"):
                prober.notify("granted", prober.lease(check, 9, state=state))
            prober.notify("bound", prober.lease(None, 9))
            assert prober.prober.check_count == 0

    run(scenario())


@pytest.mark.parametrize(
    ("event", "state"), [("unbound", "held"), ("ended", "ended"), ("conflict", "conflict"), ("declined", "held")]
)
def test_check_ends_and_is_cancelled_with_its_lease(
    run: Any, bed: Any, service: Any, mood: Mood, event: EventType, state: State
) -> None:
    async def scenario() -> None:
        mood.status = ""  # accepts, and never answers
        async with service(mood) as port, bed() as prober:
            lease = prober.bind(HttpCheck(timeout=3600), port)
            await prober.until_so(lambda: mood.open)
            prober.notify(event, lease, state=state)
            await prober.until_so(lambda: not mood.open)
            prober.clock.advance(100)
            prober.prober.run_due()
            assert prober.prober.check_count == 0
            assert mood.visits == 1
            assert prober.results == []

    run(scenario())


def test_conflict_is_critical_at_once_until_bound_again(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        async with service(mood) as port, bed() as prober:
            lease = prober.bind(HttpCheck(rise=5), port)
            await prober.until(lambda: prober.health == ["passing"])
            lease = prober.notify("conflict", lease, state="conflict", foreign=Owner(uid=1, known_by="socket"))
            assert prober.reported[1:] == [("lease-1", "critical", FOREIGN_NOTE)]
            lease = prober.notify("health", lease, health="critical", health_note=FOREIGN_NOTE)
            lease = prober.notify("updated", lease, tags=("a",))
            prober.clock.advance(100)
            prober.prober.run_due()
            assert mood.visits == 1
            assert len(prober.reported) == 2
            prober.notify("bound", lease, state="bound")
            await prober.until(lambda: prober.health == ["passing", "critical", "passing"])

    run(scenario())


def test_check_added_during_a_conflict_is_critical(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            prober.notify("updated", prober.lease(TcpCheck(), 9, state="conflict"))
            prober.prober.restore(
                [prober.lease(TcpCheck(), 9, state="conflict"), prober.lease(None, 9, state="conflict")]
            )
            assert prober.reported == [("lease-1", "critical", FOREIGN_NOTE), ("lease-2", "critical", FOREIGN_NOTE)]

    run(scenario())


def test_a_replaced_check_starts_anew_and_a_removed_one_ends(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        async with service(mood) as port, bed() as prober:
            lease = prober.bind(HttpCheck(), port)
            await prober.until(lambda: prober.health == ["passing"])
            lease = prober.notify("updated", lease, tags=("blue",))
            lease = prober.notify("draining", lease, drain=True)
            lease = prober.notify("updated", lease, check=HttpCheck(expect_status=(404,)), health="unknown")
            await prober.until(lambda: prober.health == ["passing", "critical"])
            prober.notify("updated", lease, check=None, health="unknown")
            assert prober.prober.check_count == 0
            assert mood.visits == 2

    run(scenario())


def test_turns_are_spread_over_the_interval(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        async with service(mood) as port, bed() as prober:
            prober.prober.restore([prober.lease(HttpCheck(), port, health="passing") for _ in range(40)])
            counts = []
            for _ in range(10):
                before = len(prober.results)
                await prober.turn(1.0)
                counts.append(len(prober.results) - before)
            assert sum(counts) == 40
            assert max(counts) <= 10

    run(scenario())


@pytest.mark.parametrize("interval", [1.0, 12.0])
def test_starting_service_is_found_before_half_again_its_start(
    run: Any, bed: Any, service: Any, mood: Mood, interval: float
) -> None:
    async def scenario() -> None:
        async with service(mood) as port, bed() as prober:
            mood.status = "503 No"
            prober.bind(HttpCheck(interval=interval), port)
            began = prober.clock.now().tick
            while prober.health[-1:] != ["passing"]:
                if prober.clock.now().tick - began >= 2.0:
                    mood.status = "200 OK"
                await prober.turn(0.1)
                assert prober.clock.now().tick - began < 3.6
            assert prober.health == ["critical", "passing"]
            before = mood.visits
            for _ in range(int(interval * 10)):  # from now on once in its interval
                await prober.turn(0.1)
            assert mood.visits - before in (1, 2)

    run(scenario())


def test_changed_check_keeps_health_until_its_first_result(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        async with service(mood) as port, bed() as prober:
            lease = prober.bind(HttpCheck(), port)
            await prober.until(lambda: prober.health == ["passing"])
            mood.status = "503 No"
            prober.notify("updated", lease, health="passing", check=HttpCheck(fall=5))
            assert prober.health == ["passing"]
            await prober.until(lambda: prober.health == ["passing", "critical"])  # its first result counts at once

    run(scenario())


def test_reason_is_renewed_at_each_check_without_a_report(run: Any, bed: Any, service: Any, answers: Any) -> None:
    bodies = [b"gone", b"full", b"late"]

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = bodies.pop(0) if len(bodies) > 1 else bodies[0]
        writer.write(b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\n" + body)
        await writer.drain()

    async def scenario() -> None:
        async with service(refuse) as port, bed() as prober:
            lease = prober.bind(HttpCheck(), port)
            seen = set()
            for _ in range(3):
                await prober.turn()
                last = prober.prober.last(lease.id)
                seen.add((last.note[-4:], last.at))
            assert [note for note, _ in sorted(seen, key=lambda one: one[1])][-1] == "late"
            assert len({at for _, at in seen}) == 3
            assert prober.health == ["critical"]

    run(scenario())


def test_check_of_another_endpoint_connects_to_that_one(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        async with service(mood) as port, bed() as prober:
            admin = prober.lease(None, port, instance="orders-9", endpoint="admin")
            found = {("orders", "orders-9", "admin"): admin}
            prober.prober._find_endpoint = lambda *name: found.get(name)
            check = HttpCheck(endpoint="admin")
            assert (await prober.result(check, 1, instance="orders-9"))[0] == "passing"
            found.clear()
            result, note = await prober.result(check, port, instance="orders-9")
            assert (result, "endpoint admin" in note) == ("critical", True)
            assert mood.visits == 1

    run(scenario())


def test_check_goes_to_an_address_that_is_listened_on(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        async with service(mood, host="127.0.0.9") as port, bed() as prober:
            result = await prober.result(HttpCheck(), port, address="0.0.0.0", listening=("127.0.0.9",))
            assert result[0] == "passing"

    run(scenario())


# --- slots ---


def test_a_hanging_service_delays_nobody(run: Any, bed: Any, service: Any, answer: Any) -> None:
    hanging, lively = Mood(answer), Mood(answer)
    hanging.status = ""

    async def scenario() -> None:
        async with service(hanging) as bad, service(lively) as good, bed(concurrency=4) as prober:
            stuck = prober.bind(HttpCheck(timeout=3600), bad)
            await prober.until_so(lambda: hanging.open)
            for _ in range(50):
                prober.bind(HttpCheck(), good)
            await prober.until(lambda: len(prober.reported) == 50)
            for turn in range(2, 5):
                await prober.until_so(lambda: prober.prober.running_count == 1)
                prober.clock.advance(10)
                prober.prober.run_due()
                await prober.until(lambda turn=turn: prober.results.count(("http", "passing")) == 50 * turn)
            assert stuck.id not in {lease_id for lease_id, _, _ in prober.reported}
            assert hanging.open == 1
            assert prober.results.count(("http", "skipped")) == 3  # its own turns, not those of others

    run(scenario())


def test_check_without_slot_waits_in_line_once_and_is_next(run: Any, bed: Any, service: Any, answer: Any) -> None:
    hanging, lively = Mood(answer), Mood(answer)
    hanging.status = ""

    async def scenario() -> None:
        async with service(hanging) as bad, service(lively) as good, bed(concurrency=2) as prober:
            stuck = [prober.bind(HttpCheck(timeout=3600), bad) for _ in range(2)]
            await prober.until_so(lambda: hanging.open == 2)
            prober.bind(HttpCheck(), good)
            gone = prober.bind(HttpCheck(), good)
            await prober.until_so(lambda: prober.prober.waiting_count == 2)
            prober.notify("ended", gone, state="ended")
            for _ in range(3):
                prober.clock.advance(10)
                prober.prober.run_due()
            assert prober.results.count(("http", "skipped")) == 3 * 3
            assert lively.visits == 0
            prober.notify("ended", stuck[0], state="ended")
            await prober.until(lambda: prober.health == ["passing"])
            assert lively.visits == 1

    run(scenario())


def test_a_hundred_services_time_out_side_by_side(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        mood.status = ""
        async with service(mood) as port, bed(concurrency=128) as prober:
            for _ in range(100):
                prober.bind(HttpCheck(timeout=0.8), port)
            await prober.until_so(lambda: mood.open == 100)
            await prober.until(lambda: prober.health == ["critical"] * 100)

    run(scenario())


# --- listen ---


def test_listen_check_counts_at_once_and_sends_nothing(run: Any, bed: Any, closed_port: int) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            lease = prober.bind(ListenCheck(), closed_port, protocol="udp")
            lease = prober.notify("draining", lease, drain=True)
            lease = prober.notify("unbound", lease, state="held")
            lease = prober.notify("bound", lease, state="bound")
            prober.notify("conflict", lease, state="conflict")
            assert prober.health == ["passing", "critical", "passing", "critical"]
            prober.prober.restore([prober.lease(ListenCheck(), closed_port, health="passing")])
            assert len(prober.reported) == 4

    run(scenario())


# --- report ---


def test_a_report_counts_by_rise_and_fall(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            lease = prober.bind(ReportCheck(rise=2, fall=2, ttl=5), 9)
            for status in ("passing", "critical", "critical", "warning", "passing", "passing"):
                prober.prober.reported(lease.id, status, f"I am {status}")
            assert prober.reported == [
                (lease.id, "passing", "I am passing"),
                (lease.id, "critical", "I am critical"),
                (lease.id, "warning", "I am passing"),
                (lease.id, "passing", "I am passing"),
            ]

    run(scenario())


def test_report_counts_before_the_service_listens(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            lease = prober.notify("granted", prober.lease(ReportCheck(ttl=5), 9, state="held"))
            prober.clock.advance(100)
            prober.prober.run_due()
            assert prober.reported == []  # nothing is due before it is bound
            prober.prober.reported(lease.id, "passing", "early")
            assert prober.reported == [(lease.id, "passing", "early")]
            prober.notify("bound", lease, state="bound", health="passing")
            prober.clock.advance(5)
            prober.prober.run_due()
            assert prober.reported[1:] == [(lease.id, "critical", "no report for 5 s")]

    run(scenario())


def test_silence_is_critical_exactly_when_the_ttl_has_passed(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            lease = prober.bind(ReportCheck(ttl=5, rise=1, fall=9), 9)
            for _ in range(4):
                prober.clock.advance(4.75)
                prober.prober.run_due()
                prober.prober.reported(lease.id, "passing", "")
            prober.clock.advance(4.75)
            prober.prober.run_due()
            assert prober.health == ["passing"]
            prober.clock.advance(0.25)
            prober.prober.run_due()
            assert prober.health == ["passing", "critical"]
            prober.clock.advance(100)
            prober.prober.run_due()
            prober.prober.reported(lease.id, "passing", "back")
            assert prober.health == ["passing", "critical", "passing"]

    run(scenario())


def test_a_stopped_daemon_is_not_taken_for_silence(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            prober.bind(ReportCheck(ttl=5), 9)
            prober.clock.lose(100)
            prober.prober.run_due()
            assert prober.reported == []

    run(scenario())


def test_silence_waits_for_start_period_and_for_restored_daemon(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            prober.bind(ReportCheck(ttl=5, start_period=20), 9)
            prober.prober.restore([prober.lease(ReportCheck(ttl=15), 9, health="passing")])
            prober.clock.advance(14.5)
            prober.prober.run_due()
            assert prober.reported == []
            prober.clock.advance(0.5)
            prober.prober.run_due()
            assert [lease_id for lease_id, _, _ in prober.reported] == ["lease-2"]
            prober.clock.advance(5)
            prober.prober.run_due()
            assert [lease_id for lease_id, _, _ in prober.reported] == ["lease-2", "lease-1"]

    run(scenario())


def test_silence_is_noticed_without_anybody_asking(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            lease = prober.bind(ReportCheck(ttl=0.2), 9)
            prober.clock.advance(0.25)
            await prober.until(lambda: prober.reported == [(lease.id, "critical", "no report for 0.2 s")])

    run(scenario())


def test_a_report_where_none_is_expected_is_nothing(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            conflicting = prober.lease(ReportCheck(), 9, state="conflict")
            prober.notify("conflict", conflicting)
            ended = prober.notify("ended", prober.bind(ReportCheck(), 9), state="ended")
            for lease_id in (conflicting.id, ended.id, prober.bind(ListenCheck(), 9).id, "nobody"):
                prober.prober.reported(lease_id, "warning", "")
            assert prober.health == ["critical", "passing"]

    run(scenario())


# --- the daemon ---


def test_a_probe_over_which_the_daemon_was_stopped_says_nothing(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        mood.status = ""
        async with service(mood) as port, bed() as prober:
            prober.bind(HttpCheck(timeout=1.2), port)  # 1.2 s pass in the world, and none on the lease clock
            await prober.until_so(lambda: mood.open)
            await prober.until_so(lambda: not mood.open)
            await prober.until_so(lambda: not prober.prober.running_count)
            assert prober.reported == []

    run(scenario())


def test_close_stops_reports_and_closes_every_connection(run: Any, bed: Any, service: Any, mood: Mood) -> None:
    async def scenario() -> None:
        mood.status = ""
        async with service(mood) as port:
            during = len(os.listdir("/proc/self/fd"))
            async with bed() as prober:
                for _ in range(5):
                    prober.bind(HttpCheck(timeout=3600), port)
                await prober.until_so(lambda: mood.open == 5)
                prober.prober.close()
            assert prober.reported == []
            await prober.until_so(lambda: len(os.listdir("/proc/self/fd")) == during)

    run(scenario())


CHECKS: list[Check | None] = [
    None,
    HttpCheck(),
    HttpCheck(path="/other"),
    TcpCheck(),
    GrpcCheck(),
    ListenCheck(),
    ReportCheck(),
    CommandCheck(command=("/bin/true",)),
]
one_event = st.tuples(
    st.sampled_from(get_args(EventType)),
    st.sampled_from(get_args(State)),
    st.sampled_from(CHECKS),
    st.sampled_from([9, 10]),
    st.sampled_from(["a", "b"]),
)


@given(st.lists(one_event, max_size=30))
def test_no_order_of_events_breaks_the_prober(events: list[tuple[EventType, State, Check | None, int, str]]) -> None:
    """Whatever happens: a check runs exactly for the leases that are bound and have one, and goes to their port."""
    prober = Prober(FakeClock(), lambda lease_id, health, note: None)
    numbers = itertools.count()
    now: dict[str, Lease] = {}
    for kind, state, check, port, lease_id in events:
        lease = Lease(
            id=lease_id,
            service="s",
            instance="s-1",
            endpoint="main",
            protocol="tcp",
            address="127.0.0.1",
            port=port,
            pool="default",
            hold="shared",
            state=state,
            check=check,
            lifetime="process",
            owner=Owner(known_by="peercred"),
            host="h",
            created_at=0.0,
        )
        now[lease_id] = lease = replace(lease, revision=next(numbers))
        prober.apply(Event(lease.revision, kind, 0.0, lease))
        prober.reported(lease_id, "passing", "")
    expected = [
        lease
        for lease in now.values()
        if lease.check is not None
        and (lease.state == "bound" or (lease.state == "held" and isinstance(lease.check, ReportCheck)))
    ]
    assert prober.check_count == len(expected)
