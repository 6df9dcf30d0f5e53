"""Waiting for ports: whoever waits is woken when a port may have become free."""

from __future__ import annotations

import asyncio
from typing import Final

POLL_S: Final = 0.5
"""Seconds between two attempts of those who wait for a port of a foreign process: no event reports its exit."""


class Freed:
    """Wakes everybody who waits for a port."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Wake all: a lease ended or moved, a cooldown is over."""
        waiting, self._waiting = self._waiting, set()
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, timeout_s: float) -> None:
        """Wait until a port may have become free, or until it is time to try again all the same."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            async with asyncio.timeout(min(timeout_s, POLL_S)):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(waiter)
