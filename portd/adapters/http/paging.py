"""Long answers: rendered a slice at a time and cut into pages, so that none holds the event loop or is unbounded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Annotated, Any, Final, NamedTuple, TypeVar

from msgspec import Meta

from portd.adapters.http.problems import InvalidQuery

PAGE_MAX_BYTES: Final = 8 << 20
"""Bytes of one page: it ends here even if `limit` would let it go on, and `next` leads to the rest."""
SLICE: Final = 50
"""Entries that are rendered in one turn of the loop: 50 µs each at the most."""
SCAN_SLICE: Final = 500
"""Entries that are filtered and sorted in one turn of the loop: 4 µs each."""

Limit = Annotated[
    int, Meta(ge=1, le=10_000, description="How many entries a page has at most; a page of large ones may have fewer.")
]
Cursor = Annotated[str, Meta(max_length=1024, description="The `next` of the page before; without it the first page.")]

Key = tuple[str, ...]
Item = TypeVar("Item")


class Rows(NamedTuple):
    """A JSON document around one array whose entries are rendered and sent a slice at a time.

    `items` gives what is encoded, in order. `end` gets how many entries were sent and returns what follows the array.
    With `max_bytes` the array ends at the first entry beyond.
    """

    begin: bytes
    items: Iterable[Any]
    end: Callable[[int], bytes]
    max_bytes: int | None = None

    def slices(self, encode: Callable[[Any], bytes]) -> Iterator[bytes]:
        """Yield the document in pieces, each of SLICE entries at most; a reader may do other things between two."""
        items = iter(self.items)
        count = size = 0
        is_open = True
        piece = [self.begin]
        while is_open:
            some = [encode(item) for item in islice(items, SLICE)]
            is_open = len(some) == SLICE
            for data in some:
                if self.max_bytes is not None and count and size + len(data) > self.max_bytes:
                    is_open = False
                    break
                piece.append(b"," + data if count else data)
                size += len(data)
                count += 1
            if is_open:
                yield b"".join(piece)
                piece = []
        piece.append(self.end(count))
        yield b"".join(piece)


def page(
    name: str,
    items: Iterable[tuple[Key, Item]],
    limit: int,
    show: Callable[[Item], Any],
    encode: Callable[[Any], bytes],
    head: bytes = b"",
) -> Rows:
    """Make `{HEAD"NAME": [at most `limit` of the items], "next": cursor or null}`.

    `items` are in the order of their keys, those before the cursor left out already.
    """
    rest = iter(items)
    sent: list[Key] = []
    is_last = [False]

    def entries() -> Iterator[Any]:
        for key, item in islice(rest, limit):
            sent.append(key)
            yield show(item)
        is_last[0] = next(rest, None) is None

    def end(count: int) -> bytes:
        is_whole = is_last[0] and count == len(sent)
        return b'],"next":' + encode(None if is_whole or not count else encode_cursor(sent[count - 1])) + b"}"

    return Rows(b"{" + head + encode(name) + b":[", entries(), end, PAGE_MAX_BYTES)


async def in_order(
    items: Iterable[Item], key: Callable[[Item], Key], after: Key | None, matches: Callable[[Item], bool]
) -> Iterator[tuple[Key, Item]]:
    """Return the items that match, in the order of their keys, from the one after `after` on.

    `items` is copied first: what changes meanwhile changes nothing here. The work is done in slices.
    """
    everything = tuple(items)
    runs: list[list[tuple[Key, int, Item]]] = []
    for begin in range(0, len(everything), SCAN_SLICE):
        if begin:
            await asyncio.sleep(0)
        run = []
        for number, item in enumerate(everything[begin : begin + SCAN_SLICE], begin):
            if matches(item):
                place = key(item)
                if after is None or place > after:
                    run.append((place, number, item))
        run.sort()
        runs.append(run)
    return ((place, item) for place, _, item in heapq.merge(*runs))


def encode_cursor(key: Key) -> str:
    """Make the cursor that leads to what follows this key."""
    return base64.urlsafe_b64encode("\n".join(key).encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None, size: int) -> Key | None:
    """Return the key of a cursor, None where there is none; raises InvalidQuery for what is not a cursor of a listing
    whose keys have `size` parts."""
    if cursor is None:
        return None
    try:
        parts = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode().split("\n")
    except (binascii.Error, ValueError):
        parts = []
    if len(parts) != size:
        raise InvalidQuery("cursor must be the 'next' of the page before", pointer="/cursor")
    return tuple(parts)
