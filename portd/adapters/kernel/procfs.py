"""The reader of /proc (proc(5)): what the kernel tells of a process.

Parsers take bytes, so that tests feed them literal kernel text. Readers return None, or an empty set, where the kernel
shows nothing: the process is gone, or it is another user's and portd lacks CAP_SYS_PTRACE.
"""

from __future__ import annotations

import functools
import os
import pwd
import time
from collections.abc import Iterator
from typing import Final

from portd.core.model import KnownBy, Owner

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
"""The unit of start times in /proc/PID/stat."""
READ_BYTES: Final = 4096
"""Enough for stat, status and cgroup; a command line is cut there too."""
CMDLINE_ARGS_MAX: Final = 64
"""Arguments that are kept of a command line: a lease is no place for a megabyte of them."""


def read(path: str, size_bytes: int = READ_BYTES) -> bytes | None:
    """Read the beginning of a file of /proc, or None."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(descriptor, size_bytes)
    except OSError:  # ESRCH: the process ended between open and read
        return None
    finally:
        os.close(descriptor)


def parse_stat(stat: bytes) -> tuple[str, int, int] | None:
    """Return (state letter, parent's pid, start ticks) of /proc/PID/stat; the name in it may hold anything."""
    fields = stat[stat.rfind(b")") + 2:].split()
    if len(fields) < 20:
        return None
    return fields[0].decode(), int(fields[1]), int(fields[19])


def parse_uid(status: bytes) -> int | None:
    """Return the effective uid of /proc/PID/status."""
    at = status.find(b"\nUid:\t")
    return int(status[at + 6:status.index(b"\n", at + 1)].split()[1]) if at >= 0 else None


def parse_unit(cgroup: bytes) -> str | None:
    """Return the systemd unit of /proc/PID/cgroup: the innermost service or scope, by the unified or systemd's tree."""
    paths = {}
    for line in cgroup.decode("utf-8", "replace").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" or controllers == "name=systemd":
            paths[number == "0"] = path
    for unified in (True, False):
        for part in reversed(paths.get(unified, "").split("/")):
            if part.endswith((".service", ".scope", ".socket", ".mount", ".swap")):
                return part
    return None


@functools.cache
def boot_id() -> str:
    """Return what the kernel calls this boot (random(4))."""
    return (read("/proc/sys/kernel/random/boot_id") or b"").decode().strip()


@functools.lru_cache(maxsize=1024)
def user_name(uid: int) -> str | None:
    """Return a user's name, or None."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return None


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in ticks since the boot; None when it is gone or a zombie."""
    stat = read(f"/proc/{pid}/stat")
    parsed = parse_stat(stat) if stat else None
    return None if parsed is None or parsed[0] in "ZX" else parsed[2]


def started_at(ticks: int) -> float:
    """Turn start ticks into epoch seconds."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / TICKS_PER_S


def describe(pid: int, known_by: KnownBy) -> Owner | None:
    """Describe a process, or None when it is gone. Costs five small reads (60 µs)."""
    stat, status = read(f"/proc/{pid}/stat"), read(f"/proc/{pid}/status")
    parsed = parse_stat(stat) if stat else None
    uid = parse_uid(status) if status else None
    if parsed is None or uid is None:
        return None
    try:
        exe = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        exe = None
    cmdline = read(f"/proc/{pid}/cmdline")
    cgroup = read(f"/proc/{pid}/cgroup")
    return Owner(pid=pid, uid=uid, user=user_name(uid), exe=_text(exe), cmdline=_arguments(cmdline),
                 unit=parse_unit(cgroup) if cgroup else None, started_at=started_at(parsed[2]), known_by=known_by)


def parent(pid: int) -> int | None:
    """Return the pid of a process' parent, or None."""
    stat = read(f"/proc/{pid}/stat")
    parsed = parse_stat(stat) if stat else None
    return parsed[1] if parsed else None


def pids() -> list[int]:
    """List all processes, the newest pid first: who just began to listen is likely to be young."""
    return sorted((int(name) for name in os.listdir("/proc") if name.isdecimal()), reverse=True)


def socket_inodes(pid: int) -> Iterator[int]:
    """Yield the inodes of the sockets that a process has open."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        try:
            target = os.readlink(f"{directory}/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            yield int(target[8:-1])


def network_namespace(pid: int | str = "self") -> int | None:
    """Return the inode of a process' network namespace, or None where the kernel does not show it."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None


def _arguments(cmdline: bytes | None) -> tuple[str, ...] | None:
    if not cmdline:
        return None
    return tuple(_text(part.decode("utf-8", "replace")) or ""
                 for part in cmdline.rstrip(b"\0").split(b"\0")[:CMDLINE_ARGS_MAX])


def _text(value: str | None) -> str | None:
    """Replace what is not Unicode (paths may be any bytes): it goes into JSON."""
    return None if value is None else value.encode("utf-8", "replace").decode()
