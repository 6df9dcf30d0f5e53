"""What a daemon that somebody else controls would try, run in place of the daemon: prints one JSON line of what worked.

Arguments: pid and address of a secret in the memory of a root's process, pid of a process of alice's.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable

INSPECTOR = "/run/portd-inspector.sock"
SECRET_BYTES = 16
PIDFD_GETFD = 438
PTRACE_ATTACH = 16


class IoVec(ctypes.Structure):
    """The argument of process_vm_readv(2)."""

    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


LIBC = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def read(path: str) -> str:
    with open(path, "rb") as file:
        return repr(file.read(SECRET_BYTES))


def read_memory(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb") as file:
        file.seek(address)
        return repr(file.read(SECRET_BYTES))


def transfer(call: Callable[..., int], pid: int, address: int) -> str:
    buffer = ctypes.create_string_buffer(SECRET_BYTES)
    ours, theirs = IoVec(ctypes.addressof(buffer), SECRET_BYTES), IoVec(address, SECRET_BYTES)
    check(call(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0))
    return repr(buffer.raw)


def ask(question: object) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(INSPECTOR)
        connection.send(json.dumps(question).encode())
        answer = connection.recv(1 << 18)
        if not answer:
            raise OSError("the inspector hung up")
        return answer.decode()


def main() -> None:
    root, address, alice = map(int, sys.argv[1:])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(INSPECTOR)
        inspector = next(int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and is_inspector(int(pid)))
    attempts: dict[str, Callable[[], object]] = {
        path: (lambda path=path: read(path))
        for path in (
            "/etc/shadow",
            "/root/private",
            "/home/alice/private",
            "/proc/1/root/root/private",
            f"/proc/{root}/root/etc/shadow",
            f"/proc/{alice}/root/home/alice/private",
            f"/proc/{alice}/cwd/private",
            f"/proc/{root}/environ",
            f"/proc/{alice}/environ",
            f"/proc/{alice}/maps",
            f"/proc/{alice}/fd/0",
            f"/proc/{inspector}/root/root/private",
            f"/proc/{inspector}/environ",
        )
    }
    for name, pid in (("root", root), ("alice", alice), ("inspector", inspector)):
        attempts |= {
            f"/proc/PID/mem of {name}": lambda pid=pid: read_memory(pid, address),
            f"process_vm_readv of {name}": lambda pid=pid: transfer(LIBC.process_vm_readv, pid, address),
            f"process_vm_writev of {name}": lambda pid=pid: transfer(LIBC.process_vm_writev, pid, address),
            f"ptrace of {name}": lambda pid=pid: check(LIBC.ptrace(PTRACE_ATTACH, pid, 0, 0)),
            f"pidfd_getfd of {name}": lambda pid=pid: check(LIBC.syscall(PIDFD_GETFD, os.pidfd_open(pid), 0, 0)),
            f"kill of {name}": lambda pid=pid: os.kill(pid, signal.SIGTERM),
        }
    attempts |= {
        f"asks the inspector {question}": lambda question=question: ask(question)
        for question in (
            {"question": "read", "path": "/etc/shadow"},
            {"question": "environ", "pid": root},
            {"question": "exe", "pid": f"{root}/root/etc/shadow"},
            {"question": "exe", "pid": root, "root": "/etc"},
            {"question": "find", "inodes": [1], "pids": ["1/../../etc"]},
        )
    }
    attempts |= {
        "writes /etc": lambda: os.open("/etc/portd-was-here", os.O_WRONLY | os.O_CREAT),
        "becomes root": lambda: os.setuid(0),
        "makes a user namespace": lambda: check(LIBC.unshare(0x10000000)),
    }
    worked = {}
    for name, attempt in attempts.items():
        try:
            worked[name] = repr(attempt())
        except OSError:
            continue
    with open("/proc/self/status") as file:
        status = file.read()
    print(
        json.dumps(
            {
                "attempts": len(attempts),
                "worked": worked,
                "uid": os.getuid(),
                "capabilities": [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")],
                "answer": ask({"question": "credentials", "pid": alice}),
            }
        ),
        flush=True,
    )


def is_inspector(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"portd.inspector" in file.read()
    except OSError:
        return False


if __name__ == "__main__":
    main()
