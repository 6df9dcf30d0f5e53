"""The rules of health: what a check's results and a lease's events make of it, and when a check's turns come.

For every kind of check:

- The first result counts at once. A failure in the `start_period` does not: the check stays unknown, and its first
  pass or warning ends the start early (as in Docker: what has worked once has started).
- After it, health gets worse to a level when `fall` results in a row were at least that bad, and better to a level when
  `rise` results in a row were at least that good. So `fall` failures in a row make it critical, `rise` passes in a row
  make it passing, and a warning is the step between: to whoever waits for passes it is no pass, to whoever counts
  failures it is none, and one alone takes no instance out of the look-ups.
- Silence where a report was due is certain, and counts at once.
- Until its health is first passing, a check runs every `start_interval`, then less and less often.

Ticks are seconds on the lease clock and come from outside. This module must not know how a result is obtained.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, Final, Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from portd.core.errors import InvalidRequest
from portd.core.model import Check, CheckTiming, CommandCheck, ConnectCheck, Health, Lease, Protocol, ReportCheck
from portd.core.rights import can_run_as

Result = Literal["passing", "warning", "critical"]
FOREIGN_NOTE: Final = "a foreign process holds the port"
USUAL_TIMEOUT_S: Final = CheckTiming().timeout
"""A time-out up to the default is accepted beside any interval: a turn that comes meanwhile is skipped."""
START_BACKOFF: Final = 1.5
"""The factor between two steps of a starting check: a service that is ready after t seconds is found before 1.5 t."""


# --- which checks are accepted ---


class CheckPolicy(NamedTuple):
    """What decides which checks are accepted: the daemon's own user, and the programs of `allow_commands`."""

    daemon_uid: int
    allow_commands: frozenset[str]


def validate_check(check: Check, protocol: Protocol, uid: int | None, policy: CheckPolicy) -> None:
    """Refuse a check that can't be made for a lease of this protocol and user; raises InvalidRequest.

    A program, and files that only its user may read, need a daemon that can become that user.
    """
    if isinstance(check, ConnectCheck):
        if protocol == "udp" and check.endpoint is None:
            raise InvalidRequest(
                "this check needs TCP: use 'listen', 'report' or 'command' for a udp lease", pointer="/check/kind"
            )
        _validate_tls(check, uid, policy)
    if isinstance(check, ConnectCheck | CommandCheck) and check.timeout > max(check.interval, USUAL_TIMEOUT_S):
        raise InvalidRequest(
            f"a timeout of {check.timeout:g} s is longer than the interval of {check.interval:g} s",
            pointer="/check/timeout",
        )
    if isinstance(check, CommandCheck):
        if check.command[0] not in policy.allow_commands:
            raise InvalidRequest(
                f"{check.command[0]} is not among allow_commands in the configuration", pointer="/check/command/0"
            )
        if not can_run_as(policy.daemon_uid, uid):
            raise InvalidRequest(f"a command check needs {_becoming(uid, policy)}", pointer="/check/kind")


def _validate_tls(check: ConnectCheck, uid: int | None, policy: CheckPolicy) -> None:
    tls = check.security
    if tls is None:
        given = next((name for name in ("server_name", "ca", "cert", "key") if getattr(check, name) is not None), None)
        if given is not None:
            raise InvalidRequest(f"'{given}' has no effect without 'tls': true", pointer=f"/check/{given}")
        return
    if tls.key is not None and tls.cert is None:
        raise InvalidRequest("a 'key' needs its certificate in 'cert'", pointer="/check/key")
    if tls.cert is not None and not can_run_as(policy.daemon_uid, uid):
        raise InvalidRequest(f"a client certificate needs {_becoming(uid, policy)}", pointer="/check/cert")


def _becoming(uid: int | None, policy: CheckPolicy) -> str:
    whose = "a lease of a local user" if uid is None else f"portd to run as uid {uid}"
    return f"{whose}; it runs as uid {policy.daemon_uid}"


# --- what a lease's events do to its health: the fields of the lease to set ---


def changes(lease: Lease, health: Health, note: str, at: float) -> dict[str, Any]:
    """Return the fields that a new health sets; `health_since` only where the health is another one. `at` is in epoch
    seconds."""
    fields: dict[str, Any] = {"health": health, "health_note": note}
    return fields if health == lease.health else fields | {"health_since": at}


def when_unbound(lease: Lease, at: float) -> dict[str, Any]:
    """Nobody listens any more: what was found before says nothing about the next process. A service that reports may
    do so before it listens, so its report stands."""
    return {} if lease.check is None or isinstance(lease.check, ReportCheck) else changes(lease, "unknown", "", at)


def when_in_conflict(lease: Lease, at: float) -> dict[str, Any]:
    """A foreign process has the port: whatever it would answer, callers must not get it."""
    return {} if lease.check is None else changes(lease, "critical", FOREIGN_NOTE, at)


def when_moved(lease: Lease, at: float) -> dict[str, Any]:
    """The lease has another port: nothing is known of it yet."""
    return changes(lease, "unknown", "", at)


def when_check_changes(lease: Lease, check: Check | None, at: float) -> dict[str, Any]:
    """Another check keeps the last health until its first result; without a check there is none to keep."""
    return {} if lease.check is not None and check is not None else changes(lease, "unknown", "", at)


# --- from results to health ---


class Tally(Struct, frozen=True, gc=False):
    """Where a check stands. `since` is the tick at which it began; the counts are results in a row, up to now.

    `is_first` until a result counts: `health` is then what was known before the check began, and yields to it at once.
    """

    since: float
    health: Health = "unknown"
    passed: int = 0
    passed_or_warned: int = 0
    warned_or_failed: int = 0
    failed: int = 0
    is_first: bool = True


def resumed(tick: float, health: Health) -> Tally:
    """Return where a check stands that is resumed after a restart of the daemon: with the health that it had, which
    `rise` and `fall` apply to."""
    return Tally(tick, health, is_first=health == "unknown")


def count(tally: Tally, timing: CheckTiming, result: Result, tick: float) -> Tally:
    """Count one more result, obtained at `tick`."""
    passes, fails = result == "passing", result == "critical"
    counted = Tally(
        tally.since,
        tally.health,
        passed=tally.passed + 1 if passes else 0,
        passed_or_warned=0 if fails else tally.passed_or_warned + 1,
        warned_or_failed=0 if passes else tally.warned_or_failed + 1,
        failed=tally.failed + 1 if fails else 0,
        is_first=tally.is_first,
    )
    if tally.is_first:
        is_starting = fails and tick < tally.since + timing.start_period
        return counted if is_starting else replace(counted, health=result, is_first=False)
    return replace(counted, health=_judge(counted, timing))


def _judge(tally: Tally, timing: CheckTiming) -> Health:
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
    return replace(tally, health="critical", passed=0, passed_or_warned=0, is_first=False)


def silent_at(tally: Tally, check: ReportCheck, heard: float) -> float:
    """Return the tick at which silence is critical, when the last report came (or the check began) at tick `heard`."""
    deadline = heard + check.ttl
    return max(deadline, tally.since + check.start_period) if tally.is_first else deadline


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


def start_step(timing: CheckTiming, step_s: float | None) -> float:
    """Return the seconds to the next turn of a check that has not passed yet, `step_s` after the last one (None:
    first)."""
    return min(timing.interval, timing.start_interval if step_s is None else step_s * START_BACKOFF)
