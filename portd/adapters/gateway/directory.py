"""What the gateway knows of services: a client of the daemon that follows its events.

Whether an instance serves is the daemon's decision: it is queried once for each service and endpoint, and again after
an event of that service. While no daemon answers, the last answer stands: a request to an instance that has gone fails,
and is handled like any other failure.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Final, NamedTuple

from portd._client import calls
from portd._client.aio import AsyncClient
from portd._client.errors import PortdError
from portd.adapters.gateway.balancing import Target
from portd.core.hostnames import GATEWAY_SERVICE, PublicName

logger = logging.getLogger(__name__)

RETRY_S: Final = 0.25
"""Seconds between two attempts to reach the daemon."""
CACHE_MAX: Final = 4_096
"""Answers that are kept: names that nobody has are answered, and kept, too."""
ENDED_MAX: Final = 5

_Key = tuple[str, str]


class Ended(NamedTuple):
    """An instance that has ended."""

    instance: str
    ended_at: datetime
    because: str


class Directory:
    """Services as the daemon shows them. `on_connect` is called whenever the daemon has been reached again."""

    def __init__(self, client: AsyncClient, on_connect: Callable[[], Awaitable[None]]) -> None:
        self._client = client
        self._on_connect = on_connect
        self._is_following = False
        self._known: dict[_Key, list[Target]] = {}
        self._last: dict[_Key, list[Target]] = {}
        self._changed_at: dict[str, int] = {}
        self._changes: dict[str, asyncio.Event] = {}

    async def follow(self) -> None:
        """Follow the daemon's events until cancelled."""
        while True:
            try:
                await self._follow_once()
            except (PortdError, OSError) as error:
                if self._is_following:
                    logger.warning("the daemon is away: %s", error)
            finally:
                self._is_following = False
            await asyncio.sleep(RETRY_S)

    @property
    def is_following(self) -> bool:
        """Return whether the daemon answers."""
        return self._is_following

    async def targets(self, names: Sequence[PublicName]) -> list[Target]:
        """Return the instances that serve the first of these names that anybody serves; none where nobody does."""
        for name in names:
            found = await self._serving(name.service, name.endpoint)
            if name.instance is not None:
                found = [target for target in found if target.instance == name.instance]
            if found:
                return found
        return []

    async def wait_for_change(self, names: Sequence[PublicName], timeout_s: float) -> None:
        """Wait until one of the services changes, `timeout_s` seconds at most."""
        waiting = [
            asyncio.ensure_future(self._changes.setdefault(service, asyncio.Event()).wait())
            for service in {name.service for name in names}
        ]
        try:
            await asyncio.wait(waiting, timeout=max(timeout_s, 0.0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    async def live(self, name: PublicName) -> list[dict[str, Any]]:
        """Return the live leases with a name, whether they serve or not; none while the daemon is away."""
        with suppress(PortdError, OSError):
            page: Any = await self._client.call(calls.leases(service=name.service, endpoint=name.endpoint))
            return [lease for lease in page["leases"] if name.instance in (None, lease["instance"])]
        return []

    async def ended(self, name: PublicName) -> list[Ended]:
        """Return the newest ended leases with a name; none while the daemon is away."""
        with suppress(PortdError, OSError):
            page: Any = await self._client.call(calls.leases(service=name.service, state="ended"))
            found = [
                Ended(lease["instance"], datetime.fromisoformat(lease["ended_at"]), lease["ended_because"])
                for lease in page["leases"]
                if lease["endpoint"] == name.endpoint and name.instance in (None, lease["instance"])
            ]
            return sorted(found, key=lambda one: one.ended_at, reverse=True)[:ENDED_MAX]
        return []

    async def services(self) -> list[str]:
        """Return the names of services that somebody serves; none while the daemon is away."""
        with suppress(PortdError, OSError):
            page: Any = await self._client.call(calls.services())
            return [one["name"] for one in page["services"] if one["serving"] and one["name"] != GATEWAY_SERVICE]
        return []

    async def _follow_once(self) -> None:
        _, headers = await self._client.exchange(calls.leases(limit=1))
        revision = int(headers["x-portd-revision"])
        self._known.clear()
        self._changed_at.clear()
        self._is_following = True
        self._wake_all()
        await self._on_connect()
        async for event in self._client.events(after=revision):
            service = event.data["service"]
            self._changed_at[service] = event.revision
            for key in [key for key in self._known if key[0] == service]:
                del self._known[key]
            self._wake(service)

    async def _serving(self, service: str, endpoint: str) -> list[Target]:
        key = (service, endpoint)
        known = self._known.get(key)
        if known is not None and self._is_following:
            return known
        try:
            answer: Any = await self._client.call(
                calls.service(service, endpoint=endpoint, serving=True, scope="local")
            )
        except (PortdError, OSError):
            return self._last.get(key, [])
        found = [_target(lease) for lease in answer["instances"] if lease["protocol"] != "udp"]
        if len(self._last) >= CACHE_MAX:
            self._last.clear()
            self._known.clear()
        self._last[key] = found
        if answer["revision"] >= self._changed_at.get(service, 0):
            self._known[key] = found
        return found

    def _wake(self, service: str) -> None:
        if waiting := self._changes.pop(service, None):
            waiting.set()

    def _wake_all(self) -> None:
        for service in list(self._changes):
            self._wake(service)


def _target(lease: dict[str, Any]) -> Target:
    check = lease.get("check") or {}
    return Target(
        lease["instance"],
        "https" if check.get("tls") else "http",
        {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(lease["address"], lease["address"]),
        lease["port"],
        lease["weight"],
        lease["priority"],
    )
