"""Slots: bounds hold in any order of events, and checks that hang delay no others."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from portd.adapters.probes.slots import Shares, Slots, program_shares, shares


class Check:
    """A check of a user's."""

    def __init__(self, user: str, *, is_slow: bool = False) -> None:
        self.user = user
        self.is_slow = is_slow


def started(slots: Slots[Check]) -> list[Check]:
    """Return every check that may start now."""
    found = []
    while (check := slots.next()) is not None:
        found.append(check)
    return found


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "start", "linger", "end"]), st.sampled_from("abc"), st.booleans()),
    max_size=120,
)
BOUNDS = st.builds(Shares, st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 8))


@given(BOUNDS, STEPS)
def test_bounds_hold_in_any_order_of_events(bounds: Shares, steps: list[tuple[str, str, bool]]) -> None:
    slots: Slots[Check] = Slots(bounds)
    running: list[tuple[Check, bool, bool]] = []  # check, is active, was slow at its start
    waiting = 0
    for step, user, is_slow in steps:
        if step == "add":
            slots.add(Check(user, is_slow=is_slow))
            waiting += 1
        elif step == "start" and (check := slots.next()) is not None:
            running.append((check, True, check.is_slow))
            waiting -= 1
        elif step == "linger" and running:
            check, _, was_slow = running.pop(0)
            slots.linger(check)
            running.append((check, False, was_slow))
        elif step == "end" and running:
            slots.end(running.pop(0)[0])
        active = Counter(check.user for check, is_active, _ in running if is_active)
        slow = Counter(check.user for check, _, was_slow in running if was_slow)
        assert active.total() <= bounds.active
        assert max(active.values(), default=0) <= bounds.active_of_user
        assert slow.total() <= bounds.slow
        assert max(slow.values(), default=0) <= bounds.slow_of_user
        assert (slots.waiting_count, slots.running_count) == (waiting, len(running))


@given(st.integers(2, 64), st.integers(0, 2000))
def test_fast_check_starts_at_once_beside_any_number_that_hang(concurrency: int, hung: int) -> None:
    slots: Slots[Check] = Slots(shares(concurrency))
    for _ in range(hung):
        slots.add(Check("same", is_slow=True))
    for _ in range(50):  # as they start, they linger
        for check in started(slots):
            slots.linger(check)
    good = Check("same")
    slots.add(good)
    assert good in started(slots)


@given(st.integers(2, 64), st.integers(0, 500), st.sampled_from([shares, program_shares]))
def test_no_user_occupies_every_slot(concurrency: int, count: int, bounds: Any) -> None:
    slots: Slots[Check] = Slots(bounds(concurrency))
    for number in range(count):
        slots.add(Check("greedy", is_slow=bool(number % 2)))
    started(slots)
    other = Check("other", is_slow=True)
    slots.add(other)
    assert other in started(slots)


def test_users_take_turns() -> None:
    slots: Slots[Check] = Slots(Shares(4, 4, 4, 4))
    for user in "aaaabb":
        slots.add(Check(user))
    assert [check.user for check in started(slots)] == ["a", "b", "a", "b"]
