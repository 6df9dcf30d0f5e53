"""Netlink messages survive encoding, and bytes of any kind end the reading instead of hanging or failing it."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from portd.core import netlink

words = st.binary(max_size=64).map(lambda value: value[: len(value) // 4 * 4])


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), words), max_size=8))
def test_messages_survive_encoding(sent: list[tuple[int, int, bytes]]) -> None:
    data = b"".join(netlink.encode(kind, flags, body) for kind, flags, body in sent)
    assert list(netlink.messages(data)) == sent


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), words), max_size=8))
def test_attributes_survive_encoding_after_any_head(sent: list[tuple[int, bytes]]) -> None:
    data = b"head" + b"".join(netlink.attribute(kind, value) for kind, value in sent)
    assert list(netlink.attributes(data, 4)) == sent


def test_the_flags_of_an_attributes_type_are_ignored() -> None:
    assert list(netlink.attributes(netlink.attribute(18 | 0x8000, b"abcd"))) == [(18, b"abcd")]


@given(st.binary(max_size=300))
def test_any_bytes_end_the_reading(data: bytes) -> None:
    for _, _, body in netlink.messages(data):
        list(netlink.attributes(body))


def test_an_error_message_has_its_errno() -> None:
    assert netlink.error_code((-2).to_bytes(4, sys.byteorder, signed=True)) == 2
