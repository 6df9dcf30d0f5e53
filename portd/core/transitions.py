"""Every legal move of a lease, as a table: from which states, to which one.

A move that is not in the table can't happen; `advance` is the only maker of changed leases. This module must not know
why a move is made: that is decided before, and recorded in the event after.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from portd.core.errors import LeaseEnded
from portd.core.model import Event, EventType, Lease, State

LIVE: Final[frozenset[State]] = frozenset({"held", "bound", "conflict"})


class Move(NamedTuple):
    """`target` None: the state stays as it is."""

    sources: frozenset[State]
    target: State | None


MOVES: Final[dict[EventType, Move]] = {
    "granted": Move(frozenset({"held"}), "held"),  # a lease is made in its first state
    "bound": Move(frozenset({"held", "conflict"}), "bound"),
    "unbound": Move(frozenset({"bound", "conflict"}), "held"),
    "conflict": Move(frozenset({"held", "bound"}), "conflict"),
    "declined": Move(LIVE, "held"),  # another port: nobody listens there yet
    "draining": Move(LIVE, None),
    "undrained": Move(LIVE, None),
    "updated": Move(LIVE, None),
    "health": Move(LIVE, None),
    "announced": Move(LIVE, None),
    "passed": Move(LIVE, None),  # to another process that is the lease's own
    "ended": Move(LIVE, "ended"),  # and nothing leads out of it
}


class Change(msgspec.Struct, frozen=True, gc=False):
    """One intended move, not yet true: `fields` are the fields of the lease that it sets.

    `lease` is given for a grant alone; every other change takes the lease as it is when its turn comes, so that two
    changes on the way at once never overwrite each other.
    """

    lease_id: str
    type: EventType
    fields: dict[str, Any] = {}
    lease: Lease | None = None


def stint_of(event: Event) -> Lease | None:
    """Return the time on the port that a lease moved away from by this event, as an ended lease without a reason; None
    for events that move no lease."""
    lease = event.lease
    if event.type != "declined" or lease.moved_from is None:
        return None
    return msgspec.structs.replace(lease, port=lease.moved_from, state="ended", ended_at=event.at, moved_from=None)


def is_legal(lease: Lease, move: EventType) -> bool:
    """Return whether the lease may make this move now."""
    return lease.state in MOVES[move].sources


def advance(lease: Lease, change: Change, revision: int) -> Lease:
    """Make the lease as it is after the change; raises LeaseEnded when it has ended before.

    Any other illegal move is a mistake of the caller's and fails an assertion: ask `is_legal` first.
    """
    move = MOVES[change.type]
    if lease.state == "ended":
        raise LeaseEnded(f"lease {lease.id} on port {lease.port} has ended ({lease.ended_because}); ask for a new one")
    assert lease.state in move.sources, f"{change.type} from {lease.state}"
    state = move.target or lease.state
    return msgspec.structs.replace(lease, state=state, revision=revision, **change.fields)
