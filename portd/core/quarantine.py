"""Ports that nobody new gets for a while: cooling after a lease, or on probation after a foreign process had them.

Each quarantine is charged to a user: what one user declines and releases counts toward that user's share. The kernel is
asked elsewhere: whoever finds a quarantine due polls the port, and reports what it saw with `polled`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import Final, Literal, NamedTuple

from portd.core.bindings import Binding, conflicts
from portd.core.expiry import Deadlines
from portd.core.own_addresses import Instance, User

PROBATION_S: Final = 5.0
"""Seconds between two polls of a port that a foreign process had: short enough that a dev server's end is noticed."""
PROBATION_SIGHTINGS: Final = 3
"""How often in a row a declined port must be seen free: a foreign process that restarts is not gone."""
COOLING_RECHECK_S: Final = 1.0
"""Seconds until a cooled port that is still bound is polled again."""

Kind = Literal["cooling", "declined"]


class Quarantine(NamedTuple):
    """A port that is kept from all but the `exempt` instance for a while, until `sightings` more polls find it free.

    `user` is the one to whose share it counts, None where it counts to nobody's.
    """

    binding: Binding
    kind: Kind
    exempt: Instance | None
    user: User
    sightings: int


class Quarantines:
    """All quarantines, by port number in the order in which they began, and by user."""

    def __init__(self, used: Container[int]) -> None:
        self._used = used
        self.by_port: OrderedDict[int, list[Quarantine]] = OrderedDict()
        self._by_user: dict[User, dict[Quarantine, None]] = {}
        self._due: Deadlines[Quarantine] = Deadlines()

    def __iter__(self) -> Iterator[Quarantine]:
        for held in self.by_port.values():
            yield from held

    def on_port(self, port: int) -> list[Quarantine]:
        """Return the quarantines of one port number."""
        return list(self.by_port.get(port, ()))

    def count_of(self, user: User) -> int:
        """Return how many quarantines count to a user's share."""
        return len(self._by_user.get(user, ()))

    def cooling(self, user: User | None = None, *, of_all: bool = False) -> Iterator[Quarantine]:
        """Yield the cooling ports of a user, or of all users, the longest-cooling first."""
        found = list(self) if of_all else list(self._by_user.get(user, ()))
        return (quarantine for quarantine in found if quarantine.kind == "cooling")

    def blocking(self, instance: Instance, binding: Binding, kind: Kind | None = None) -> Quarantine | None:
        """Return a quarantine (of a kind) that keeps the binding from the instance, or None."""
        for quarantine in self.by_port.get(binding.port, ()):
            if (
                quarantine.exempt != instance
                and kind in (None, quarantine.kind)
                and conflicts(quarantine.binding, binding)
            ):
                return quarantine
        return None

    def begin(self, quarantine: Quarantine, due_tick: float) -> None:
        """Begin a quarantine that is polled first at this tick."""
        held = self.by_port.setdefault(quarantine.binding.port, [])
        if quarantine not in held:
            held.append(quarantine)
            self._by_user.setdefault(quarantine.user, {})[quarantine] = None
        self._due.set(quarantine, due_tick)

    def end(self, quarantine: Quarantine) -> None:
        """End a quarantine before its time."""
        self._due.discard(quarantine)
        self._drop(quarantine)

    def left_s(self, quarantine: Quarantine, tick: float) -> float:
        """Return the seconds until the quarantine may end."""
        return max(0.0, (self._due.at(quarantine) or tick) - tick)

    def next_left_s(self, user: User, tick: float) -> float | None:
        """Return the seconds until the first quarantine of a user may end, None where it has none."""
        return min((self.left_s(each, tick) for each in self._by_user.get(user, ())), default=None)

    def next_tick(self) -> float | None:
        """Return the tick at which the next port must be polled, or None."""
        return self._due.next_tick()

    def pop_due(self, tick: float) -> list[Quarantine]:
        """Return the quarantines that are due; each must be answered with `polled`."""
        return self._due.pop_due(tick)

    def polled(self, quarantine: Quarantine, is_free: bool, tick: float) -> bool:
        """Record whether a due port was found unbound; return whether that ended the last quarantine of its number."""
        port = quarantine.binding.port
        if quarantine not in self.by_port.get(port, ()):
            return False
        self._drop(quarantine)
        is_used = port in self._used  # its instance has it back, or another one that was given it early
        left = quarantine.sightings - 1 if is_free else max(quarantine.sightings, 1)
        if left > 0 and not is_used:
            is_declined = quarantine.kind == "declined"
            if not is_free and is_declined:
                left = PROBATION_SIGHTINGS
            self.begin(quarantine._replace(sightings=left), tick + (PROBATION_S if is_declined else COOLING_RECHECK_S))
        return port not in self.by_port

    def _drop(self, quarantine: Quarantine) -> None:
        held = self.by_port[quarantine.binding.port]
        held.remove(quarantine)
        if not held:
            del self.by_port[quarantine.binding.port]
        of_user = self._by_user[quarantine.user]
        del of_user[quarantine]
        if not of_user:
            del self._by_user[quarantine.user]
