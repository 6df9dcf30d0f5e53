"""The only clock: monotonic time for deadlines, wall time for people, and the time lost while the daemon was stopped.

CLOCK_MONOTONIC stands still while the machine sleeps (clock_gettime(2)); it does not while the daemon alone is stopped
(SIGSTOP, a debugger, a starved container). Then nobody could renew, and it is not the owners who are late: the whole
gap is given back to every deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from portd.core.model import Now

logger = logging.getLogger(__name__)

HEARTBEAT_S: Final = 0.5
"""How often the clock is read when nobody else does; two wake-ups a second cost nothing that can be measured."""
GAP_S: Final = 1.5
"""Two readings further apart than this mean that the daemon did not run. Below it a loop may just have been busy."""


class LeaseClock:
    """A clock whose ticks count the time that the daemon ran. `started_at` is a reading of time.monotonic()."""

    def __init__(self) -> None:
        self._lost_s = 0.0
        self.started_at = self._last = time.monotonic()

    def now(self) -> Now:
        """Read the clock."""
        monotonic = time.monotonic()
        gap_s = monotonic - self._last
        self._last = monotonic
        if gap_s > GAP_S:
            self._lost_s += gap_s
            logger.warning("portd was suspended for %.1f s: ttl leases are extended by as much", gap_s)
        # To the microsecond, as times are shown: whoever asks for a moment that was shown means just that one.
        return Now(time.time_ns() // 1000 / 1_000_000, monotonic - self._lost_s)

    @property
    def lost_s(self) -> float:
        """Return how many seconds have been given back since the start."""
        return self._lost_s

    async def run(self) -> None:
        """Read the clock often enough that a gap means a stop."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.now()
