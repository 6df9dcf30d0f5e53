"""The processes of this host: who they are, and the moment that they are gone, by pidfd (pidfd_open(2)).

A process is told from a later one with its pid by its start time, and by the inode of its pidfd where the kernel
numbers them (pidfs, Linux 6.9). The pidfd is opened first, then /proc is read, then the pidfd is asked whether its
process still runs: if so, all that was read is of that process, since nobody else can have had its pid meanwhile.

A pidfd says "gone" at the exit of the last thread. So a zombie is gone, for its sockets are closed; a process whose
first thread alone has ended is not, though /proc calls it a zombie. exec keeps the pid, the start time and the pidfd.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Callable
from typing import Final

from portd.adapters.kernel import procfs
from portd.core.model import KnownBy, Owner, ProcessId
from portd.seams import ForeignNetwork, Process, ProcessGone

OnExit = Callable[[ProcessId], None]
FRESH_S: Final = 0.1
"""How long a watched process' command line and network are taken for what they were: one that leases by the hundred
is not read for each. An exec within it is seen when the port is bound, at the latest. Its user is asked every time,
for rights hang on it."""


class _Watched:
    """A process that is waited for, and how it was described last (None until somebody asks for it again)."""

    __slots__ = ("id", "looked_at", "owner", "pidfd")

    def __init__(self, identity: ProcessId, pidfd: int) -> None:
        self.id = identity
        self.pidfd = pidfd
        self.owner: Owner | None = None
        self.looked_at = float("-inf")


class KernelProcesses:
    """Implements `Processes`. One pidfd for each watched process, however many leases it has."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._network = procfs.network_namespace("self")
        self._numbered = _pidfds_are_numbered()
        self._watched: dict[ProcessId, _Watched] = {}
        self._newest: dict[int, _Watched] = {}  # by pid; an older one may have exited, its callback still to come

    def find(self, pid: int, known_by: KnownBy) -> Process:
        """Read a live process; one that is watched is read again only where it may have changed.

        Raises ProcessGone, for the id of a thread too; ForeignNetwork; OSError(EMFILE) at the file limit. A process
        whose network namespace the kernel hides (another user's, without CAP_SYS_PTRACE) is taken for this host's.
        """
        watched = self._newest.get(pid)
        if watched is not None and not _has_exited(watched.pidfd):
            return Process(watched.id, self._describe_again(watched, known_by))
        pidfd = _open(pid)
        try:
            stat = _stat(pid)
            owner = procfs.describe(pid, known_by, stat)
            self._check_network(pid)
            if owner is None or _has_exited(pidfd):
                raise ProcessGone(pid)
            return Process(self._identity(pid, pidfd, stat), owner)
        finally:
            os.close(pidfd)

    def watch(self, process: ProcessId, on_exit: OnExit) -> None:
        """Call `on_exit` once, on the event loop, when the process is gone; the first of several calls counts.

        Raises ProcessGone when it is gone already, or its pid is somebody else's by now; OSError(EMFILE) at the file
        limit.
        """
        if process in self._watched:
            return
        pidfd = _open(process.pid)
        try:
            if not self._is(process, pidfd):
                raise ProcessGone(process.pid)
            self._loop.add_reader(pidfd, self._exited, process, on_exit)
        except BaseException:
            os.close(pidfd)
            raise
        self._watched[process] = self._newest[process.pid] = _Watched(process, pidfd)

    def unwatch(self, process: ProcessId) -> None:
        """Close the pidfd; nothing happens when there is none."""
        watched = self._watched.pop(process, None)
        if watched is None:
            return
        if self._newest[process.pid] is watched:
            del self._newest[process.pid]
        self._loop.remove_reader(watched.pidfd)
        os.close(watched.pidfd)

    def is_alive(self, process: ProcessId) -> bool:
        """Tell whether exactly this process still runs.

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
        """Close every pidfd; nobody is told of an exit any more."""
        for process in list(self._watched):
            self.unwatch(process)

    @property
    def watched_count(self) -> int:
        """Return how many processes are watched."""
        return len(self._watched)

    def _exited(self, process: ProcessId, on_exit: OnExit) -> None:
        self.unwatch(process)
        on_exit(process)

    def _describe_again(self, watched: _Watched, known_by: KnownBy) -> Owner:
        """Return a watched process' description, read again after an exec or a change of user."""
        pid, owner, now = watched.id.pid, watched.owner, self._loop.time()
        is_fresh = now - watched.looked_at < FRESH_S
        if not is_fresh:
            self._check_network(pid)
            watched.looked_at = now
        if owner is None or owner.known_by != known_by or owner.uid != procfs.uid(pid) \
                or not (is_fresh or owner.cmdline == procfs.cmdline(pid)):
            owner = procfs.describe(pid, known_by)
            if owner is None or _has_exited(watched.pidfd):
                raise ProcessGone(pid)
            watched.owner = owner
        return owner

    def _check_network(self, pid: int) -> None:
        network = procfs.network_namespace(pid)
        if network is not None and network != self._network:
            raise ForeignNetwork(pid)

    def _is(self, process: ProcessId, pidfd: int) -> bool:
        """Tell whether a pidfd refers to exactly this process, and it runs; raises ProcessGone, OSError."""
        return self._identity(process.pid, pidfd, _stat(process.pid)) == process and not _has_exited(pidfd)

    def _identity(self, pid: int, pidfd: int, stat: procfs.Stat) -> ProcessId:
        inode = os.fstat(pidfd).st_ino if self._numbered else 0
        return ProcessId(pid, stat.start_ticks, procfs.boot_id(), inode)


def _open(pid: int) -> int:
    """Open a pidfd; raises ProcessGone, OSError(EMFILE).

    The id of a thread, and what is no pid at all, answer ENOENT or EINVAL, by the kernel's version.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
            raise ProcessGone(pid) from error
        raise


def _stat(pid: int) -> procfs.Stat:
    """Read a process' stat; raises ProcessGone, also for one that /proc hides (hidepid=), or OSError(EMFILE)."""
    try:
        return procfs.stat(pid)
    except (FileNotFoundError, ProcessLookupError, PermissionError) as error:
        raise ProcessGone(pid) from error


def _has_exited(pidfd: int) -> bool:
    """Tell whether a pidfd's process is gone: it becomes readable then. Half a microsecond."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _pidfds_are_numbered() -> bool:
    """Tell whether pidfds have inodes of their own. Before pidfs they shared one, with all anonymous descriptors."""
    pidfd, anonymous = os.pidfd_open(os.getpid()), os.eventfd(0)
    try:
        return os.fstat(pidfd).st_dev != os.fstat(anonymous).st_dev
    finally:
        os.close(pidfd)
        os.close(anonymous)
