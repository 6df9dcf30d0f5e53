"""Results become health by the rules of the contract: section 7."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from portd.core.errors import InvalidRequest
from portd.core.health import (
    FOREIGN_NOTE,
    CheckPolicy,
    Result,
    Tally,
    changes,
    count,
    next_turn,
    resumed,
    silence,
    silent_at,
    spread,
    start_step,
    validate_check,
    when_check_changes,
    when_in_conflict,
    when_moved,
    when_unbound,
)
from portd.core.model import (
    Check,
    CommandCheck,
    Health,
    HttpCheck,
    Lease,
    Owner,
    Protocol,
    ReportCheck,
    TcpCheck,
    Tls,
)

RESULTS: dict[str, Result] = {"p": "passing", "w": "warning", "c": "critical"}
results = st.sampled_from(list(RESULTS.values()))
checks = st.builds(TcpCheck, rise=st.integers(1, 5), fall=st.integers(1, 5))
lease_ids = st.text("0123456789abcdef", min_size=1, max_size=32)
intervals = st.floats(0.05, 86_400)


def after(letters: str, check: TcpCheck, health: Health = "unknown") -> str:
    """Return the health after each of the results."""
    tally = resumed(0.0, health)
    seen = ""
    for letter in letters:
        tally = count(tally, check, RESULTS[letter], 100.0)
        seen += tally.health[0]
    return seen


@pytest.mark.parametrize(
    ("results", "healths"),
    [
        ("p", "p"),
        ("w", "w"),
        ("c", "c"),  # the first result counts at once
        ("pccc", "pppc"),
        ("pccpccc", "ppppppc"),  # `fall` failures in a row, and no pass between
        ("cpp", "ccp"),
        ("cpcpp", "ccccp"),  # `rise` passes in a row
        ("pwww", "pppw"),
        ("pwwpw", "ppppp"),  # a warning alone takes nobody out of the look-ups
        ("pwcc", "pppw"),
        ("pwccc", "pppwc"),  # three that are no pass, of which only the last three failed
        ("pccwccc", "pppwwwc"),
        ("pcwc", "pppw"),  # a warning is no failure: it ends their row
        ("cww", "ccw"),
        ("cwp", "ccw"),
        ("cwpp", "ccwp"),
        ("cpw", "ccw"),
        ("cwcw", "cccc"),  # nor is it a pass
        ("wpp", "wwp"),
        ("wccc", "wwwc"),
        ("wpcpcpp", "wwwwwwp"),
    ],
)
def test_health_follows_results_by_rise_and_fall(results: str, healths: str) -> None:
    assert after(results, TcpCheck(rise=2, fall=3)) == healths


def test_thresholds_of_one_make_every_result_count_at_once() -> None:
    assert after("pcwpwcpc", TcpCheck(rise=1, fall=1)) == "pcwpwcpc"


def test_restored_health_yields_to_rise_and_fall_alone() -> None:
    check = TcpCheck(rise=2, fall=3)
    assert after("ccc", check, "passing") == "ppc"
    assert after("pp", check, "critical") == "cp"
    assert after("c", check, "unknown") == "c"


def test_failures_of_the_start_period_leave_the_check_unknown() -> None:
    check = TcpCheck(start_period=10, fall=2)
    tally = Tally(since=5.0)
    for tick in (5.0, 8.0, 14.9):
        tally = count(tally, check, "critical", tick)
        assert tally.health == "unknown"
    assert count(tally, check, "critical", 15.0).health == "critical"


@pytest.mark.parametrize("result", ["passing", "warning"])
def test_first_pass_ends_the_start_period(result: Result) -> None:
    check = TcpCheck(start_period=100, fall=2)
    tally = count(count(Tally(0.0), check, "critical", 1.0), check, result, 2.0)
    assert tally.health == result
    for tick in (3.0, 4.0):
        tally = count(tally, check, "critical", tick)
    assert tally.health == "critical"


@given(checks, st.lists(results, max_size=40))
def test_passing_and_critical_are_only_reached_by_whole_rows(check: TcpCheck, sequence: list[Result]) -> None:
    tally = Tally(0.0)
    for number, result in enumerate(sequence, start=1):
        before, tally = tally.health, count(tally, check, result, 0.0)
        past = sequence[:number]
        if number == 1:
            assert tally.health == result
        elif tally.health != before:
            if tally.health == "passing":
                assert set(past[-check.rise :]) == {"passing"}
            elif tally.health == "critical":
                assert set(past[-check.fall :]) == {"critical"}
            elif before == "passing":
                assert "passing" not in past[-check.fall :]
            else:
                assert "critical" not in past[-check.rise :]


@given(checks, st.lists(results, max_size=20))
def test_a_row_that_is_long_enough_always_wins(check: TcpCheck, sequence: list[Result]) -> None:
    for result, needed in (("passing", check.rise), ("critical", check.fall)):
        tally = Tally(0.0)
        for one in sequence + [RESULTS[result[0]]] * needed:
            tally = count(tally, check, one, 0.0)
        assert tally.health == result


@given(checks, st.lists(results, min_size=1, max_size=40))
def test_health_is_never_unknown_again_after_a_result(check: TcpCheck, sequence: list[Result]) -> None:
    tally = Tally(0.0)
    for result in sequence:
        tally = count(tally, check, result, 0.0)
        assert tally.health != "unknown"


@given(st.floats(0.05, 3600), st.floats(0, 3600), st.floats(0, 1e6), st.floats(0, 3600))
def test_silence_is_due_exactly_a_ttl_after_the_last_report(
    ttl: float, start_period: float, since: float, later: float
) -> None:
    check = ReportCheck(ttl=ttl, start_period=start_period)
    assert silent_at(Tally(since), check, since) == max(since + ttl, since + start_period)
    assert silent_at(resumed(since, "passing"), check, since + later) == since + later + ttl


def test_silence_is_critical_at_once_and_ends_row_of_passes() -> None:
    check = ReportCheck(rise=2, fall=3)
    tally = silence(count(Tally(0.0), check, "passing", 1.0))
    assert tally.health == "critical"
    tally = count(tally, check, "passing", 2.0)
    assert tally.health == "critical"
    assert count(tally, check, "passing", 3.0).health == "passing"


@given(lease_ids, intervals)
def test_a_phase_lies_within_its_interval(lease_id: str, interval: float) -> None:
    assert 0.0 <= spread(lease_id, interval) < interval


def test_a_phase_is_the_same_at_every_start() -> None:
    assert spread("0198c1d2", 10.0) == pytest.approx(6.0015, abs=1e-3)


def test_a_thousand_checks_are_spread_over_their_interval() -> None:
    tenths = Counter(int(spread(f"lease-{number}", 10.0)) for number in range(1000))
    assert len(tenths) == 10
    assert max(tenths.values()) < 150


@given(lease_ids, intervals, st.floats(0, 1e7))
def test_next_turn_is_later_than_now_by_interval_at_most(lease_id: str, interval: float, tick: float) -> None:
    turn = next_turn(lease_id, interval, tick)
    assert tick < turn <= tick + interval * (1 + 1e-6) + 1e-6


@given(lease_ids, st.floats(0.1, 3600), st.floats(0, 1e6))
def test_turns_come_an_interval_apart(lease_id: str, interval: float, tick: float) -> None:
    first = next_turn(lease_id, interval, tick)
    assert next_turn(lease_id, interval, first) - first == pytest.approx(interval, rel=1e-3)


# --- which checks are accepted ---


@pytest.mark.parametrize(
    ("check", "protocol", "uid", "daemon_uid", "pointer"),
    [
        (CommandCheck(command=("/bin/true",)), "tcp", 1000, 0, None),
        (CommandCheck(command=("/bin/true",)), "udp", 1004, 1004, None),
        (CommandCheck(command=("/bin/true",)), "tcp", 1000, 1004, "/check/kind"),
        (CommandCheck(command=("/bin/true",)), "tcp", 0, 1004, "/check/kind"),
        (CommandCheck(command=("/bin/true",)), "tcp", None, 0, "/check/kind"),
        (CommandCheck(command=("/bin/sh",)), "tcp", 1000, 0, "/check/command/0"),
        (TcpCheck(), "udp", 1000, 0, "/check/kind"),
        (TcpCheck(endpoint="admin"), "udp", 1000, 0, None),
        (TcpCheck(interval=0.5), "tcp", 1000, 0, None),  # the default time-out fits any interval
        (TcpCheck(interval=5, timeout=5), "tcp", 1000, 0, None),
        (TcpCheck(interval=5, timeout=5.5), "tcp", 1000, 0, "/check/timeout"),
        (TcpCheck(tls=True, cert="/c.pem"), "tcp", 1000, 1004, "/check/cert"),
        (TcpCheck(tls=True, cert="/c.pem"), "tcp", 1000, 0, None),
        (TcpCheck(tls=True, ca="/ca.pem"), "tcp", 1000, 1004, None),
        (TcpCheck(tls=Tls(key="/k.pem")), "tcp", 1000, 0, "/check/key"),
        (TcpCheck(ca="/ca.pem"), "tcp", 1000, 0, "/check/ca"),
    ],
)
def test_check_is_refused_where_it_cannot_be_made(
    check: Check, protocol: Protocol, uid: int | None, daemon_uid: int, pointer: str | None
) -> None:
    policy = CheckPolicy(daemon_uid, frozenset({"/bin/true"}))
    if pointer is None:
        validate_check(check, protocol, uid, policy)
    else:
        with pytest.raises(InvalidRequest) as refusal:
            validate_check(check, protocol, uid, policy)
        assert refusal.value.pointer == pointer


# --- what a lease's events do to its health ---


CHECKED = Lease(
    id="1",
    service="orders",
    instance="orders-1",
    endpoint="main",
    protocol="tcp",
    address="127.0.0.1",
    port=20000,
    pool="default",
    hold="shared",
    state="bound",
    health="passing",
    health_note="200 OK",
    health_since=1.0,
    lifetime="process",
    owner=Owner(known_by="peercred"),
    check=TcpCheck(),
    host="here",
    created_at=0.0,
)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda lease: when_unbound(lease, 9.0), ("unknown", "", 9.0)),
        (lambda lease: when_in_conflict(lease, 9.0), ("critical", FOREIGN_NOTE, 9.0)),
        (lambda lease: when_moved(lease, 9.0), ("unknown", "", 9.0)),
        (lambda lease: when_check_changes(lease, HttpCheck(), 9.0), ("passing", "200 OK", 1.0)),
        (lambda lease: when_check_changes(lease, None, 9.0), ("unknown", "", 9.0)),
        (lambda lease: changes(lease, "passing", "204", 9.0), ("passing", "204", 1.0)),
        (lambda lease: changes(lease, "warning", "429", 9.0), ("warning", "429", 9.0)),
    ],
)
def test_events_leave_health_its_reason_and_its_time(rule: Any, expected: tuple[str, str, float]) -> None:
    after = replace(CHECKED, **rule(CHECKED))
    assert (after.health, after.health_note, after.health_since) == expected


def test_report_made_before_the_service_listens_outlives_unbound() -> None:
    assert when_unbound(replace(CHECKED, check=ReportCheck()), 9.0) == {}


@given(st.floats(0.05, 60), st.floats(0.05, 3600))
def test_steps_of_a_starting_check_grow_up_to_its_interval(start_interval: float, interval: float) -> None:
    check = TcpCheck(start_interval=start_interval, interval=interval)
    step = start_step(check, None)
    assert step == min(start_interval, interval)
    for _ in range(60):
        following = start_step(check, step)
        assert step <= following <= interval
        step = following
    assert step == interval
