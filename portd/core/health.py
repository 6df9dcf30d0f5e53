"""From results to health: what one more result makes of a check, and when its turns come.

The rules, for every kind of check:

- The first result counts at once. A failure in the `start_period` does not: the check stays unknown, and its first
  pass or warning ends the start early (as in Docker: what has worked once has started).
- After it, health gets worse to a level when `fall` results in a row were at least that bad, and better to a level when
  `rise` results in a row were at least that good. So `fall` failures in a row make it critical, `rise` passes in a row
  make it passing, and a warning is the step between: to whoever waits for passes it is no pass, to whoever counts
  failures it is none, and one alone takes no instance out of the look-ups.
- Silence where a report was due is certain, and counts at once.

Ticks are seconds on the lease clock and come from outside. This module must not know how a result is had.
"""

from __future__ import annotations

import math
import zlib
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from portd.core.model import CheckTiming, Health, ReportCheck

Result = Literal["passing", "warning", "critical"]


class Tally(Struct, frozen=True, gc=False):
    """Where a check stands. `since` is the tick at which it began; the counts are results in a row, up to now."""

    since: float
    health: Health = "unknown"
    passed: int = 0
    passed_or_warned: int = 0
    warned_or_failed: int = 0
    failed: int = 0


def take(tally: Tally, timing: CheckTiming, result: Result, tick: float) -> Tally:
    """Count one more result, had at `tick`."""
    passes, fails = result == "passing", result == "critical"
    counted = Tally(
        tally.since,
        tally.health,
        passed=tally.passed + 1 if passes else 0,
        passed_or_warned=0 if fails else tally.passed_or_warned + 1,
        warned_or_failed=0 if passes else tally.warned_or_failed + 1,
        failed=tally.failed + 1 if fails else 0,
    )
    return replace(counted, health=_judge(counted, timing, result, tick))


def _judge(tally: Tally, timing: CheckTiming, result: Result, tick: float) -> Health:
    if tally.health == "unknown":
        is_starting = tick < tally.since + timing.start_period
        return "unknown" if is_starting and result == "critical" else result
    if tally.failed >= timing.fall:
        return "critical"
    if tally.passed >= timing.rise:
        return "passing"
    if tally.health == "passing" and tally.warned_or_failed >= timing.fall:
        return "warning"
    if tally.health == "critical" and tally.passed_or_warned >= timing.rise:
        return "warning"
    return tally.health


def silence(tally: Tally) -> Tally:
    """Count a report that did not come in time: critical at once, and no pass before it counts any more."""
    return replace(tally, health="critical", passed=0, passed_or_warned=0)


def silent_at(tally: Tally, check: ReportCheck, heard: float) -> float:
    """Return the tick at which silence is critical, when the last report came (or the check began) at tick `heard`."""
    deadline = heard + check.ttl
    return max(deadline, tally.since + check.start_period) if tally.health == "unknown" else deadline


def spread(lease_id: str, interval: float) -> float:
    """Return the phase of a lease's check within its interval, in seconds: the same one at every start of the daemon.

    Leases that come together don't stay together. CRC-32 is uniform enough for that, and `hash` is salted.
    """
    return zlib.crc32(lease_id.encode()) / 2**32 * interval


def next_turn(lease_id: str, interval: float, tick: float) -> float:
    """Return the first turn of the check after `tick`. Turns that were missed meanwhile don't come again."""
    phase = spread(lease_id, interval)
    turn = phase + (math.floor((tick - phase) / interval) + 1) * interval
    return turn if turn > tick else turn + interval  # rounding may land on `tick` itself
