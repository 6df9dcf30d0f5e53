"""Positive answers to one question, ready but for the id, the question as asked and OPT, in every rotation.

A rotation is put together by joining when it is first asked for, and kept until the records change. This module must not
know names or leases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from portd.adapters.dns.records import Record

QUESTION_POINTER: Final = b"\xc0\x0c"
"""Points to the question's name, right behind the header (RFC 1035 section 4.1.4)."""
POINTER_REACH: Final = 0x4000
"""Names that start at this offset or later can't be pointed to: they are written out."""
AUTHORITATIVE, CUT = 0x8400, 0x0200
RECURSION_DESIRED = 0x0100
KEPT_BYTES: Final = 1 << 20
"""Bound on the rotations kept of one answer at one size: one for each record, or as many as fit into this."""
KEPT_SIZES: Final = 8
"""Sizes kept at once. Clients use a handful; whoever asks for more only makes them be put together again."""


class Rotation(NamedTuple):
    """One order of the records: four heads (flags and counts; by recursion desired, by EDNS) and what follows the
    question."""

    heads: tuple[bytes, bytes, bytes, bytes]
    tail: bytes


class Answer:
    """The records that answer one question; `start` is the offset that follows the question in a message."""

    __slots__ = ("_records", "_rotations", "_start", "_turn")

    def __init__(self, records: Sequence[Record], start: int, turn: int) -> None:
        self._records = records
        self._start = start
        self._turn = turn
        self._rotations: dict[int, list[Rotation | None]] = {}

    def next(self, size_bytes: int) -> Rotation:
        """Return the next rotation for a message of at most this size, OPT not counted.

        Additional records are left out first, then records, and only the latter is told by TC (RFC 2181 section 9).
        """
        rotations = self._rotations.get(size_bytes)
        if rotations is None:
            rotations = self._room_for(size_bytes)
        self._turn += 1
        turn = self._turn % len(rotations)
        rotation = rotations[turn]
        if rotation is None:
            first = turn * len(self._records) // len(rotations)
            rotation = rotations[turn] = self._rotate(first, size_bytes)
        return rotation

    def _room_for(self, size_bytes: int) -> list[Rotation | None]:
        if len(self._rotations) >= KEPT_SIZES:
            self._rotations.clear()
        count = max(1, min(len(self._records), KEPT_BYTES // size_bytes))
        rotations: list[Rotation | None] = [None] * count
        self._rotations[size_bytes] = rotations
        return rotations

    def _rotate(self, first: int, size_bytes: int) -> Rotation:
        records = self._records
        parts: list[bytes] = []
        placed: list[tuple[int, Record]] = []
        at = self._start
        for index in range(first, first + len(records)):
            record = records[index % len(records)]
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
