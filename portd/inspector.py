"""The inspector: reads of other users' processes what the kernel shows only to CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH.

The daemon has neither capability. It asks this process, which runs as another user, over a unix socket that only the
daemon's user may open. There are four questions: which of these processes has these sockets open; a process' program;
its pid namespace; and which leases its environment names, with the hash of each token. A question holds numbers alone,
so nobody can make the inspector open a path of their choice, and no answer holds contents of a file or of memory.

This module uses the standard library alone, imports nothing of portd, and runs by itself: `python3 -I -m
portd.inspector`, started by systemd with the socket (sd_listen_fds(3)). The daemon calls the readers below directly for
the processes that it may read itself.

The protocol: SOCK_SEQPACKET, one JSON object a message, one answer for each question in order. A message that is no
question ends its connection.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Collection, Iterable
from typing import Any, Final

ROOT: Final = "/proc"
ENVIRON_BYTES: Final = 1 << 18
"""Enough for any environment that a person sets; what is longer is cut."""
CREDENTIALS_MAX: Final = 64
"""Leases that one environment may name: endpoints of a service."""
LEASE_ID_MAX: Final = 128
"""Bytes of a lease's id; portd's own are shorter."""
NUMBERS_MAX: Final = 4096
"""Sockets and processes in one question: about 45 KB each; the kernel's limit of a message is 200 KB (wmem_max)."""
MESSAGE_BYTES: Final = 1 << 17
"""Longest message; a longer one is cut by the kernel, is no JSON then, and ends its connection."""
NUMBER_MAX: Final = 1 << 63
CONNECTIONS_MAX: Final = 8
"""The daemon has four connections, and for a moment the daemon before it has four more."""
IDLE_S: Final = 60.0
"""Exit when nobody has been connected for this long, in seconds; systemd starts the inspector again."""
LISTENER: Final = 3
"""The first descriptor that systemd passes (SD_LISTEN_FDS_START)."""

Credentials = list[tuple[str, str]]
"""Lease ids with the SHA-256 of their tokens in hexadecimal."""


# --- readers ---


def socket_inodes(pid: int, root: str = ROOT) -> set[int]:
    """Return the inodes of the sockets that a process has open, as far as the kernel shows them."""
    inodes: set[int] = set()
    try:
        directory = os.open(f"{root}/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return inodes
    try:
        for name in os.listdir(directory):
            try:
                target = os.readlink(name, dir_fd=directory)
            except OSError:  # closed meanwhile
                continue
            if target.startswith("socket:["):
                inodes.add(int(target[8:-1]))
    except OSError:  # ended meanwhile
        pass
    finally:
        os.close(directory)
    return inodes


def find_sockets(inodes: Collection[int], pids: Iterable[int], root: str = ROOT) -> dict[int, int]:
    """Return the pid of the first of these processes that has each socket open, by inode."""
    found: dict[int, int] = {}
    missing = set(inodes)
    for pid in pids:
        if not missing:
            break
        here = missing & socket_inodes(pid, root)
        found |= dict.fromkeys(here, pid)
        missing -= here
    return found


def exe(pid: int, root: str = ROOT) -> str | None:
    """Return the path of a process' program, or None; bytes that are not UTF-8 are replaced."""
    try:
        return os.readlink(f"{root}/{pid}/exe").encode("utf-8", "replace").decode()
    except OSError:
        return None


def pid_namespace(pid: int, root: str = ROOT) -> str | None:
    """Return the name of a process' pid namespace (pid_namespaces(7)), or None where the kernel hides it."""
    try:
        return os.readlink(f"{root}/{pid}/ns/pid")
    except OSError:
        return None


def credentials(pid: int, root: str = ROOT) -> Credentials:
    """Return the leases whose id and token are in a process' environment; none where the kernel hides it."""
    try:
        with open(f"{root}/{pid}/environ", "rb", buffering=0) as file:
            return parse_credentials(file.read(ENVIRON_BYTES) or b"")
    except OSError:
        return []


def parse_credentials(text: bytes) -> Credentials:
    """Return the leases whose id and token are in an environment (environ in proc(5)): PORTD_LEASE with PORTD_TOKEN,
    and for other endpoints PORTD_LEASE_NAME with PORTD_TOKEN_NAME."""
    ids: dict[bytes, bytes] = {}
    tokens: dict[bytes, bytes] = {}
    for variable in text.split(b"\0"):
        name, _, value = variable.partition(b"=")
        for prefix, values in ((b"PORTD_LEASE", ids), (b"PORTD_TOKEN", tokens)):
            if name.startswith(prefix):
                values[name[len(prefix) :]] = value
    return [
        (lease_id.decode("utf-8", "replace"), hashlib.sha256(tokens[suffix]).hexdigest())
        for suffix, lease_id in ids.items()
        if tokens.get(suffix) and len(lease_id) <= LEASE_ID_MAX
    ][:CREDENTIALS_MAX]


# --- the protocol ---


def answer(message: bytes) -> bytes:
    """Answer a question; raises ValueError for what is none."""
    question = json.loads(message)
    match question:
        case {"question": "find", "inodes": list(inodes), "pids": list(pids)} if len(question) == 3:
            found = find_sockets(_numbers(inodes), _numbers(pids))
            return _encode([[inode, pid] for inode, pid in found.items()])
        case {"question": "exe" | "pid_namespace" | "credentials" as name, "pid": pid} if len(question) == 2:
            (number,) = _numbers([pid])
            readers = {"exe": exe, "pid_namespace": pid_namespace, "credentials": credentials}
            return _encode(readers[name](number))
    raise ValueError("unknown question")


def _numbers(values: list[Any]) -> list[int]:
    if len(values) > NUMBERS_MAX or not all(type(value) is int and 0 < value < NUMBER_MAX for value in values):
        raise ValueError("expected a bounded list of positive numbers")
    return values


def _encode(value: object) -> bytes:
    return json.dumps({"answer": value}, separators=(",", ":")).encode()


def serve(connection: socket.socket) -> None:
    """Answer the questions of a connection until it ends."""
    with connection:
        try:
            while message := connection.recv(MESSAGE_BYTES):
                connection.send(answer(message))
        except (OSError, ValueError, RecursionError) as error:
            print(f"connection ended: {error}", file=sys.stderr, flush=True)


def main() -> int:
    """Serve the socket that systemd passed, a thread for each connection; returns the exit status."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        print("portd-inspector is started by portd-inspector.socket", file=sys.stderr)
        return 2
    listener = socket.socket(fileno=LISTENER)
    allowed = {0, os.stat(listener.getsockname()).st_uid}
    threads: list[threading.Thread] = []
    while True:
        listener.settimeout(IDLE_S)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if any(thread.is_alive() for thread in threads):
                continue
            return 0
        connection.settimeout(None)
        threads = [thread for thread in threads if thread.is_alive()]
        _, uid, _ = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in allowed or len(threads) >= CONNECTIONS_MAX:
            connection.close()
            continue
        threads.append(threading.Thread(target=serve, args=(connection,), daemon=True))
        threads[-1].start()


if __name__ == "__main__":
    sys.exit(main())
