"""The reader of /proc (proc(5)): what the kernel shows of a process.

Parsers take bytes, so that tests feed them literal kernel text. Readers return None, or nothing, where the kernel shows
nothing: the process is gone, or it is another user's and the kernel hides it. `root` is where proc is mounted.
This module must not know what a lease is, nor whether a process is still the one it was: pids are reused.
"""

from __future__ import annotations

import functools
import os
import pwd
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from portd import inspector
from portd.core.model import KnownBy, Owner
from portd.core.ownership import ProcessKey

ROOT: Final = "/proc"
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
"""The unit of start times in /proc/PID/stat: 10 ms on every Linux that portd runs on."""
READ_BYTES: Final = 4096
"""Enough for stat and cgroup; a command line is cut there."""
ANCESTORS_MAX: Final = 32
"""How far up a process' parents are followed: shells, supervisors and a few forks."""
ARGUMENTS_MAX: Final = 64
"""Arguments that are kept of a command line: a lease does not store a megabyte of them."""
UNIT_KINDS: Final = (".service", ".scope", ".socket", ".mount", ".swap")
"""Units that have processes of their own (systemd.unit(5)); a slice only holds other units."""


class Stat(NamedTuple):
    """Three fields of /proc/PID/stat: the state's letter, the parent's pid, and the start in ticks since the boot."""

    state: str
    parent: int
    start_ticks: int


# --- parsers ---


def parse_stat(text: bytes) -> Stat:
    """Parse /proc/PID/stat. The name in it may hold anything, brackets too, but nothing after it holds one."""
    fields = text[text.rindex(b")") + 2 :].split(None, 20)
    return Stat(fields[0].decode("ascii"), int(fields[1]), int(fields[19]))


class Unit(NamedTuple):
    """A systemd unit: its name, and the path of its control group, which no other unit of the host has."""

    name: str
    path: str


@functools.lru_cache(maxsize=256)
def parse_unit(text: bytes) -> Unit | None:
    """Return the systemd unit of /proc/PID/cgroup, by the unified tree or else systemd's own: the innermost one.

    A user's unit lies within the service of the user's manager: `user@1000.service/app.slice/web.service` is
    `web.service`. None for a process that systemd did not start (a container, a host without systemd). Answers are
    kept: all processes of a unit have the same text.
    """
    paths = {}
    for line in text.decode("utf-8", "replace").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or controllers == "name=systemd":
            paths[number] = path.removesuffix(" (deleted)")
    for _, path in sorted(paths.items()):  # "0", the unified tree, comes first
        parts = path.split("/")
        for index in reversed(range(len(parts))):
            if parts[index].endswith(UNIT_KINDS):  # the underscore escapes names that look like a controller's file
                return Unit(parts[index].removeprefix("_"), "/".join(parts[: index + 1]))
    return None


def parse_arguments(text: bytes) -> tuple[str, ...] | None:
    """Split /proc/PID/cmdline; None for what has none: a kernel thread, a zombie."""
    arguments = text.rstrip(b"\0")  # a process that renamed itself leaves more than one
    if not arguments:
        return None
    return tuple(part.decode("utf-8", "replace") for part in arguments.split(b"\0")[:ARGUMENTS_MAX])


# --- readers ---


@functools.cache
def boot_id() -> str:
    """Return what the kernel calls this boot (random(4)); raises OSError where it does not say."""
    return _read(f"{ROOT}/sys/kernel/random/boot_id").decode("ascii").strip()


