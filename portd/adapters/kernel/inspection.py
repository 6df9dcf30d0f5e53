"""What the kernel shows of a process only to its own user or to CAP_SYS_PTRACE: its sockets, program and environment.

The daemon reads it itself where it may, and otherwise asks the inspector (`portd.inspector`), a process of its own that
has the capabilities. Without an inspector other users' processes stay hidden, and everything else works.
This module must not know what the answers are for.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any, Final, NamedTuple

from portd import inspector
from portd.core.ownership import Credential

CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE = 2, 19
"""Bits of capabilities(7): what a process needs to read of another user's process what the inspector reads."""
LOOP_TIMEOUT_S: Final = 0.02
"""How long the event loop waits for an answer about one process, usually 0.1 ms; then its program stays unknown."""
SEARCH_TIMEOUT_S: Final = 5.0
"""How long a thread waits for a search through a batch of processes, 0.1 ms each."""
RETRY_S: Final = 1.0
"""After a failure the inspector is left alone for this long, so that callers wait for it once a second at most."""
BATCH_GROWTH: Final = 8
"""A search starts with a batch of one process, the likeliest, and each further batch is larger by this factor."""
START_TIMEOUT_S: Final = 2.0
"""How long the daemon's start waits for the inspector, which starts beside it."""


class Inspection:
    """Reads of processes what this process may read itself."""

    problem: str | None = None
    """Why other users' processes are hidden, None while they are not (or none was asked for yet)."""

    def find_sockets(self, inodes: Collection[int], pids: Iterable[int]) -> dict[int, int]:
        """Return the pid of the first of these processes that has each socket open, by inode."""
        return inspector.find_sockets(inodes, pids)

    def exe(self, pid: int) -> str | None:
        """Return the path of a process' program, or None where it is hidden."""
        return inspector.exe(pid)

    def pid_namespace(self, pid: int) -> str | None:
        """Return the name of a process' pid namespace, or None where it is hidden."""
        return inspector.pid_namespace(pid)

    def credentials(self, pid: int) -> tuple[Credential, ...]:
        """Return the leases whose id and token are in a process' environment; none where it is hidden."""
        return _credentials(inspector.credentials(pid))

    def check(self) -> None:
        """Bring `problem` up to date."""

    def close(self) -> None:
        """Close what is open."""


DIRECT: Final = Inspection()


class InspectorClient(Inspection):
    """Asks the inspector for what this process may not read itself.

    Calls block, for `timeout_s` at most; one connection, one question at a time: the event loop and each part that
    searches in a thread have a client of their own. Nothing here raises: without an answer processes are hidden.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._connection: socket.socket | None = None
        self._retry_at = float("-inf")
        self._asking = threading.Lock()

    def find_sockets(self, inodes: Collection[int], pids: Iterable[int]) -> dict[int, int]:
        """Search the processes in batches, in order, until every socket is found."""
        found: dict[int, int] = {}
        remaining = iter(pids)
        size = 1
        while (missing := set(inodes) - found.keys()) and (batch := list(islice(remaining, size))):
            found |= self._find_in(missing, batch)
            size = min(size * BATCH_GROWTH, inspector.NUMBERS_MAX)
        return found

    def exe(self, pid: int) -> str | None:
        """Return the path of a process' program, or None where it is hidden."""
        answer = inspector.exe(pid) or self._ask(question="exe", pid=pid)
        return answer if isinstance(answer, str) else None

    def pid_namespace(self, pid: int) -> str | None:
        """Return the name of a process' pid namespace, or None where it is hidden."""
        answer = inspector.pid_namespace(pid) or self._ask(question="pid_namespace", pid=pid)
        return answer if isinstance(answer, str) else None

    def credentials(self, pid: int) -> tuple[Credential, ...]:
        """Return the leases whose id and token are in a process' environment; none where it is hidden."""
        return _credentials(inspector.credentials(pid) or self._ask(question="credentials", pid=pid) or ())

    def check(self) -> None:
        """Ask about this process, so that `problem` is current."""
        self._ask(question="exe", pid=os.getpid())

    def connect(self) -> None:
        """Wait for the inspector's first answer, for START_TIMEOUT_S at most: it may be starting."""
        timeout_s, self._timeout_s = self._timeout_s, START_TIMEOUT_S
        self.check()
        self._timeout_s = timeout_s
        if self._connection is not None:
            self._connection.settimeout(timeout_s)

    def close(self) -> None:
        """Close the connection."""
        with self._asking:
            self._disconnect()

    def _find_in(self, inodes: set[int], pids: list[int]) -> dict[int, int]:
        """Search one batch of processes; itself where the inspector does not answer."""
        found: dict[int, int] = {}
        remaining = sorted(inodes)
        for at in range(0, len(remaining), inspector.NUMBERS_MAX):
            some = remaining[at : at + inspector.NUMBERS_MAX]
            answer = self._ask(question="find", inodes=some, pids=pids)
            found |= inspector.find_sockets(some, pids) if answer is None else dict(answer)
        return found

    def _ask(self, **question: object) -> Any:
        """Return the answer; None without one, or where the inspector sees nothing either."""
        with self._asking:
            if self._connection is None and time.monotonic() < self._retry_at:
                return None
            try:
                if self._connection is None:
                    self._connection = _connect(self._path, self._timeout_s)
                self._connection.send(json.dumps(question).encode())
                answer = json.loads(self._connection.recv(2 * inspector.MESSAGE_BYTES))["answer"]
            except (OSError, ValueError, KeyError) as error:
                self._disconnect()
                self._retry_at = time.monotonic() + RETRY_S
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or "it hung up"
                self.problem = (
                    f"the inspector at {self._path} does not answer ({reason}), so other users' processes are shown by "
                    "their user alone: systemctl start portd-inspector.socket"
                )
                return None
            self.problem = None
            return answer

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Inspections(NamedTuple):
    """An inspection for each part that waits for its own answers alone."""

    loop: Inspection
    states: Inspection
    ports: Inspection
    peers: Inspection


def choose(path: str) -> Inspections:
    """Return clients of the inspector at `path`; direct inspections where that is "" or this process needs none."""
    if not path or may_inspect_others():
        return Inspections(DIRECT, DIRECT, DIRECT, DIRECT)
    loop = InspectorClient(path, LOOP_TIMEOUT_S)
    loop.connect()
    return Inspections(loop, *(InspectorClient(path, SEARCH_TIMEOUT_S) for _ in range(3)))


def may_inspect_others() -> bool:
    """Return whether this process may read what an inspector reads, by its effective capabilities (proc(5))."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        line = next((line for line in status if line.startswith("CapEff:")), "CapEff: 0")
    capabilities = int(line.split()[1], 16)
    return all(capabilities >> bit & 1 for bit in (CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE))


def _connect(path: str, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout_s)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def _credentials(found: Iterable[Any]) -> tuple[Credential, ...]:
    return tuple(Credential(lease_id, bytes.fromhex(token_hash)) for lease_id, token_hash in found)
