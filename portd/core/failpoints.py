"""Failpoints: named steps at which a test may stop or fail the daemon, to see what is left of what was acknowledged.

A step calls `failpoint` with its name, which does nothing unless `arm` was called: one lookup in an empty dictionary.
The daemon arms what PORTD_FAILPOINTS says, which no one but a test sets. This module must not know what an action does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

POINTS: Final = (
    "start.restored",
    "start.listening",
    "grant.decided",
    "journal.sequenced",
    "store.begun",
    "store.written",
    "store.committed",
    "store.checkpoint",
    "journal.durable",
    "journal.applied",
    "http.answering",
)
"""Every step, in the order in which a daemon and then a request passes them."""

armed: Final[dict[str, Callable[[], None]]] = {}
"""The actions by step. On a hot path `if armed:` comes before the call."""


def failpoint(name: str) -> None:
    """Run the action of this step if a test armed it."""
    if armed and (action := armed.get(name)) is not None:
        action()


def arm(name: str, action: Callable[[], None]) -> None:
    """Have `action` run at a step; raises ValueError for a name that is no step."""
    if name not in POINTS:
        raise ValueError(f"there is no failpoint {name!r}: use one of {', '.join(POINTS)}")
    armed[name] = action


def disarm() -> None:
    """Forget every action."""
    armed.clear()
