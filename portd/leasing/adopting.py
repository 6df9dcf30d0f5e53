"""Adoption: a lease for the process that listens on a port already.

The listener is found in the kernel's socket table before the grant is decided; nothing is bound, and no hold is placed
while its socket conflicts. This module must not know how a socket is attributed to its process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from portd.core.bindings import is_loopback, overlaps
from portd.core.errors import FILE_LIMIT, Busy, InvalidRequest, NotOwner, OtherNetwork, Refusal
from portd.core.model import OWN_ADDRESS, Listener
from portd.core.ownership import Holder, Seen
from portd.core.requests import DEFAULT_ADDRESS, DEFAULT_PROTOCOL, LeaseRequest, given
from portd.core.rights import Caller
from portd.leasing.seams import ForeignNetwork, Process, Processes, ProcessGone

FindListeners = Callable[[int], Awaitable[list[tuple[Listener, Holder]]]]
"""Finds who listens on a port number, at any address."""


class Adopted(NamedTuple):
    """The process that a port is adopted for, the address of the lease, and what the kernel shows of it."""

    process: Process
    address: str
    seen: Seen


async def _nobody(port: int) -> list[tuple[Listener, Holder]]:
    return []


class Adopter:
    """Finds the process of an adoption, and judges whether the caller may adopt it."""

    def __init__(self, processes: Processes, check_caller: Callable[[Caller], object]) -> None:
        self._processes = processes
        self._check_caller = check_caller
        self.find_listeners: FindListeners = _nobody

    async def find(self, request: LeaseRequest, caller: Caller) -> Adopted:
        """Find the process that listens on the requested port.

        Raises InvalidRequest where nobody listens there or the kernel hides who does, NotOwner for another user's
        process (root and admins may adopt anybody's), and what `check_caller` raises.
        """
        self._check_caller(caller)
        if not isinstance(request.port, int):
            raise InvalidRequest("'adopt' needs a 'port'", pointer="/port")
        if request.pid is not None:
            raise InvalidRequest("'adopt' leases for the process that listens: leave 'pid' out", pointer="/pid")
        protocol = given(request.protocol, DEFAULT_PROTOCOL)
        address = given(request.address, DEFAULT_ADDRESS)
        found = [
            (listener, holder)
            for listener, holder in await self.find_listeners(request.port)
            if protocol in (listener.protocol, "both") and not holder.is_portd
        ]
        if not found:
            raise InvalidRequest(
                f"nobody listens on port {request.port}: start the program first, or lease without 'adopt'",
                pointer="/port",
            )
        is_own = address == OWN_ADDRESS
        at_address = [] if is_own else [each for each in found if _is_at(each[0], address)]
        listener, holder = (at_address or found)[0]
        process = self._process(listener, holder, caller)
        same = [one.address for one, other in found if other.ancestors[:1] == holder.ancestors[:1]]
        seen = Seen(tuple(sorted(set(same))), "owner")
        return Adopted(process, address if at_address else listener.address, seen)

    def _process(self, listener: Listener, holder: Holder, caller: Caller) -> Process:
        if not holder.ancestors:
            raise InvalidRequest(
                f"the process that listens on port {listener.port} (uid {listener.uid}) is hidden from portd: "
                "start portd-inspector.socket, or lease the port from that process",
                pointer="/port",
            )
        pid, start_ticks = holder.ancestors[0]
        try:
            process = self._processes.find(pid, "socket")
        except (ProcessGone, ForeignNetwork, OSError) as error:
            raise _refusal(error, pid) from error
        if process.id.start_ticks != start_ticks:
            raise InvalidRequest(f"process {pid}, which listened on port {listener.port}, has exited", pointer="/port")
        if not caller.admin and process.owner.uid != caller.uid:
            raise NotOwner(
                f"process {pid}, which listens on port {listener.port}, belongs to uid {process.owner.uid}: only root "
                "or the admin group may adopt it",
                pointer="/port",
            )
        return process


def _is_at(listener: Listener, address: str) -> bool:
    """Return whether a listener serves callers of an address; a loopback address stands for every other one."""
    if overlaps(listener.address, address, v6only=listener.v6only):
        return True
    return is_loopback(address) and is_loopback(listener.address)


def _refusal(error: Exception, pid: int) -> Refusal:
    if isinstance(error, ForeignNetwork):
        return OtherNetwork(f"process {pid} is in another network namespace", pointer="/port")
    if isinstance(error, ProcessGone):
        return InvalidRequest(f"process {pid} has exited", pointer="/port")
    return Busy(FILE_LIMIT)
