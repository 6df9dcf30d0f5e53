"""The Protocols through which the service touches the world.

Each seam has one implementation for the real world in `adapters/` and one that tests drive in `testing/`. This module
must not know either. What can fail says how: a seam never raises anything that is not named here.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final, Literal, NamedTuple, Protocol

from portd.core.model import Event, HoldKind, KnownBy, Lease, Listener, Now, Owner, ProcessId, VouchedBy
from portd.core.model import Protocol as LeaseProtocol
from portd.core.ownership import Holder, ProcessKey, Seen


class Clock(Protocol):
    """The only clock. `tick` never goes back, and stands still while the whole daemon was stopped or suspended."""

    def now(self) -> Now: ...


Taken = Literal["taken", "busy", "no_address", "forbidden", "no_descriptors"]
"""What became of a hold. `busy`: somebody has the port; `no_address`: not an address of this host (EADDRNOTAVAIL);
`forbidden`: the daemon may not bind it (EACCES, EPERM); `no_descriptors`: at the file limit (EMFILE, ENFILE)."""


class Holds(Protocol):
    """The sockets that portd keeps bound so that nobody gets a leased port by accident. All calls return at once."""

    def take(
        self, lease_id: str, protocol: LeaseProtocol, address: str, port: int, kind: HoldKind, *, whole: bool = False
    ) -> Taken:
        """Bind the port for the lease, all of its protocols or none. With `none` the port is only tested.

        `whole`: the number must be free at every address of this host, not only at this one.

        Whatever the kind, `taken` means that at this moment no other process had the port.
        """

    def restore(self, lease_id: str, protocol: LeaseProtocol, address: str, port: int, kind: HoldKind) -> bool:
        """Bind a hold again after a restart; False while the owner's listening socket conflicts (try later)."""

    def drop(self, lease_id: str) -> None:
        """Close the lease's hold; nothing happens when it has none."""

    def is_free(self, protocol: LeaseProtocol, address: str, port: int, *, whole: bool = False) -> bool:
        """Return whether nobody has the port bound (`whole`: at any address), without keeping it. Sockets in TIME_WAIT
        don't count."""


class Process(NamedTuple):
    """A live process: its identity in the lease table, and what is known about it."""

    id: ProcessId
    owner: Owner


class ProcessGone(Exception):
    """There is no such process, or it has exited (a zombie has)."""


class ForeignNetwork(Exception):
    """The process lives in another network namespace: its ports are not this host's."""


class Processes(Protocol):
    """The processes of this host."""

    def find(self, pid: int, known_by: KnownBy) -> Process:
        """Read a live process; raises ProcessGone or ForeignNetwork. Costs a few reads of /proc: keep the answer."""

    def translate(self, pid: int, caller_pid: int) -> int:
        """Return the pid by which portd knows a process that the caller names by the pid of its own pid namespace.

        Raises ProcessGone where there is none, or where that can't be known.
        """

    def watch(self, process: ProcessId, on_exit: Callable[[ProcessId], None]) -> None:
        """Call `on_exit` once, on the event loop, when the process is gone; one pidfd however often it is asked for.

        Raises ProcessGone when it is gone already (or its pid is somebody else's by now), OSError(EMFILE) at the file
        limit.
        """

    def unwatch(self, process: ProcessId) -> None:
        """Close the pidfd; nothing happens when there is none."""

    def is_alive(self, process: ProcessId) -> bool:
        """Return whether exactly this process (start time and boot compared) still runs."""


REVISION_GAP: Final = 1 << 20
"""How far revisions jump at a start. An observation may have been published and then lost in a crash: its number must
not be used again. Small against 2**53, the end of JSON's integers: enough for eight billion starts."""


class Loaded(NamedTuple):
    """What the store remembers at start. `remembered` holds the newest ended lease of every (service, instance,
    endpoint) and port that history still keeps, oldest end first; `events` the newest ones, oldest first: all that came
    after revision `complete_after`.

    No start before has given a revision beyond `revision`. `store_id` is a random name of this store, made with it; a
    revision means nothing without it.
    """

    live: list[Lease]
    remembered: list[Lease]
    events: list[Event]
    revision: int
    complete_after: int
    store_id: str = ""


class LeaseStore(Protocol):
    """The durable memory. One writer; reads never wait for it."""

    async def load(self) -> Loaded:
        """Read what a start needs, once, and reserve its revisions, durably: REVISION_GAP beyond all that were given.

        The very first start takes them up from 0. Raises StoreDamaged.
        """

    async def commit(self, events: Sequence[Event]) -> None:
        """Write events and the leases they leave, all or none, durable when it returns. No events at all only try
        whether the store takes writes.

        Raises StoreUnavailable when surely nothing was written (it may be tried again), StoreLost when nobody knows.
        """

    async def lease(self, lease_id: str) -> Lease | None:
        """Read one lease, live or ended, or None when it is not remembered."""

    async def history(
        self, port: int, *, protocol: LeaseProtocol | None = None, at: float | None = None, limit: int = 100
    ) -> list[Lease]:
        """Read who had the port, newest first; `at` (epoch seconds) asks for one moment."""

    async def ended(self, service: str | None = None, limit: int = 1000) -> list[Lease]:
        """Read ended leases, newest end first."""

    async def prune(self, ended_before: float, events_kept: int) -> int:
        """Forget leases that ended before `ended_before` and all but the newest events, in small steps.

        Returns how many rows went. Never holds the writer for longer than a few milliseconds at a time.
        """

    async def close(self) -> None: ...


