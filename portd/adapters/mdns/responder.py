"""The interface of a responder: whatever publishes services on the LAN, this process or a daemon that it asks to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from portd.adapters.mdns.zone import Service

ReportOutcome = Callable[[str, str | None, str | None], None]
"""Reports what became of a service: its id, the name it is published as (None: it is not), a problem or None."""


class Responder(Protocol):
    """Publishes services, and reports what became of them by a `ReportOutcome`."""

    @property
    def host_name(self) -> str:
        """Return the name that services point to, without the final dot."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return the addresses of that name, empty where they are not known."""

    async def start(self) -> None:
        """Start; raises OSError if it can't."""

    def publish(self, service: Service, name: str) -> None:
        """Publish under `name`, else the next free one; the same id again changes it in place if it can be."""

    def withdraw(self, service_id: str) -> None:
        """Withdraw a service, with a goodbye; nothing happens when the id is unknown."""

    def retract(self, service: Service) -> None:
        """Withdraw what a daemon before this one announced under `service.name`, unless the name is in use again."""

    async def close(self, *, takeover: bool) -> None:
        """Stop, with goodbyes for all, unless a successor takes over. May be called twice."""

    def condition(self) -> dict[str, object]:
        """Return what status shows."""
