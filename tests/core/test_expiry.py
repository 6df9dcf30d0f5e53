"""Deadlines come up in order, once, and at their last given time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from portd.core.expiry import Deadlines


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 100)))), st.integers(0, 100))
def test_each_key_is_due_once_at_its_last_deadline(steps, tick):
    deadlines: Deadlines[int] = Deadlines()
    expected: dict[int, int] = {}
    for key, due in steps:
        if due is None:
            deadlines.discard(key)
            expected.pop(key, None)
        else:
            deadlines.set(key, due)
            expected[key] = due
    assert deadlines.next_tick() == min(expected.values(), default=None)
    came_up = deadlines.pop_due(tick)
    assert sorted(came_up) == sorted(key for key, due in expected.items() if due <= tick)
    assert [expected[key] for key in came_up] == sorted(expected[key] for key in came_up)
    assert len(deadlines) == len(expected) - len(came_up)
    assert deadlines.pop_due(tick) == []


def test_moving_a_deadline_later_searches_nothing():
    deadlines: Deadlines[str] = Deadlines()
    for _ in range(1000):
        deadlines.set("lease", 10.0)
        deadlines.set("lease", 20.0)
    assert deadlines.pop_due(15.0) == []
    assert deadlines.at("lease") == 20.0
    assert deadlines.pop_due(20.0) == ["lease"]
