"""What a responder is to its callers: somebody who publishes services on the LAN, this process or a daemon it asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from portd.adapters.mdns.zone import Service

Outcome = Callable[[str, str | None, str | None], None]
"""What became of a service: its id, the name it is published as (None: it is not), a problem in one sentence."""


class Responder(Protocol):
    """Somebody who publishes services: we ourselves, or a daemon that we ask to. Tells by an `Outcome`."""

    @property
    def host_name(self) -> str:
        """Return the name that services point to, without the final dot."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return what that name stands for, empty where it is not known."""

    async def start(self) -> None:
        """Begin; raises OSError when it can't."""

    def publish(self, service: Service, name: str) -> None:
        """Publish under `name`, else the next free one; the same id again changes it in place if it can be."""

    def withdraw(self, service_id: str) -> None:
        """Say goodbye; nothing happens when the id is unknown."""

    async def close(self, *, takeover: bool) -> None:
        """Stop, with goodbyes for all, unless a successor takes over. May be called twice."""

    def condition(self) -> dict[str, object]:
        """Tell what status shows."""
