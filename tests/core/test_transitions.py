"""The table of moves: what may follow what, exhaustively."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from portd.core.errors import LeaseEnded
from portd.core.model import EventType, Lease, Owner, State
from portd.core.transitions import LIVE, MOVES, Change, advance, is_legal


def lease(state):
    return Lease(
        id="a",
        service="orders",
        instance="orders-1",
        endpoint="main",
        protocol="tcp",
        address="127.0.0.1",
        port=20000,
        pool="default",
        hold="shared",
        lifetime="process",
        owner=Owner(known_by="peercred"),
        host="h",
        created_at=0.0,
        state=state,
    )


def test_every_event_type_is_a_move():
    assert set(MOVES) == set(get_args(EventType))


@pytest.mark.parametrize(("state", "move"), list(itertools.product(get_args(State), get_args(EventType))))
def test_a_move_is_made_from_its_sources_alone(state, move):
    before = lease(state)
    change = Change("a", move, {"drain": True})
    if is_legal(before, move):
        after = advance(before, change, 7)
        assert after.state == (MOVES[move].target or state)
        assert after.revision == 7
        assert after.drain
        assert before.drain is False
    else:
        with pytest.raises((LeaseEnded, AssertionError)):
            advance(before, change, 7)


def test_nothing_leads_out_of_ended():
    assert not any(is_legal(lease("ended"), move) for move in MOVES)


def test_every_live_state_can_end():
    assert MOVES["ended"].sources == LIVE