def unprivileged_from(root: str = ROOT) -> int:
    """Return the first port that any user may bind (ip_unprivileged_port_start; 1024 where it is unknown)."""
    try:
        with open(f"{root}/sys/net/ipv4/ip_unprivileged_port_start", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 1024


def stat(pid: int, root: str = ROOT) -> Stat:
    """Read when a process started, and whose child it is; raises OSError, EMFILE at the file limit too."""
    return parse_stat(_read(f"{root}/{pid}/stat"))


def start_ticks(pid: int, root: str = ROOT) -> int | None:
    """Return when a process started, in ticks since the boot; None when it is gone or a zombie."""
    try:
        read = stat(pid, root)
    except OSError:
        return None
    return None if read.state in "ZX" else read.start_ticks


def parent(pid: int, root: str = ROOT) -> int | None:
    """Return the pid of a process' parent, or None."""
    try:
        return stat(pid, root).parent
    except OSError:
        return None


def uid(pid: int, root: str = ROOT) -> int | None:
    """Return a process' effective uid: its directory's owner, dumpable or not. A fifth of reading its status."""
    try:
        return os.stat(f"{root}/{pid}").st_uid
    except OSError:
        return None


def cmdline(pid: int, root: str = ROOT) -> tuple[str, ...] | None:
    """Return a process' command line, or None."""
    try:
        return parse_arguments(_read(f"{root}/{pid}/cmdline"))
    except OSError:
        return None


def describe(
    pid: int,
    known_by: KnownBy,
    known: Stat | None = None,
    root: str = ROOT,
    *,
    read_exe: Callable[[int], str | None] = inspector.exe,
) -> Owner | None:
    """Describe a process, or None when it is gone; costs 30 µs, a quarter less where its stat is `known`.

    `read_exe` reads the path of a process' program, which the kernel hides of another user's.
    """
    user_id = uid(pid, root)
    if user_id is None:
        return None
    try:
        ticks = (known or stat(pid, root)).start_ticks
    except OSError:
        return None
    unit = _unit(pid, root)
    return Owner(
        pid=pid,
        uid=user_id,
        user=user_name(user_id),
        exe=read_exe(pid),
        cmdline=cmdline(pid, root),
        unit=None if unit is None else unit.name,
        started_at=started_at(ticks),
        known_by=known_by,
        unit_path=None if unit is None or unit.path == _own_unit_path() else unit.path,
    )


def ancestors(pid: int, root: str = ROOT) -> tuple[ProcessKey, ...]:
    """Return a process and those that it comes from, nearest first; what has exited ends the line."""
    line: list[ProcessKey] = []
    with suppress(OSError):
        while pid > 0 and len(line) < ANCESTORS_MAX:
            read = stat(pid, root)
            line.append((pid, read.start_ticks))
            pid = read.parent
    return tuple(line)


def started_at(ticks: int) -> float:
    """Turn start ticks into epoch seconds, by what the wall clock says now."""
    return round(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / TICKS_PER_S, 2)


@functools.lru_cache(maxsize=1024)
def user_name(user_id: int) -> str | None:
    """Return a user's name, or None. Kept: the user database may be slow, or on another host."""
    try:
        return pwd.getpwuid(user_id).pw_name
    except (KeyError, OverflowError):
        return None


def pids(root: str = ROOT) -> list[int]:
    """List all processes, the newest pid first: who has just called or begun to listen is likely to be young."""
    return sorted((int(name) for name in os.listdir(root) if name.isdecimal()), reverse=True)


def children(pid: int, root: str = ROOT) -> list[int]:
    """Return the pids of a process' children; none where the kernel does not list them (CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"{root}/{pid}/task"):
            found += map(int, _read(f"{root}/{pid}/task/{thread}/children").split())
    except OSError:  # it ended meanwhile
        pass
    return found


def network_namespace(pid: int | str, root: str = ROOT) -> int | None:
    """Return what identifies a process' network namespace, or None for a process that is gone or hidden.

    It is the inode of a file below /proc/PID/net: each namespace has files of its own there, and every user may read
    them, unlike the link /proc/PID/ns/net (CAP_SYS_PTRACE).
    """
    with suppress(OSError):
        return os.stat(f"{root}/{pid}/net/dev").st_ino
    with suppress(OSError):  # the first thread may have ended: its process lives on without it
        for thread in os.listdir(f"{root}/{pid}/task"):
            with suppress(OSError):
                return os.stat(f"{root}/{pid}/task/{thread}/net/dev").st_ino
    return None


def user_map(pid: int | str, root: str = ROOT) -> tuple[bytes, ...] | None:
    """Return the uid map of a process' user namespace as seen from here (user_namespaces(7)), or None.

    Two processes of one namespace have the same map. Every user may read it.
    """
    try:
        return tuple(_read(f"{root}/{pid}/uid_map").split())
    except OSError:
        return None


def namespace_pids(pid: int, root: str = ROOT) -> tuple[int, ...]:
    """Return the pids of a process in its pid namespaces, the outermost first (NSpid in proc(5)); empty when gone."""
    try:
        status = _read(f"{root}/{pid}/status")
    except OSError:
        return ()
    _, _, rest = status.partition(b"\nNSpid:")
    return tuple(map(int, rest.partition(b"\n")[0].split())) or (pid,)


@functools.cache
def _own_unit_path() -> str | None:
    """Return the control group of the unit that portd was started in: the others in it are nobody's in particular."""
    unit = _unit(os.getpid(), ROOT)
    return None if unit is None else unit.path


def _unit(pid: int, root: str) -> Unit | None:
    try:
        return parse_unit(_read(f"{root}/{pid}/cgroup"))
    except OSError:
        return None


def _read(path: str, size: int = READ_BYTES) -> bytes:
    """Read the beginning of a file of /proc in one go; raises OSError (ESRCH when the process ended meanwhile)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)
