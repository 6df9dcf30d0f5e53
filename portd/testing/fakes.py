"""A clock, a kernel and processes that a test drives."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from portd.core.bindings import Binding, conflicts
from portd.core.model import HoldKind, KnownBy, Now, Owner, ProcessId, Protocol
from portd.leasing.seams import Process, ProcessGone, Taken

BOOT_ID = "0b00701d-0000-4000-8000-000000000000"


class FakeClock:
    """A clock that stands still until a test advances it."""

    def __init__(self, at: float = 1_700_000_000.0) -> None:
        self._now = Now(at, 0.0)

    def now(self) -> Now:
        """Return the time."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass, for people and for deadlines."""
        self._now = Now(self._now.at + seconds, self._now.tick + seconds)

    def lose(self, seconds: float) -> None:
        """Let time pass for people alone, as when the daemon was stopped."""
        self._now = Now(self._now.at + seconds, self._now.tick)


class FakeHolds:
    """The kernel's ports, with the kernel's overlap rules; `foreign` are bindings that others have bound."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[Binding, HoldKind]] = {}
        self.foreign: set[Binding] = set()
        self.foreign_addresses: set[str] = set()
        self.descriptors_left = 1_000_000
        self.take_count = 0

    def take(
        self, lease_id: str, protocol: Protocol, address: str, port: int, kind: HoldKind, *, whole: bool = False
    ) -> Taken:
        """Bind the port unless somebody has it."""
        self.take_count += 1
        if address in self.foreign_addresses:
            return "no_address"
        if len(self.held) >= self.descriptors_left:
            return "no_descriptors"
        place = Binding(protocol, address, port)
        if not self.is_free(protocol, address, port, whole=whole):
            return "busy"
        if kind != "none":
            assert lease_id not in self.held, f"{lease_id} has a hold already"
            self.held[lease_id] = (place, kind)
        return "taken"

    def restore(self, lease_id: str, protocol: Protocol, address: str, port: int, kind: HoldKind) -> bool:
        """Take a hold back, unless somebody is there."""
        return self.take(lease_id, protocol, address, port, kind) == "taken"

    def drop(self, lease_id: str) -> None:
        """Let go."""
        self.held.pop(lease_id, None)

    def is_free(self, protocol: Protocol, address: str, port: int, *, whole: bool = False) -> bool:
        """Return whether nobody has the port."""
        if whole and not self.is_free(protocol, "::", port):
            return False
        place = Binding(protocol, address, port)
        others = [held for held, _ in self.held.values()]
        return not any(conflicts(place, other) for other in (*others, *self.foreign))


class FakeProcesses:
    """Processes that a test starts and ends."""

    def __init__(self) -> None:
        self._alive: dict[int, Process] = {}
        self._watched: dict[ProcessId, Callable[[ProcessId], None]] = {}
        self._starts = 0

    def start(self, pid: int, uid: int = 1000) -> ProcessId:
        """Start a process, perhaps with the pid of one that has ended."""
        assert pid not in self._alive
        self._starts += 1
        identity = ProcessId(pid, self._starts, BOOT_ID)
        owner = Owner(
            pid=pid,
            uid=uid,
            user=f"user{uid}",
            exe="/bin/fake",
            cmdline=("fake", str(pid)),
            started_at=1_700_000_000.0,
            known_by="peercred",
        )
        self._alive[pid] = Process(identity, owner)
        return identity

    def end(self, pid: int) -> None:
        """End a process and notify its watcher."""
        process = self._alive.pop(pid)
        watcher = self._watched.pop(process.id, None)
        if watcher is not None:
            watcher(process.id)

    def change(self, pid: int, *, uid: int, exe: str = "/bin/fake") -> Owner:
        """Change the user and the program of a running process, as setuid programs and exec do."""
        process = self._alive[pid]
        owner = replace(process.owner, uid=uid, user=f"user{uid}", exe=exe)
        self._alive[pid] = Process(process.id, owner)
        return owner

    def vanish(self, pid: int) -> None:
        """End a process before its watcher is notified, as between the exit and the next turn of the loop."""
        del self._alive[pid]

    def find(self, pid: int, known_by: KnownBy) -> Process:
        """Return a running process."""
        if pid not in self._alive:
            raise ProcessGone(pid)
        return self._alive[pid]

    def translate(self, pid: int, caller_pid: int) -> int:
        """Return the same pid: all processes are in one pid namespace."""
        return pid

    def watch(self, process: ProcessId, on_exit: Callable[[ProcessId], None]) -> None:
        """Call `on_exit` when it ends."""
        if not self.is_alive(process):
            raise ProcessGone(process.pid)
        self._watched[process] = on_exit

    def unwatch(self, process: ProcessId) -> None:
        """Watch no longer."""
        self._watched.pop(process, None)

    def is_alive(self, process: ProcessId) -> bool:
        """Return whether exactly this process runs."""
        alive = self._alive.get(process.pid)
        return alive is not None and alive.id == process

    def is_running(self, pid: int) -> bool:
        """Return whether a process with this pid runs."""
        return pid in self._alive

    def forget_watchers(self) -> None:
        """Forget who watches: the daemon that did has died."""
        self._watched.clear()

    @property
    def watched_count(self) -> int:
        """Return how many processes are watched."""
        return len(self._watched)