SocketKind = Literal["listening", "bound", "connected"]


class PortSocket(NamedTuple):
    """A socket of a local port, and what it does there: a connection counts by its local port."""

    socket: Listener
    kind: SocketKind


class SocketTable(Protocol):
    """The kernel's own table of sockets."""

    def listeners(self, port: int | None = None) -> list[Listener]:
        """List listening TCP and bound UDP sockets of any process, portd's own holds left out."""

    async def owners(self, inodes: Collection[int], likely_pids: Sequence[int] = ()) -> dict[int, Owner]:
        """Find the process of each socket inode, `likely_pids` first; off the loop where all of /proc is walked.

        Where the kernel does not let portd see it, the inode is left out: its uid is all there is.
        """

    def on_port(self, port: int) -> list[PortSocket]:
        """List every socket of a local port, whatever its state and address, portd's own holds left out."""

    async def holders(self, inodes: Collection[int], likely_pids: Sequence[int] = ()) -> dict[int, Holder]:
        """Find the process of each socket as `owners` does, with the facts that `core.ownership` judges."""


class Peer(NamedTuple):
    """The other end of a connection, as the kernel reports it.

    `pid` is None where it can't be known (another pid namespace); `groups` are the peer's group ids, supplementary ones
    too where the kernel reports them. `other_network` and `other_users`: the peer is in another network or user
    namespace, or that is not known; uid 0 of another user namespace is not root.
    """

    uid: int
    pid: int | None
    groups: frozenset[int]
    known_by: KnownBy
    inode: int = 0
    other_network: bool = False
    other_users: bool = False


class Peers(Protocol):
    """The identity of a caller, as the kernel reports it."""

    def of_unix(self, connection: socket.socket) -> Peer:
        """Read SO_PEERCRED and SO_PEERGROUPS (unix(7)): who called connect()."""

    def of_tcp(self, local: tuple[str, int], remote: tuple[str, int]) -> Peer | None:
        """Ask the socket table for the other end of a loopback connection; `pid` is None so far.

        None when the other end is not on this host, or is an orphan or in TIME_WAIT (inode 0: it would read as root).
        """

    async def with_pid(self, peer: Peer) -> Peer:
        """Find a TCP peer's process by its socket's inode, off the loop: milliseconds. `pid` stays None if hidden."""


ApplyEvent = Callable[[Event], None]
"""A watcher: called on the event loop, in order of revision, after the event is true. It must not raise or wait."""

ReportHealth = Callable[[str, Literal["passing", "warning", "critical"], str], None]
"""How probes report a change of health: lease id, result, and a note of at most 4 KB."""


class LastResult(NamedTuple):
    """The newest result of a check: its reason, and when (epoch seconds)."""

    note: str
    at: float


FindLastResult = Callable[[str], LastResult | None]
"""Finds the newest result of a lease's check, by lease id; None where it has had none since the daemon started."""

State = Literal["held", "bound", "conflict"]
ReportState = Callable[[str, State, Owner | None, Seen], None]
"""How the state watch reports a lease: its id, its state, who listens (the owner's newest description, the foreign
process in a conflict, or None), and the addresses, rule and processes of its own listeners."""

ReportOwner = Callable[[ProcessId, Owner], None]
"""How a process is reported that has become another program or user (exec, setuid)."""


class Successor(NamedTuple):
    """The process that a lease passes to after its owner exited: one that listens and is the lease's own."""

    pid: int
    start_ticks: int
    vouched_by: VouchedBy
    listening: tuple[str, ...]
    kin: tuple[ProcessKey, ...]


FindSuccessors = Callable[[Sequence[Lease]], None]
"""How the service has the successors of an exited owner's leases found; each is answered through ObserveExit."""

ObserveExit = Callable[[Lease, Successor | None], None]
"""How a lease of an exited owner is reported: with the process that it passes to, or None where nobody of its own
listens. An ended lease is reported once more where its successor appears within the cooldown."""

Sleep = Callable[[float], Awaitable[None]]


class HostFacts(NamedTuple):
    """A host of the cluster: its address, its version, and its published instances by service. `age_s` are the seconds
    since it was known to be alive; None where that is not known."""

    host: str
    address: str
    version: str
    services: dict[str, int]
    age_s: float | None


class OtherHosts(Protocol):
    """What the cluster knows; a host on its own has none."""

    async def ask(self, service: str) -> None:
        """Make sure that a look-up of a service has an answer."""

    def of_service(self, service: str) -> Collection[Lease]:
        """Return the other hosts' leases of a service."""

    def leases(self) -> Sequence[Lease]:
        """Return all leases of other hosts that are known."""

    def stale_s(self) -> float | None:
        """Return for how many seconds the cluster's store has not been heard from; None while it answers."""

    def hosts(self) -> Sequence[HostFacts]:
        """Return the hosts, this one first."""
