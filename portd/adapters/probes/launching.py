"""Starts programs with the rights of a lease's user, and none of the daemon's privileges.

Credentials belong to a thread in Linux (credentials(7)). One thread gives its capabilities up and sets no_new_privs
(PR_SET_NO_NEW_PRIVS in prctl(2)); what it starts inherits that, and the daemon keeps what it has. Root's daemon lets
the child change its user, which clears every capability (capabilities(7), "Effect of user ID changes on capabilities").
This module must not know what is started.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import pwd
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, NamedTuple

from portd.adapters.probes.results import ProbeFailed
from portd.core.rights import can_run_as

PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
CAPABILITY_VERSION_3: Final = 0x20080522
NO_GROUP: Final = 65534
"""The group of a user without an account (a container's, a dynamic one): nogroup."""


class Rights(NamedTuple):
    """As whom a program runs. `user` None: as the daemon itself, whose user it is."""

    user: int | None = None
    group: int | None = None
    groups: tuple[int, ...] | None = None


def rights_of(uid: int | None) -> Rights:
    """Return the rights of a lease's user; raises ProbeFailed where the daemon can't give up its own for them."""
    if uid is None or not can_run_as(os.geteuid(), uid):
        raise ProbeFailed("portd runs programs only as the user of the lease, and can't become that user")
    if os.geteuid() != 0:
        return Rights()
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return Rights(uid, NO_GROUP, ())
    return Rights(uid, user.pw_gid, tuple(os.getgrouplist(user.pw_name, user.pw_gid)))


class Launcher:
    """The thread that starts programs. It is started with the first of them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "portd-launcher", initializer=give_up_privileges)

    async def start(self, command: Sequence[str], environ: dict[str, str], rights: Rights) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own, its output in a pipe. Raises what Popen does.

        When the caller is cancelled meanwhile, the program is killed as soon as it has started.
        """
        starting = self._thread.submit(_start, tuple(command), environ, rights)
        try:
            return await asyncio.shield(asyncio.wrap_future(starting))
        except asyncio.CancelledError:
            starting.add_done_callback(_abandon)
            raise

    def close(self) -> None:
        """End the thread; programs that run are their starters' to end."""
        self._thread.shutdown(wait=False)


def give_up_privileges() -> None:
    """Give up, for this thread, what a program that it starts could inherit. Raises OSError.

    No_new_privs and an empty ambient set are what counts: without them a program of another user than root has no
    capability after execve (capabilities(7)). The other sets are emptied too, but for those that root needs to change
    the user; a sandbox may forbid that (capset is in systemd's @privileged), which changes nothing for the program.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, for capabilities 0 to 31 and 32 to 63
    _check(libc.capget(header, sets))
    for index in range(6):
        if os.geteuid() != 0 or index % 3 == 2:
            sets[index] = 0
    with suppress(PermissionError):
        _check(libc.capset(header, sets))


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _start(command: tuple[str, ...], environ: dict[str, str], rights: Rights) -> subprocess.Popen[bytes]:
    changes: dict[str, Any] = {}
    if rights.user is not None:
        changes = {"user": rights.user, "group": rights.group, "extra_groups": rights.groups}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        cwd="/",
        env=environ,
        start_new_session=True,
        **changes,
    )


def _abandon(starting: Future[subprocess.Popen[bytes]]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        process = starting.result()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
