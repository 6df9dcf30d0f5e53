"""Revisions as clients write them."""

from __future__ import annotations

import pytest

from portd.adapters.http.problems import InvalidQuery
from portd.adapters.http.revisions import Revisions
from portd.core.errors import RevisionGone

OURS = Revisions("00ab12cd34ef5678")


@pytest.mark.parametrize(("text", "revision"), [("0", 0), ("42", 42), ("00ab12cd34ef5678:42", 42), (str(2**53), 2**53)])
def test_a_revision_with_or_without_this_store_is_read(text, revision):
    assert OURS.parse(text, "after") == revision


@pytest.mark.parametrize("text", ["ffab12cd34ef5678:42", "0:0", ":42"])
def test_a_revision_of_another_store_is_gone(text):
    with pytest.raises(RevisionGone):
        OURS.parse(text, "after")


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "1e3", "٣", "00ab12cd34ef5678:", str(2**53 + 1), "9" * 100])
def test_what_is_not_a_revision_is_refused_with_its_name(text):
    with pytest.raises(InvalidQuery) as refusal:
        OURS.parse(text, "Last-Event-ID")
    assert refusal.value.pointer == "/Last-Event-ID"
