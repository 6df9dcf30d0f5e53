"""Static ports are held from the daemon's start for as long as nobody leases them, so that nobody else gets them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from portd.core.model import HoldKind
from portd.core.static_ports import StaticPort, StaticPorts
from portd.core.table import LeaseTable
from portd.leasing.seams import Holds

logger = logging.getLogger(__name__)


class StaticHolds:
    """The holds of the static ports that no lease has."""

    def __init__(self, statics: StaticPorts, table: LeaseTable, holds: Holds) -> None:
        self._statics = statics
        self._table = table
        self._holds = holds
        self._held: set[str] = set()
        self._missing: set[str] = set()

    @property
    def held(self) -> frozenset[str]:
        """Return the names under which static ports are held."""
        return frozenset(self._held)

    @property
    def has_missing(self) -> bool:
        """Return whether a foreign process has a static port that no lease has."""
        return bool(self._missing)

    def hold_all(self) -> None:
        """Hold every static port that no lease has; one that a foreign process has is tried again at the next call."""
        for static in self._statics:
            self._hold(static)

    def give_way(self, service: str, endpoint: str, reserve: Callable[..., Any]) -> None:
        """Release the hold of an endpoint's static port, for the lease that is about to have it."""
        static = self._statics.of_endpoint(service, endpoint)
        if static is not None and _name(static) in self._held:
            reserve(partial(self._hold, static))
            self._held.discard(_name(static))
            self._holds.drop(_name(static))

    def _hold(self, static: StaticPort) -> None:
        name = _name(static)
        if name in self._held or self._table.conflicting(static.binding) is not None:
            self._missing.discard(name)
            return
        kind: HoldKind = "shared" if static.protocol == "tcp" else "exclusive"
        taken = self._holds.take(name, static.protocol, static.address, static.port, kind)
        if taken == "taken":
            self._held.add(name)
            self._missing.discard(name)
        elif name not in self._missing:
            self._missing.add(name)
            logger.warning(
                "static port %d of %s (endpoint %s) can't be held: %s; see 'portd who %d'",
                static.port,
                static.service,
                static.endpoint,
                "another process has it" if taken == "busy" else taken.replace("_", " "),
                static.port,
            )


def _name(static: StaticPort) -> str:
    return f"static.{static.service}.{static.endpoint}"
