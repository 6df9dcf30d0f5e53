"""What a rollback releases: all of a request, or what came after a savepoint."""

from __future__ import annotations

import asyncio

import pytest

from portd.core.errors import Busy
from portd.core.model import Now
from portd.core.transitions import Change
from portd.leasing.pending import Pending


@pytest.fixture
def pending() -> Pending:
    return Pending(Now(0.0, 0.0))


def test_a_rollback_releases_everything_once_and_newest_first(pending: Pending) -> None:
    released: list[int] = []
    for number in range(3):
        pending.reserve(released.append, number)
    pending.rollback()
    pending.rollback()
    assert released == [2, 1, 0]


def test_a_savepoint_keeps_what_came_before_it(pending: Pending) -> None:
    done: list[str] = []

    def reserve(name: str) -> None:
        pending.reserve(done.append, f"released {name}")
        pending.changes.append(Change(name, "updated"))
        pending.on_commit(lambda: done.append(f"committed {name}"))

    reserve("a")
    savepoint = pending.savepoint()
    for name in ("b", "c"):
        reserve(name)
    pending.rollback_to(savepoint)
    assert done == ["released c", "released b"]
    reserve("d")
    pending.commit()
    assert done[2:] == ["committed a", "committed d"]
    assert [change.lease_id for change in pending.changes] == ["a", "d"]


def test_a_release_that_fails_does_not_keep_the_others(pending: Pending) -> None:
    released: list[int] = []

    def fail() -> None:
        raise RuntimeError

    pending.reserve(released.append, 0)
    pending.reserve(fail)
    with pytest.raises(RuntimeError):
        pending.rollback()
    assert released == [0]


def test_a_cancelled_wait_leaves_the_request_to_the_others(pending: Pending) -> None:
    async def wait_twice() -> None:
        cancelled, waiting = pending.wait(), pending.wait()
        cancelled.cancel()
        refusal = Busy("full")
        pending.settle(refusal)
        await asyncio.wait_for(waiting, 5.0)
        await asyncio.wait_for(pending.wait(), 5.0)
        assert pending.refusal is refusal

    asyncio.run(wait_twice())
