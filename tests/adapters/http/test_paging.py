"""Long answers: complete, in order, in bounded pieces, whatever changes meanwhile."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.adapters.http import paging
from portd.adapters.http.paging import Rows, decode_cursor, encode_cursor, in_order, page
from portd.adapters.http.problems import InvalidQuery
from portd.core.errors import Busy
from portd.core.shares import Shares

encode = msgspec.json.encode


def read(rows):
    return json.loads(b"".join(rows.slices(encode)))


def read_pages(numbers, limit, max_bytes=paging.PAGE_MAX_BYTES, size=1):
    """Follow `next` from page to page; returns all entries, and the size of each page."""
    entries, sizes, cursor = [], [], None
    while True:
        after = decode_cursor(cursor, size=1)
        found = asyncio.run(in_order(numbers, lambda n: (f"{n:06}",), after, lambda n: n % 3 != 0))
        rows = page("numbers", found, limit, lambda n: [n] * size, encode)._replace(max_bytes=max_bytes)
        document = read(rows)
        entries += [entry[0] for entry in document["numbers"]]
        sizes.append(len(document["numbers"]))
        cursor = document["next"]
        if cursor is None:
            return entries, sizes
        assert document["numbers"], "a page leads on"


@given(st.sets(st.integers(0, 999_999), max_size=450), st.integers(1, 250))
def test_pages_have_every_entry_once_and_in_order(numbers, limit):
    entries, sizes = read_pages(numbers, limit)
    assert entries == sorted(n for n in numbers if n % 3 != 0)
    assert all(size == limit for size in sizes[:-1])


@pytest.mark.parametrize("count", [0, 1, paging.SLICE - 1, paging.SLICE, paging.SLICE + 1, 3 * paging.SLICE])
def test_a_page_that_ends_with_the_listing_leads_nowhere(count):
    numbers = [3 * n + 1 for n in range(count)]
    entries, sizes = read_pages(numbers, max(1, count))
    assert (entries, len(sizes)) == (numbers, 1)


def test_page_ends_at_its_bound_of_bytes_and_leads_on():
    numbers = [3 * n + 1 for n in range(50)]
    entries, sizes = read_pages(numbers, 10_000, max_bytes=1_000, size=100)
    assert entries == numbers
    assert max(sizes) < 10


def test_entry_larger_than_page_has_page_of_its_own():
    numbers = [1, 4, 7]
    entries, sizes = read_pages(numbers, 10_000, max_bytes=10, size=100)
    assert (entries, sizes) == (numbers, [1, 1, 1])


def test_a_piece_has_a_bounded_number_of_entries():
    rows = Rows(b"[", range(1_000), lambda count: b"]")
    pieces = list(rows.slices(encode))
    assert json.loads(b"".join(pieces)) == list(range(1_000))
    assert max(piece.count(b",") for piece in pieces) <= paging.SLICE


def test_entries_added_during_the_sort_are_left_out():
    async def run():
        items = list(range(3 * paging.SCAN_SLICE))
        order = asyncio.create_task(in_order(items, lambda n: (f"{n:06}",), None, lambda n: True))
        await asyncio.sleep(0)
        items.append(-1)
        return [n for _, n in await order]

    assert asyncio.run(run()) == list(range(3 * paging.SCAN_SLICE))


@pytest.mark.parametrize("key", [("a",), ("", "b", "c"), ("ä", "x/y", "z")])
def test_a_cursor_leads_back_to_its_key(key):
    assert decode_cursor(encode_cursor(key), len(key)) == key


@pytest.mark.parametrize("cursor", ["", "x", "!!!!", "a" * 1000, "ä", encode_cursor(("a", "b"))])
def test_what_is_not_a_cursor_is_refused_with_a_pointer(cursor):
    with pytest.raises(InvalidQuery) as refusal:
        decode_cursor(cursor, 4)
    assert refusal.value.pointer == "/cursor"


def test_a_share_that_is_used_up_refuses_its_user_alone():
    shares = Shares("long polls", total=4, per_user=2)
    with shares.use(1), shares.use(1):
        with pytest.raises(Busy, match="this user has 2 long polls"), shares.use(1):
            pass
        with shares.use(2), shares.use("token:ci"), pytest.raises(Busy, match="there are 4"), shares.use(3):
            pass
    assert len(shares) == 0
