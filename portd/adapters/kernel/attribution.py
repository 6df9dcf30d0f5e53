"""The processes of listening sockets, remembered by inode and refreshed where they may have changed.

Attributing a socket is the expensive part of watching (a walk of /proc at worst), so it is done once for each socket,
and again only for one that no rule makes a lease's own: it may have been passed on since (SCM_RIGHTS).
This module must not know leases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from portd.core.model import Listener
from portd.core.ownership import Holder, inherit

BATCH_MAX: Final = 1024
"""Sockets that are attributed in one go; the rest follow in the next poll."""
AGAIN_S: Final = 0.25
AGAIN_MAX_S: Final = 30.0
"""When a socket that is nobody's own is attributed again, after pauses that double."""


class HolderTable(Protocol):
    """The kernel's table of listening sockets, and of the processes that have them open."""

    def listeners(self, port: int | None = None) -> list[Listener]: ...

    async def holders(self, inodes: Collection[int], likely_pids: Sequence[int] = ()) -> dict[int, Holder]: ...


class _Known(NamedTuple):
    """When an attribution is due again (loop seconds), and the pause before it."""

    again_at: float
    wait_s: float


class Attribution:
    """What is known of the processes behind sockets. `holders` is the view that rules are applied to."""

    def __init__(self, table: HolderTable) -> None:
        self._table = table
        self._holders: dict[int, Holder] = {}
        self._known: dict[int, _Known] = {}

    @property
    def holders(self) -> Mapping[int, Holder]:
        """Return the attributed sockets' holders, by inode."""
        return self._holders

    def keep(self, inodes: Collection[int]) -> None:
        """Forget all sockets but these: the others are closed."""
        if len(self._holders) > len(inodes) or not self._holders.keys() <= set(inodes):
            self._holders = {inode: holder for inode, holder in self._holders.items() if inode in inodes}
            self._known = {inode: known for inode, known in self._known.items() if inode in inodes}

    def is_due(self, inode: int, now: float) -> bool:
        """Return whether a socket must be attributed: it is new, or it is time to do it again."""
        known = self._known.get(inode)
        return known is None or known.again_at <= now

    async def refresh_all(self, inodes: Collection[int], likely_pids: Collection[int]) -> None:
        """Attribute all of these sockets anew; raises OSError."""
        left = list(inodes)
        while left:
            await self.refresh(left, likely_pids)
            left = left[BATCH_MAX:]

    async def refresh(self, inodes: Iterable[int], likely_pids: Collection[int]) -> None:
        """Attribute sockets, BATCH_MAX at most; raises OSError."""
        batch = list(inodes)[:BATCH_MAX]
        found = await self._table.holders(batch, sorted(likely_pids))
        now = asyncio.get_running_loop().time()
        for inode in batch:
            self._holders[inode] = inherit(found[inode], self._holders.get(inode))
            before = self._known.get(inode)
            wait_s = AGAIN_S if before is None else min(2 * before.wait_s, AGAIN_MAX_S)
            self._known[inode] = _Known(now + wait_s, wait_s)
