"""The processes of this host: who they are, and the moment that they are gone, by pidfd (pidfd_open(2)).

A process is told from a later one with its pid by its start time, and by the inode of its pidfd where the kernel
numbers them (pidfs, Linux 6.9). Its pidfd is opened first and its start time read after: what is read then belongs to
the process that the descriptor refers to, or the comparison fails. A zombie has exited: its sockets are closed.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from typing import Final

from portd.adapters.kernel import procfs
from portd.core.model import KnownBy, ProcessId
from portd.seams import ForeignNetwork, Process, ProcessGone

OnExit = Callable[[ProcessId], None]
FRESH_MAX: Final = 4096
"""Described processes that are kept while they are watched."""


class KernelProcesses:
    """Implements `Processes`. One pidfd for each watched process, however many leases it has."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._network = procfs.network_namespace()
        self._numbered = _pidfs_numbers_processes()
        self._pidfds: dict[ProcessId, int] = {}
        self._watched: dict[int, Process] = {}
        self._polls: dict[int, select.poll] = {}

    def find(self, pid: int, known_by: KnownBy) -> Process:
        """Read a live process; a watched one is remembered, since its pidfd tells whether it still is the same.

        Raises ProcessGone or ForeignNetwork. Where the kernel hides a process' network namespace (another user's, no
        CAP_SYS_PTRACE) it is taken for this host's.
        """
        watched = self._watched.get(pid)
        if watched is not None and not self._polls[pid].poll(0):
            return watched
        descriptor = self._open(pid)
        try:
            identity = self._identify(pid, descriptor)
            network = procfs.network_namespace(pid)
            if network is not None and network != self._network:
                raise ForeignNetwork(pid)
            owner = procfs.describe(pid, known_by)
        finally:
            os.close(descriptor)
        if identity is None or owner is None:
            raise ProcessGone(pid)
        return Process(identity, owner)

    def watch(self, process: ProcessId, on_exit: OnExit) -> None:
        """Call `on_exit` once when the process is gone; raises ProcessGone when it is already."""
        if process in self._pidfds:
            return
        descriptor = self._open(process.pid)
        if self._identify(process.pid, descriptor) != process:
            os.close(descriptor)
            raise ProcessGone(process.pid)
        self._pidfds[process] = descriptor
        self._loop.add_reader(descriptor, self._exited, process, on_exit)

    def remember(self, process: Process) -> None:
        """Keep what was read of a watched process for the next `find`."""
        descriptor = self._pidfds.get(process.id)
        if descriptor is not None and len(self._watched) < FRESH_MAX:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            self._polls[process.id.pid] = poll
            self._watched[process.id.pid] = process

    def unwatch(self, process: ProcessId) -> None:
        """Close the pidfd."""
        descriptor = self._pidfds.pop(process, None)
        if descriptor is not None:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        remembered = self._watched.get(process.pid)
        if remembered is not None and remembered.id == process:
            del self._watched[process.pid], self._polls[process.pid]

    def is_alive(self, process: ProcessId) -> bool:
        """Tell whether exactly this process still runs."""
        try:
            descriptor = self._open(process.pid)
        except (ProcessGone, OSError):
            return False
        try:
            return self._identify(process.pid, descriptor) == process
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close every pidfd."""
        for process in list(self._pidfds):
            self.unwatch(process)

    @property
    def watched_count(self) -> int:
        """Return how many processes are watched."""
        return len(self._pidfds)

    def _exited(self, process: ProcessId, on_exit: OnExit) -> None:
        self.unwatch(process)
        on_exit(process)

    @staticmethod
    def _open(pid: int) -> int:
        """Open a pidfd; raises ProcessGone, also for the id of a thread (ENOENT, EINVAL), or OSError(EMFILE)."""
        try:
            return os.pidfd_open(pid)
        except (ProcessLookupError, FileNotFoundError) as error:
            raise ProcessGone(pid) from error
        except OSError as error:
            if error.errno == 22:  # EINVAL: not a thread-group leader, or no pid at all
                raise ProcessGone(pid) from error
            raise

    def _identify(self, pid: int, descriptor: int) -> ProcessId | None:
        ticks = procfs.start_ticks(pid)
        if ticks is None:
            return None
        inode = os.fstat(descriptor).st_ino if self._numbered else 0
        return ProcessId(pid, ticks, procfs.boot_id(), inode)


def _pidfs_numbers_processes() -> bool:
    """Tell whether pidfds have inodes of their own: before pidfs all shared one."""
    inodes = set()
    for pid in (os.getpid(), 1 if os.getpid() != 1 else os.getppid() or 2):
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return False
        inodes.add(os.fstat(descriptor).st_ino)
        os.close(descriptor)
    return len(inodes) == 2
