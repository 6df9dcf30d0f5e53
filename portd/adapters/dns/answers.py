"""Positive answers to one question, ready but for the id, the question as asked and OPT, in every rotation.

An answer is made of *units*, each of which is expanded to its records only when a message has space for them: a message
holds 64 KB at most, so what one answer renders is bounded, however many instances there are. A rotation starts at one
unit; it is joined when it is first asked for, and kept, within bounds, until the records change. This module must not
know names or leases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from portd.adapters.dns.records import Record

QUESTION_POINTER: Final = b"\xc0\x0c"
"""Points to the question's name, right behind the header (RFC 1035 section 4.1.4)."""
POINTER_REACH: Final = 0x4000
"""Names that start at this offset or later can't be pointed to: they are written out."""
AUTHORITATIVE, CUT = 0x8400, 0x0200
RECURSION_DESIRED = 0x0100
KEPT_BYTES: Final = 1 << 20
"""Bound on the rotations kept of one answer; beyond it they are joined anew."""
TURNS_KEPT: Final = 64
"""Sizes of which each has a turn of its own; those beyond share one. Clients use a handful."""

Expand = Callable[[Any], Sequence[Record]]


class Rotation(NamedTuple):
    """One order of the records: four heads (flags and counts; by recursion desired, by EDNS) and what follows the
    question."""

    heads: tuple[bytes, bytes, bytes, bytes]
    tail: bytes


class Answer:
    """The answer to one question: `units`, and the function that gives a unit's records.

    `start` is the offset that follows the question in a message. `turns` has the unit that comes first next, for each
    size: a client that repeats over TCP what was cut over UDP must not use up the turns of both, or every second unit
    never comes first. It belongs to the name and outlives the answer, so that changes favour nobody.
    """

    __slots__ = ("_expand", "_kept_bytes", "_rotations", "_start", "_turns", "_units")

    def __init__(self, units: Sequence[Any], expand: Expand, start: int, turns: dict[int, int]) -> None:
        self._units = units
        self._expand = expand
        self._start = start
        self._turns = turns
        self._rotations: dict[tuple[int, int], Rotation] = {}
        self._kept_bytes = 0

    def next(self, size_bytes: int) -> Rotation:
        """Return the next rotation for a message of at most this size, OPT not counted.

        Additional records are left out first, then records, and only the latter sets TC (RFC 2181 section 9).
        """
        key = size_bytes if size_bytes in self._turns or len(self._turns) < TURNS_KEPT else 0
        first = self._turns.get(key, 0) % len(self._units)
        self._turns[key] = first + 1
        rotation = self._rotations.get((size_bytes, first))
        if rotation is None:
            rotation = self._rotate(first, size_bytes)
            self._keep(size_bytes, first, rotation)
        return rotation

    def _keep(self, size_bytes: int, first: int, rotation: Rotation) -> None:
        self._kept_bytes += len(rotation.tail)
        if self._kept_bytes > KEPT_BYTES:
            self._rotations.clear()
            self._kept_bytes = len(rotation.tail)
        self._rotations[size_bytes, first] = rotation

    def _rotate(self, first: int, size_bytes: int) -> Rotation:
        units = self._units
        parts: list[bytes] = []
        placed: list[tuple[int, Record]] = []
        at = self._start
        for index in range(first, first + len(units)):
            for record in self._expand(units[index % len(units)]):
                end = at + len(QUESTION_POINTER) + len(record.data)
                if end > size_bytes:
                    return _rotation(AUTHORITATIVE | CUT, len(placed), 0, parts)
                parts += QUESTION_POINTER, record.data
                placed.append((end - len(record.target), record))
                at = end
        added = 0
        for target_at, record in placed:
            owner = (target_at | 0xC000).to_bytes(2) if target_at < POINTER_REACH else record.target
            at += sum(len(owner) + len(data) for data in record.addresses)
            if at > size_bytes:  # all addresses of a name or none: half a set would pass for the whole
                break
            for data in record.addresses:
                parts += owner, data
            added += len(record.addresses)
        return _rotation(AUTHORITATIVE, len(placed), added, parts)


def _rotation(flags: int, answers: int, added: int, parts: Sequence[bytes]) -> Rotation:
    plain, wanted = head(flags, answers, 0, added), head(flags | RECURSION_DESIRED, answers, 0, added)
    plain_edns, wanted_edns = (head(each, answers, 0, added + 1) for each in (flags, flags | RECURSION_DESIRED))
    return Rotation((plain, wanted, plain_edns, wanted_edns), b"".join(parts))


def head(flags: int, answers: int, authorities: int, additionals: int, questions: int = 1) -> bytes:
    """Render a header from the flags on: everything but the id."""
    return b"".join(each.to_bytes(2) for each in (flags, questions, answers, authorities, additionals))
