"""The processes that leases belong to: finding one for a request, and watching it for its exit.

What a process is, the kernel adapter reads; what its exit means, `observing` decides.
"""

from __future__ import annotations

from collections.abc import Callable

from portd.core.errors import FILE_LIMIT, Busy, InvalidRequest, NotOwner, OtherNetwork, Refusal, Unauthenticated
from portd.core.model import Owner, ProcessId
from portd.core.rights import Caller
from portd.core.table import LeaseTable
from portd.leasing.pending import Pending
from portd.leasing.seams import ForeignNetwork, Process, Processes, ProcessGone


class Owners:
    """Finds and watches the owners of leases. `on_exit` is called with each watched process that is gone."""

    def __init__(self, processes: Processes, table: LeaseTable) -> None:
        self._processes = processes
        self._table = table
        self.on_exit: Callable[[ProcessId], None] = lambda process: None

    def acquire(
        self, request_pid: int | None, caller: Caller, pending: Pending, *, is_lifetime: bool
    ) -> Process | None:
        """Find the process that a lease will belong to: the requested one, else the caller.

        `is_lifetime`: the lease lasts as long as the process, which is watched from now on. None where the process
        can't be known and is not needed. Raises InvalidRequest for a process that is gone or not known, NotOwner for
        that of another user, OtherNetwork for one of another network namespace, Busy at the file limit.
        """
        process = self._find(request_pid, caller, is_required=is_lifetime)
        if is_lifetime and process is not None:
            pending.reserve(self.forget, process.id)
            try:
                self._processes.watch(process.id, self.on_exit)
            except (ProcessGone, OSError) as error:
                raise _unwatchable(process.id, error) from error
        return process

    def keep(self, process: ProcessId, pending: Pending) -> None:
        """Watch a process from now on, or until the request is rolled back; raises as `watch` does."""
        pending.reserve(self.forget, process)
        self.watch(process)

    def watch(self, process: ProcessId) -> None:
        """Watch a process for its exit; raises InvalidRequest when it has exited, Busy at the file limit."""
        try:
            self._processes.watch(process, self.on_exit)
        except (ProcessGone, OSError) as error:
            raise _unwatchable(process, error) from error

    def forget(self, process: ProcessId | None) -> None:
        """Stop watching a process, unless it owns another lease."""
        if process is not None and not self._table.is_owner(process):
            self._processes.unwatch(process)

    def is_alive(self, process: ProcessId | None) -> bool:
        """Return whether exactly this process still runs; False where none is known."""
        return process is not None and self._processes.is_alive(process)

    def check_caller(self, caller: Caller) -> Process | None:
        """Refuse a caller that may not have ports or sockets of this host, and return its process where it is known.

        Raises OtherNetwork for one in another network namespace, or whose process has exited, Unauthenticated for one
        that the kernel does not know, Busy at the file limit.
        """
        if caller.known_by == "token":
            return None  # it is on another host, or behind a proxy: its token says who it is
        if caller.uid is None:
            raise Unauthenticated("the kernel does not know the other end of this connection: connect again")
        if caller.other_network:
            raise OtherNetwork(
                "the calling process is in another network namespace: its ports are not this host's; run portd in that "
                "namespace"
            )
        if caller.pid is None:
            return None
        try:
            return self._processes.find(caller.pid, caller.known_by)
        except ForeignNetwork as error:
            raise OtherNetwork(
                f"the calling process {caller.pid} is in another network namespace: its ports are not this host's; "
                "run portd in that namespace"
            ) from error
        except ProcessGone as error:
            raise OtherNetwork(
                f"process {caller.pid}, which opened this connection, has exited: connect again"
            ) from error
        except OSError as error:
            raise Busy(FILE_LIMIT) from error

    def _find(self, request_pid: int | None, caller: Caller, *, is_required: bool) -> Process | None:
        calling = self.check_caller(caller)
        if request_pid is not None:
            return self._find_requested(request_pid, caller)
        if calling is None:
            if is_required:
                raise InvalidRequest(
                    "the calling process can't be identified over this connection: set 'ttl' (seconds) and renew the "
                    "lease",
                    pointer="/ttl",
                )
            return None
        if calling.owner.uid != caller.uid:
            # Credentials are those of connect(): the pid may have passed on to another user's process since.
            raise InvalidRequest(f"process {caller.pid} is not the one that connected: connect again", pointer="/pid")
        return calling

    def _find_requested(self, request_pid: int, caller: Caller) -> Process:
        pid = self._translate(request_pid, caller)
        try:
            process = self._processes.find(pid, caller.known_by)
        except ForeignNetwork as error:
            raise OtherNetwork(
                f"process {pid} is in another network namespace: its ports are not this host's; run portd in that "
                "namespace",
                pointer="/pid",
            ) from error
        except ProcessGone as error:
            raise InvalidRequest(f"there is no process {pid} (any more)", pointer="/pid") from error
        except OSError as error:
            raise Busy(FILE_LIMIT) from error
        if not caller.admin and process.owner.uid != caller.uid:
            raise NotOwner(
                f"process {pid} belongs to uid {process.owner.uid}: only root or the admin group may lease for it",
                pointer="/pid",
            )
        return process

    def _translate(self, request_pid: int, caller: Caller) -> int:
        """Return portd's number for a process that the caller names in its own pid namespace; raises InvalidRequest."""
        if caller.known_by == "token":
            return request_pid
        try:
            if caller.pid is None:
                raise ProcessGone(request_pid)
            return self._processes.translate(request_pid, caller.pid)
        except ProcessGone as error:
            raise InvalidRequest(
                f"there is no process {request_pid} in the caller's pid namespace that portd can see", pointer="/pid"
            ) from error


def _unwatchable(process: ProcessId, error: Exception) -> Refusal:
    if isinstance(error, ProcessGone):
        return InvalidRequest(f"process {process.pid} has exited", pointer="/pid")
    return Busy(FILE_LIMIT)


def describe_owner(owner: Owner) -> str:
    """Name an owner in a message."""
    who = f"pid {owner.pid}" if owner.pid else "an unknown process"
    return f"{owner.user or owner.uid} ({who})" if owner.uid is not None else who
