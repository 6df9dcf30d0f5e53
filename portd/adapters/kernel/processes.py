"""The processes of this host: their identity, and the moment of their exit, by pidfd (pidfd_open(2)).

A process is distinguished from a later one with its pid by its start time, and by the inode of its pidfd where the
kernel numbers them (pidfs, Linux 6.9). The pidfd is opened first, then /proc is read, then the pidfd is polled for
whether its process still runs: if so, all that was read is of that process, since nobody else can have had its pid
meanwhile.

A pidfd says "gone" at the exit of the last thread. So a zombie is gone, for its sockets are closed; a process whose
first thread alone has ended is not, though /proc calls it a zombie. exec keeps the pid, the start time and the pidfd.

The loop waits for one epoll of all pidfds (epoll(7)): a reader of the loop's own for each costs thrice as much.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Callable
from typing import Final

from portd.adapters.kernel import descriptors, procfs
from portd.adapters.kernel.inspection import DIRECT, Inspection
from portd.core.model import KnownBy, ProcessId
from portd.leasing.seams import ForeignNetwork, Process, ProcessGone

OnExit = Callable[[ProcessId], None]
LIVENESS_CACHE_S: Final = 0.001
"""Reuse a liveness check for this long, or for a turn of the loop where that is longer. An exit inside the window is
indistinguishable from one just after the reply, and a pid is not recycled within a millisecond."""
DESCRIPTION_CACHE_S: Final = 0.1
"""Reuse a process' command line and network for this long: one that leases by the hundred is not read for each.
An exec within it is seen when the port is bound, at the latest."""


class _Known:
    """A process by its pidfd, and its last description (None before the first). Times are loop seconds."""

    __slots__ = ("checked_at", "id", "last", "pidfd", "read_at")

    def __init__(self, identity: ProcessId, pidfd: int) -> None:
        self.id = identity
        self.pidfd = pidfd
        self.last: Process | None = None
        self.checked_at = self.read_at = float("-inf")


class KernelProcesses:
    """Implements `Processes`. One pidfd for each watched process, however many leases it has, and one for the process
    that was found last: a watch is about to follow."""

    def __init__(self, inspection: Inspection = DIRECT) -> None:
        self._inspection = inspection
        self._loop = asyncio.get_running_loop()
        self._network = procfs.network_namespace("self")
        self._numbered = _pidfds_are_numbered()
        self._watched: dict[ProcessId, _Known] = {}
        self._exits: dict[int, tuple[ProcessId, OnExit]] = {}  # by pidfd
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll.fileno(), self._on_readable)
        self._found: _Known | None = None
        self._newest: dict[int, _Known] = {}  # by pid; an older one may have exited, its callback still to come

    def find(self, pid: int, known_by: KnownBy) -> Process:
        """Read a live process; one whose pidfd is open is read again only where it may have changed.

        Raises ProcessGone, for the id of a thread too; ForeignNetwork; OSError(EMFILE) at the file limit.
        """
        known, now = self._newest.get(pid), self._loop.time()
        if known is not None:
            last = known.last
            if last is not None and now - known.checked_at < LIVENESS_CACHE_S and last.owner.known_by == known_by:
                return last
            if not _has_exited(known.pidfd):
                return self._read_again(known, known_by, now)
        return self._read(pid, known_by, now)

    def translate(self, pid: int, caller_pid: int) -> int:
        """Return the pid that portd knows a process by which the caller names in its own pid namespace.

        Raises ProcessGone where that namespace has no such process, or the kernel hides the namespace. Costs a walk of
        /proc for a caller in a namespace below portd's, else one read.
        """
        depth = len(procfs.namespace_pids(caller_pid))
        if depth == 1:
            return pid
        namespace = self._inspection.pid_namespace(caller_pid)
        if namespace is not None:
            for candidate in procfs.pids():
                numbers = procfs.namespace_pids(candidate)
                if (
                    len(numbers) == depth
                    and numbers[-1] == pid
                    and self._inspection.pid_namespace(candidate) == namespace
                ):
                    return candidate
        raise ProcessGone(pid)

    def watch(self, process: ProcessId, on_exit: OnExit) -> None:
        """Call `on_exit` once, on the event loop, when the process is gone; the first of several calls counts.

        Raises ProcessGone when it is gone already, or its pid is somebody else's by now; OSError(EMFILE) at the file
        limit.
        """
        if process in self._watched:
            return
        known = self._found
        if known is None or known.id != process:
            known = self._find_again(process)
        elif _has_exited(known.pidfd):
            raise ProcessGone(process.pid)
        self._epoll.register(known.pidfd, select.EPOLLIN)
        self._watched[process] = known
        self._exits[known.pidfd] = process, on_exit
        self._found = None

    def unwatch(self, process: ProcessId) -> None:
        """Close the pidfd; nothing happens when there is none."""
        known = self._watched.pop(process, None)
        if known is not None:
            self._epoll.unregister(known.pidfd)
            del self._exits[known.pidfd]
            self._forget(known)

    def is_alive(self, process: ProcessId) -> bool:
        """Return whether exactly this process still runs.

        Where that can't be known (the file limit) it does: rather a lease too many for a while than one too few.
        """
        watched = self._watched.get(process)
        if watched is not None:
            return not _has_exited(watched.pidfd)
        try:
            pidfd = _open(process.pid)
            try:
                return self._is(process, pidfd)
            finally:
                os.close(pidfd)
        except ProcessGone:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close every pidfd; no exit is reported any more."""
        for process in list(self._watched):
            self.unwatch(process)
        self._keep(None)
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    @property
    def watched_count(self) -> int:
        """Return how many processes are watched."""
        return len(self._watched)

    def _on_readable(self) -> None:
        """Report the processes that are gone, a thousand at most; the others follow in the loop's next turn."""
        for process, on_exit in [self._exits[pidfd] for pidfd, _ in self._epoll.poll(0)]:
            if process in self._watched:  # what the one before it led to may have ended its watch
                self.unwatch(process)
                on_exit(process)

    def _read(self, pid: int, known_by: KnownBy, now: float) -> Process:
        """Read a process whose pidfd is not open yet."""
        pidfd = _open(pid)
        try:
            stat = _stat(pid)
            owner = procfs.describe(pid, known_by, stat, read_exe=self._inspection.exe)
            self._check_network(pid)
            if owner is None or _has_exited(pidfd):
                raise ProcessGone(pid)
            known = _Known(self._identity(pid, pidfd, stat), pidfd)
        except BaseException:
            os.close(pidfd)
            raise
        found = known.last = Process(known.id, owner)
        known.read_at = now
        self._keep(known)
        return found

    def _read_again(self, known: _Known, known_by: KnownBy, now: float) -> Process:
        """Return a process as it was described, or describe it anew after an exec or a change of user."""
        pid, last = known.id.pid, known.last
        is_fresh = now - known.read_at < DESCRIPTION_CACHE_S
        if not is_fresh:
            self._check_network(pid)
            known.read_at = now
        if (
            last is None
            or last.owner.known_by != known_by
            or last.owner.uid != procfs.uid(pid)
            or not (is_fresh or last.owner.cmdline == procfs.cmdline(pid))
        ):
            owner = procfs.describe(pid, known_by, read_exe=self._inspection.exe)
            if owner is None or _has_exited(known.pidfd):
                raise ProcessGone(pid)
            last = known.last = Process(known.id, owner)
        known.checked_at = now
        return last

    def _find_again(self, process: ProcessId) -> _Known:
        """Open the pidfd of a process that was found before (a restart); raises ProcessGone, OSError."""
        pidfd = _open(process.pid)
        try:
            if not self._is(process, pidfd):
                raise ProcessGone(process.pid)
        except BaseException:
            os.close(pidfd)
            raise
        known = _Known(process, pidfd)
        self._keep(known)
        return known

    def _keep(self, found: _Known | None) -> None:
        """Keep the pidfd of who was found last, instead of the one before."""
        if self._found is not None:
            self._forget(self._found)
        self._found = found
        if found is not None:
            self._newest[found.id.pid] = found

    def _forget(self, known: _Known) -> None:
        if self._newest.get(known.id.pid) is known:
            del self._newest[known.id.pid]
        os.close(known.pidfd)

    def _check_network(self, pid: int) -> None:
        network = procfs.network_namespace(pid)
        if network is None:
            raise ProcessGone(pid)
        if network != self._network:
            raise ForeignNetwork(pid)

    def _is(self, process: ProcessId, pidfd: int) -> bool:
        """Return whether a pidfd refers to exactly this process, and it runs; raises ProcessGone, OSError."""
        return self._identity(process.pid, pidfd, _stat(process.pid)) == process and not _has_exited(pidfd)

    def _identity(self, pid: int, pidfd: int, stat: procfs.Stat) -> ProcessId:
        inode = os.fstat(pidfd).st_ino if self._numbered else 0
        return ProcessId(pid, stat.start_ticks, procfs.boot_id(), inode)


def _open(pid: int) -> int:
    """Open a pidfd; raises ProcessGone, OSError(EMFILE).

    The id of a thread, and what is no pid at all, answer ENOENT or EINVAL, by the kernel's version.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
            raise ProcessGone(pid) from error
        raise
    try:
        descriptors.check_unreserved(pidfd)
    except OSError:
        os.close(pidfd)
        raise
    return pidfd


def _stat(pid: int) -> procfs.Stat:
    """Read a process' stat; raises ProcessGone, also for one that /proc hides (hidepid=), or OSError(EMFILE)."""
    try:
        return procfs.stat(pid)
    except (FileNotFoundError, ProcessLookupError, PermissionError) as error:
        raise ProcessGone(pid) from error


def _has_exited(pidfd: int) -> bool:
    """Return whether a pidfd's process is gone: it becomes readable then. Half a microsecond."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _pidfds_are_numbered() -> bool:
    """Return whether pidfds have inodes of their own. Before pidfs they shared one, with all anonymous descriptors."""
    pidfd, anonymous = os.pidfd_open(os.getpid()), os.eventfd(0)
    try:
        return os.fstat(pidfd).st_dev != os.fstat(anonymous).st_dev
    finally:
        os.close(pidfd)
        os.close(anonymous)
