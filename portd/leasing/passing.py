"""What happens to a lease when its owner exits: it ends, or passes to a process of its own that still listens.

Who that is, the kernel adapter finds out (`FindSuccessors`) and reports (`observe_exit`). An ended lease whose owner
exited before anything listened may be reported once more, within the cooldown: then it is taken up again under its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from portd.core.allocator import Allocator
from portd.core.bindings import binding_of
from portd.core.errors import Refusal
from portd.core.model import Event, Lease, ProcessId
from portd.core.ownership import KIN_MAX, key_of
from portd.core.table import LeaseTable
from portd.core.transitions import Change
from portd.leasing.journal import Journal, end
from portd.leasing.owners import Owners
from portd.leasing.seams import Clock, FindSuccessors, ForeignNetwork, Process, Processes, ProcessGone, Successor
from portd.leasing.timers import HoldKeeper


class Passing:
    """Ends and passes the leases of exited owners."""

    def __init__(
        self,
        table: LeaseTable,
        allocator: Allocator,
        journal: Journal,
        processes: Processes,
        clock: Clock,
        keeper: HoldKeeper,
        owners: Owners,
    ) -> None:
        self._table = table
        self._allocator = allocator
        self._journal = journal
        self._processes = processes
        self._clock = clock
        self._keeper = keeper
        self._owners = owners
        self._before: dict[str, ProcessId | None] = {}
        self.find_successors: FindSuccessors = self._end_all

    def owners_exited(self, leases: list[Lease]) -> None:
        """End the leases of exited owners, or pass them on. A ttl lease outlives its owner and is none of them."""
        if leases:
            self.find_successors(leases)

    def observe_exit(self, lease: Lease, successor: Successor | None) -> None:
        """Apply what was found out about an exited owner's lease; one that is not that owner's any more stays as it
        is."""
        if lease.id in self._before:
            return  # it is on its way to another process: what comes of it settles this too
        current = self._table.get(lease.id)
        process = None if successor is None else self._find(successor, lease)
        if current is None:
            if successor is not None and process is not None:
                self._resume(lease, successor, process)
        elif current.process == lease.process:
            if successor is not None and process is not None and self._watch_quietly(process.id):
                self.pass_to(current, process, successor)
            else:
                self._journal.observe(end(lease.id, "owner_exited", self._clock.now().at))

    def pass_to(self, lease: Lease, process: Process, successor: Successor) -> None:
        """Pass a live lease to another process, whose exit is waited for already."""
        self._before[lease.id] = lease.process
        fields = _fields(process, successor) | {"passed_from": lease.owner}
        self._journal.observe(Change(lease.id, "passed", fields))

    def begin(self, lease: Lease) -> None:
        """Begin to pass a lease on request: `on_passed` or `give_up` ends it."""
        self._before[lease.id] = lease.process

    def give_up(self, lease: Lease, process: ProcessId) -> None:
        """Leave a lease with its owner, which may have exited meanwhile."""
        self._before.pop(lease.id, None)
        self._owners.forget(process)
        current = self._table.get(lease.id)
        if current is not None:
            self._check_owner(current)

    def on_passed(self, event: Event) -> None:
        """Settle a `passed` event: stop waiting for the old owner's exit, and see whether the new one has exited."""
        lease = event.lease
        self._owners.forget(self._before.pop(lease.id, None))
        self._check_owner(lease)

    def _check_owner(self, lease: Lease) -> None:
        """See whether an owner has exited that nothing waited for at the time."""
        if lease.lifetime != "ttl" and lease.process is not None and not self._processes.is_alive(lease.process):
            self.owners_exited([lease])

    def _resume(self, ended: Lease, successor: Successor, process: Process) -> None:
        """Take an ended lease up again, where its name and port are still free."""
        lease = replace(
            ended,
            state="held",
            ended_at=None,
            ended_because=None,
            passed_from=ended.owner,
            **_fields(process, successor),
        )
        if self._table.named(*lease.name) is not None or self._table.conflicting(binding_of(lease)) is not None:
            return
        if self._watch_quietly(process.id):
            self._table.reserve(lease, None)
            if lease.own_address:
                self._allocator.own.use(lease.address, (lease.service, lease.instance, lease.user))
            self._journal.observe(Change(lease.id, "passed", lease=lease))
            self._keeper.restore(lease)

    def _find(self, successor: Successor, lease: Lease) -> Process | None:
        try:
            process = self._processes.find(successor.pid, lease.owner.known_by)
        except (ProcessGone, ForeignNetwork, OSError):
            return None
        return process if process.id.start_ticks == successor.start_ticks else None

    def _watch_quietly(self, process: ProcessId) -> bool:
        try:
            self._owners.watch(process)
        except Refusal:
            return False
        return True

    def _end_all(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            self.observe_exit(lease, None)


def transferred(lease: Lease, process: Process) -> dict[str, Any]:
    """Return the fields of a lease that goes to another process; its old owner's listeners stay its own."""
    known = lease.kin if lease.process is None else (key_of(lease.process), *lease.kin)
    return {
        "process": process.id,
        "owner": process.owner,
        "passed_from": lease.owner,
        "kin": known[:KIN_MAX],
        "elsewhere": (),
    }


def _fields(process: Process, successor: Successor) -> dict[str, Any]:
    return {
        "process": process.id,
        "owner": process.owner,
        "listening": successor.listening,
        "vouched_by": successor.vouched_by,
        "elsewhere": (),
        "kin": successor.kin,
    }
