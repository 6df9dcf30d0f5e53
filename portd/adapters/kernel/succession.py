"""Who has a lease's port after its owner exited: a process of its own that still listens, or one that soon will.

Two cases. At the exit an own listener is left (a server that put itself into the background after it had bound, an
upgrade that passed its socket on): the lease passes to that process. Or nothing of the lease's own had listened yet (a
server that forks first): then an own listener that appears within the cooldown takes the ended lease up again.

The first exit is answered at once; those that follow within BATCH_S are answered together, by one read of the table.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from portd.adapters.kernel.attribution import Attribution, HolderTable
from portd.core.bindings import conflicts_at
from portd.core.model import Event, Lease, Listener
from portd.core.ownership import Judgement, judge, kin_of, may_stand_in
from portd.leasing.seams import ObserveExit, Successor

logger = logging.getLogger(__name__)

LeasesOn = Callable[[int], Sequence[Lease]]
BATCH_S: Final = 0.002
"""Exits that follow one another within this time are answered together: a query for one port costs 0.3 ms."""


class Succession:
    """Finds the successors of exited owners, and reports each lease with its successor or None."""

    def __init__(
        self,
        sockets: HolderTable,
        attribution: Attribution,
        leases_on: LeasesOn,
        observe_exit: ObserveExit,
        cooldown_s: float,
    ) -> None:
        self._sockets = sockets
        self._attribution = attribution
        self._leases_on = leases_on
        self._observe_exit = observe_exit
        self._cooldown_s = cooldown_s
        self._batch: list[Lease] = []
        self._answered_at = float("-inf")
        self._tasks: set[asyncio.Task[None]] = set()
        self._lapsed: dict[int, dict[str, tuple[Lease, float]]] = {}

    # --- at the exit ---

    def owners_exited(self, leases: Sequence[Lease]) -> None:
        """Find out who listens on the leases of an owner that has exited, and report each lease."""
        loop = asyncio.get_running_loop()
        if self._batch:
            self._batch += leases
        elif loop.time() - self._answered_at < BATCH_S:
            self._batch += leases
            loop.call_later(BATCH_S, self._answer_batch)
        else:
            self._answer(leases)

    def _answer_batch(self) -> None:
        leases, self._batch = self._batch, []
        self._answer(leases)

    def _answer(self, leases: Sequence[Lease]) -> None:
        """Report the leases on whose ports nobody listens, and have the others judged."""
        self._answered_at = asyncio.get_running_loop().time()
        by_port = self._listeners({lease.port for lease in leases})
        undecided: list[tuple[Lease, list[Listener]]] = []
        for lease in leases:
            others = self._leases_on(lease.port)
            candidates = [
                listener
                for listener in by_port.get(lease.port, ())
                if conflicts_at(listener, lease) or may_stand_in(listener, lease, others)
            ]
            if candidates:
                undecided.append((lease, candidates))
            else:
                self._observe_exit(lease, None)
        if undecided:
            task = asyncio.get_running_loop().create_task(self._decide(undecided))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _listeners(self, ports: set[int]) -> dict[int, list[Listener]]:
        """List the listeners of these ports; one that can't be read counts as having none."""
        by_port: dict[int, list[Listener]] = {}
        try:
            for listener in self._sockets.listeners(*ports if len(ports) == 1 else ()):
                if listener.port in ports:
                    by_port.setdefault(listener.port, []).append(listener)
        except OSError as error:
            logger.error("the kernel's socket table can't be read, leases of exited owners end: %s", error)
        return by_port

    async def _decide(self, undecided: list[tuple[Lease, list[Listener]]]) -> None:
        inodes = {listener.inode for _, candidates in undecided for listener in candidates}
        likely = {pid for lease, _ in undecided for pid, _ in lease.kin}
        try:
            await self._attribution.refresh_all(inodes, likely)
        except OSError as error:
            logger.error("who has the ports of exited owners can't be read, their leases end: %s", error)
        for lease, candidates in undecided:
            others = self._leases_on(lease.port)
            self._observe_exit(
                lease, successor(lease, judge(lease, candidates, self._attribution.holders, others=others))
            )

    # --- within the cooldown ---

    def apply(self, event: Event) -> None:
        """Follow an event: an owner that exited before it listened may have left a process that will."""
        lease = event.lease
        if lease.state != "ended":
            self._forget_lapsed(lease)
        elif lease.ended_because == "owner_exited" and lease.lifetime != "ttl" and not lease.kin and self._cooldown_s:
            until = asyncio.get_running_loop().time() + self._cooldown_s
            self._lapsed.setdefault(lease.port, {})[lease.id] = lease, until

    def is_waiting(self) -> bool:
        """Return whether an ended lease may still be taken up again; forgets those whose time is over."""
        now = asyncio.get_running_loop().time()
        for port, lapsed in list(self._lapsed.items()):
            for lease_id in [lease_id for lease_id, (_, until) in lapsed.items() if until <= now]:
                del lapsed[lease_id]
            if not lapsed:
                del self._lapsed[port]
        return bool(self._lapsed)

    def is_expected_on(self, port: int) -> bool:
        """Return whether an ended lease of this port may still be taken up again."""
        return port in self._lapsed

    def judge_port(self, port: int, listeners: Sequence[Listener]) -> list[int]:
        """Report the ended leases of a port that an own listener has appeared for; returns the sockets that must be
        attributed first."""
        unknown: list[int] = []
        holders = self._attribution.holders
        for lease, _ in list(self._lapsed.get(port, {}).values()):
            judgement = judge(lease, listeners, holders, others=self._leases_on(port))
            if judgement.own and not judgement.foreign:
                self._forget_lapsed(lease)
                self._observe_exit(lease, successor(lease, judgement))
            elif not judgement.is_complete:
                unknown += [listener.inode for listener in listeners if listener.inode not in holders]
        return unknown

    def _forget_lapsed(self, lease: Lease) -> None:
        lapsed = self._lapsed.get(lease.port)
        if lapsed is not None:
            for lease_id in [each.id for each, _ in lapsed.values() if each.id == lease.id or each.name == lease.name]:
                del lapsed[lease_id]
            if not lapsed:
                del self._lapsed[lease.port]


def successor(lease: Lease, judgement: Judgement) -> Successor | None:
    """Return the process that a lease passes to: the first of its own listeners that the kernel shows, or None."""
    for own in judgement.own:
        if own.holder.ancestors:
            pid, start_ticks = own.holder.ancestors[0]
            return Successor(pid, start_ticks, own.vouched_by, judgement.listening, kin_of(lease, judgement.own))
    return None
