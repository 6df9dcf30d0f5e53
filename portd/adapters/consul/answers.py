"""Answers with an index, and who waits for their change (Consul's blocking queries).

The index of an answer is the revision at which it last changed, at least 1, so that a client is woken by a change of
its own answer alone. An answer is made once for all who wait for it, after the events of one turn of the loop.
This module must not know what is in an answer.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from portd.core.model import Event

KEPT_MAX: Final = 4096
"""Answers whose last change is remembered; a forgotten one counts as changed: its clients read it again."""

Make = Callable[[], object]
_encode = msgspec.json.Encoder().encode


class Answer(NamedTuple):
    """A body, and the index (revision) at which it last changed."""

    body: bytes
    at: int


class Key(NamedTuple):
    """What an answer is to: the request without its index and wait. `service` None: every lease counts."""

    request: str
    service: str | None


class _Entry:
    __slots__ = ("answer", "is_stale", "make", "waiters")

    def __init__(self, make: Make, answer: Answer) -> None:
        self.make = make
        self.answer = answer
        self.is_stale = False
        self.waiters: set[asyncio.Future[None]] = set()


class Answers:
    """A watcher of events. `revision` gives the newest, `affects` whether an event may change answers of a service."""

    def __init__(self, revision: Callable[[], int], affects: Callable[[Event, str], bool]) -> None:
        self._revision = revision
        self._affects = affects
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._is_closed = False
        self._is_due = False

    def get(self, key: Key, make: Make) -> Answer:
        """Return the answer as it is now."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(make, Answer(_encode(make()), max(self._revision(), 1)))
            self._forget()
        elif entry.is_stale:
            self._refresh(entry)
        self._entries.move_to_end(key)
        return entry.answer

    async def wait(self, key: Key, make: Make, index: int, wait_s: float) -> Answer:
        """Return the answer once its index is another than `index`, or after `wait_s` seconds."""
        answer = self.get(key, make)
        if index <= 0 or answer.at != index or self._is_closed:
            return answer
        entry = self._entries[key]
        waiter = asyncio.get_running_loop().create_future()
        entry.waiters.add(waiter)
        try:
            async with asyncio.timeout(wait_s):
                await waiter
        except TimeoutError:
            pass
        finally:
            entry.waiters.discard(waiter)
        return self.get(key, make)

    def apply(self, event: Event) -> None:
        """Mark what the event may have changed, and compare it in the next turn of the loop if somebody waits."""
        for key, entry in self._entries.items():
            if key.service is None or self._affects(event, key.service):
                entry.is_stale = True
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._wake_changed)

    def close(self) -> None:
        """Answer everybody who waits: the daemon stops."""
        self._is_closed = True
        for entry in self._entries.values():
            _wake(entry)

    def _wake_changed(self) -> None:
        self._is_due = False
        for entry in self._entries.values():
            if entry.is_stale and entry.waiters:
                before = entry.answer.at
                self._refresh(entry)
                if entry.answer.at != before:
                    _wake(entry)

    def _refresh(self, entry: _Entry) -> None:
        entry.is_stale = False
        body = _encode(entry.make())
        if body != entry.answer.body:
            entry.answer = Answer(body, max(self._revision(), entry.answer.at + 1))

    def _forget(self) -> None:
        for key in list(self._entries):
            if len(self._entries) <= KEPT_MAX:
                return
            if not self._entries[key].waiters:
                del self._entries[key]


def _wake(entry: _Entry) -> None:
    for waiter in entry.waiters:
        if not waiter.done():
            waiter.set_result(None)
