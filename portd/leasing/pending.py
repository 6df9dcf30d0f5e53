"""Pending: one request on its way to the disk, and the only way to undo it.

A request reserves before it is true: a hold, a name and a binding in the table, a watched process. Each reservation
registers its compensation here, beside the effect; a rollback runs them in reverse order, all of them or those since a
savepoint, and a commit drops them. Effects that may only follow the commit (a clock that restarts) wait in `on_commit`.
This module must not know what is reserved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from portd.core.errors import Refusal
from portd.core.model import Lease, Now
from portd.core.transitions import Change

Notify = Callable[[], None]


class Savepoint(NamedTuple):
    """A point of a request to which it can be rolled back: the counts of what it had then."""

    undo_count: int
    change_count: int
    effect_count: int


class Grant(NamedTuple):
    """One lease of a call, with its token; None where the lease was there before: a token is shown once."""

    lease: Lease
    token: str | None


class Pending:
    """A request in flight: its changes are committed all or none, then it is settled, once.

    `now` is the clock's reading at the decision. `grants` are the leases that it answers with, in the order of the
    call. `is_abandoned` says that its caller has been answered with a refusal while the disk still works on it;
    `is_settled` that it is durable and applied, or refused with `refusal`.
    """

    __slots__ = (
        "_undo",
        "_waiting",
        "changes",
        "effects",
        "grants",
        "is_abandoned",
        "is_settled",
        "now",
        "refusal",
    )

    def __init__(self, now: Now) -> None:
        self.now = now
        self.changes: list[Change] = []
        self.grants: list[Grant] = []
        self.effects: list[Callable[[], None]] = []
        self.is_abandoned = False
        self._undo: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._waiting: list[Notify] = []
        self.is_settled = False
        self.refusal: Refusal | None = None

    def reserve(self, release: Callable[..., Any], *args: Any) -> None:
        """Have `release(*args)` called at a rollback. It must not raise."""
        self._undo.append((release, args))

    def on_commit(self, effect: Callable[[], None]) -> None:
        """Have `effect` called once the changes are durable and applied; it must neither raise nor wait."""
        self.effects.append(effect)

    def commit(self) -> None:
        """Keep what was reserved, and run the effects that waited for the commit."""
        self._undo.clear()
        effects, self.effects = self.effects, []
        for effect in effects:
            effect()

    def rollback(self) -> None:
        """Release everything that was reserved, newest first; nothing happens the second time."""
        self.effects.clear()
        self._release(0)

    def savepoint(self) -> Savepoint:
        """Return the point that `rollback_to` goes back to."""
        return Savepoint(len(self._undo), len(self.changes), len(self.effects))

    def rollback_to(self, savepoint: Savepoint) -> None:
        """Release what was reserved since the savepoint, newest first, and forget the changes and effects since."""
        del self.changes[savepoint.change_count :], self.effects[savepoint.effect_count :]
        self._release(savepoint.undo_count)

    def _release(self, undo_count: int) -> None:
        undone, self._undo[undo_count:] = self._undo[undo_count:], []
        with ExitStack() as stack:  # which runs all of them, whatever one raises
            for release, args in undone:
                stack.callback(release, *args)

    def settle(self, refusal: Refusal | None = None) -> None:
        """Notify everybody who waits; nothing happens when it was settled before."""
        if self.is_settled:
            return
        self.is_settled, self.refusal = True, refusal
        waiting, self._waiting = self._waiting, []  # they mostly refer to this object: a cycle for each grant
        for notify in waiting:
            notify()

    def then(self, notify: Notify) -> None:
        """Have `notify` called as soon as it is settled, at once if it is; it must neither raise nor wait."""
        if self.is_settled:
            notify()
        else:
            self._waiting.append(notify)

    def wait(self) -> asyncio.Future[None]:
        """Return a future that is done once it is settled. Cancelling that does not cancel the request."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.then(partial(_wake, waiter))
        return waiter

    def check(self) -> None:
        """Raise the Refusal that it was settled with, if any."""
        assert self.is_settled, "not settled yet"
        if self.refusal is not None:
            raise self.refusal


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
