"""Keeps the description of owners current: a process becomes another program by exec, or another user.

The kernel notifies nobody without privilege, so each owner is read again after pauses that double: an exec soon after
the grant (`portd run`, a shell's exec) is seen at once, a later one within a minute, for 10 µs each.
"""

from __future__ import annotations

import asyncio
from typing import Final

from portd.adapters.kernel import procfs
from portd.adapters.kernel.inspection import DIRECT, Inspection
from portd.core.expiry import Deadlines
from portd.core.model import Lease, Owner, ProcessId
from portd.leasing.seams import ReportOwner

FIRST_S: Final = 0.1
LONGEST_S: Final = 64.0
"""Pauses between two readings of an owner, in seconds."""
CHECKS_MAX: Final = 256
"""Owners that are read in one go, for 3 ms; the others follow in the next poll."""


class OwnerWatch:
    """Reads the owners of live leases again, and reports those that have changed."""

    def __init__(self, report: ReportOwner, inspection: Inspection = DIRECT) -> None:
        self._inspection = inspection
        self._report = report
        self._owners: dict[ProcessId, Owner] = {}
        self._leases: dict[ProcessId, set[str]] = {}
        self._process_of: dict[str, ProcessId] = {}
        self._pauses: dict[ProcessId, float] = {}
        self._due: Deadlines[ProcessId] = Deadlines()

    def follow(self, lease: Lease) -> None:
        """Follow a lease as an event leaves it: its owner may be new, or gone."""
        process = None if lease.state == "ended" else lease.process
        before = self._process_of.get(lease.id)
        if before != process:
            self._leave(lease.id)
        if process is None:
            return
        self._owners[process] = lease.owner
        if before != process:
            self._process_of[lease.id] = process
            self._leases.setdefault(process, set()).add(lease.id)
            self._set(process, FIRST_S)

    def check_due(self) -> None:
        """Read the owners that are due, and report those that have changed."""
        due = self._due.pop_due(asyncio.get_running_loop().time())
        for process in due[:CHECKS_MAX]:
            self._check(process)
        for process in due[CHECKS_MAX:]:
            self._set(process, 0.0)

    def _check(self, process: ProcessId) -> None:
        known = self._owners[process]
        changed = (known.uid, known.cmdline) != (procfs.uid(process.pid), procfs.cmdline(process.pid))
        self._set(process, min(2 * self._pauses[process], LONGEST_S))
        if not changed:
            return
        owner = procfs.describe(process.pid, known.known_by, read_exe=self._inspection.exe)
        if owner is not None and procfs.start_ticks(process.pid) == process.start_ticks:
            self._report(process, owner)

    def _set(self, process: ProcessId, pause_s: float) -> None:
        self._pauses[process] = pause_s or self._pauses[process]
        self._due.set(process, asyncio.get_running_loop().time() + pause_s)

    def _leave(self, lease_id: str) -> None:
        process = self._process_of.pop(lease_id, None)
        if process is None:
            return
        self._leases[process].discard(lease_id)
        if not self._leases[process]:
            del self._leases[process], self._owners[process], self._pauses[process]
            self._due.discard(process)
