"""The `command` check: a program that the configuration allows says by its exit status how a service is.

0 is passing, 1 a warning, all else critical (as monitoring plugins do). There is no shell. The program runs as the user
of the lease, with that user's groups, and with no privilege that the daemon has: whoever leases a port chooses its
arguments. It gets no environment but the service's own, and it and all that it started in its session's group are
killed when it exits or its time is out.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Collection
from contextlib import suppress
from typing import Final

from portd.adapters.probes.connection import Target
from portd.adapters.probes.launching import Launcher, Rights, rights_of
from portd.adapters.probes.results import NOTE_MAX_BYTES, CheckResult, ProbeFailed, describe, note
from portd.core.health import Result
from portd.core.model import CommandCheck, Lease

OUTPUT_MAX_BYTES: Final = 1024 * 1024
"""What is read of a program's output, of which the first 4 KB are kept. One that writes more is killed: reading on
would keep the loop from its work."""
READ_BYTES: Final = 64 * 1024
DYING_S: Final = 1.0
"""How long a killed program keeps its check waiting: SIGKILL needs a millisecond, unless the process is blocked in the
kernel."""
PATH: Final = "/usr/local/bin:/usr/bin:/bin"
RESULTS: Final[dict[int, Result]] = {0: "passing", 1: "warning"}


async def probe(
    lease: Lease, target: Target, check: CommandCheck, allowed: Collection[str], launcher: Launcher
) -> CheckResult:
    """Run the program once. Raises ProbeFailed when it may not or can't be run; the caller sets the time-out."""
    program = check.command[0]
    if program not in allowed:
        raise ProbeFailed(f"{note(program)} is not among allow_commands in the configuration")
    async with Run(check.command, environment(lease, target), rights_of(lease.uid), launcher) as run:
        status = await run.exit_status()
        said = note(run.output)
    if status in RESULTS:
        return CheckResult(RESULTS[status], said)
    how = f"exit status {status}" if status >= 0 else f"killed by signal {-status} ({signal.strsignal(-status)})"
    return CheckResult("critical", note(f"{how}: {said}" if said else how))


class Run:
    """One run of a program: started on entry, killed with all its children on exit. The first `kept_bytes` of its
    output are kept.

    Its exit is reported by a pidfd, and not by asyncio's subprocesses: those of uvloop can't change the user.
    """

    def __init__(
        self,
        command: tuple[str, ...],
        environ: dict[str, str],
        rights: Rights,
        launcher: Launcher,
        kept_bytes: int = NOTE_MAX_BYTES,
    ) -> None:
        self._command = command
        self._environ = environ
        self._rights = rights
        self._launcher = launcher
        self._kept_bytes = kept_bytes
        self._unread_bytes = OUTPUT_MAX_BYTES
        self.output = b""

    async def __aenter__(self) -> Run:
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[int] = self._loop.create_future()
        try:
            self._process = await self._launcher.start(self._command, self._environ, self._rights)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise ProbeFailed(f"{note(self._command[0])} can't be started: {describe(error)}") from error
        assert self._process.stdout is not None
        self._pipe = self._process.stdout
        os.set_blocking(self._pipe.fileno(), False)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._loop.add_reader(self._pipe, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Kill what still runs. One that can't die now (it waits for a disk) is reaped whenever it does."""
        self._kill()
        deadline = self._loop.time() + DYING_S
        while not self._exited.done() and (left_s := deadline - self._loop.time()) > 0:
            with suppress(asyncio.CancelledError):  # a second one: the first, or the time-out, has brought us here
                await asyncio.wait([self._exited], timeout=left_s)

    async def exit_status(self) -> int:
        """Wait for the exit; returns the status, or minus the number of the signal that killed it."""
        status = await asyncio.shield(self._exited)
        if self._unread_bytes < 0:
            raise ProbeFailed("the program's output does not end")
        return status

    def _kill(self) -> None:
        """Kill the whole group. Only while its leader is not reaped: until then its number is nobody else's."""
        if not self._exited.done():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _on_exit(self) -> None:
        self._read()  # what was written last may still be in the pipe
        self._kill()  # what the program left behind
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._stop_reading()
        self._exited.set_result(self._process.wait())  # at once: the pidfd says that it has exited

    def _read(self) -> None:
        if self._pipe.closed:
            return
        data = self._pipe.read(READ_BYTES)
        if data is None:  # nothing there now
            return
        self.output = (self.output + data)[: self._kept_bytes]
        self._unread_bytes -= len(data)
        if self._unread_bytes < 0:
            self._kill()
        if self._unread_bytes < 0 or not data:
            self._stop_reading()

    def _stop_reading(self) -> None:
        if not self._pipe.closed:
            self._loop.remove_reader(self._pipe)
            self._pipe.close()


def environment(lease: Lease, target: Target) -> dict[str, str]:
    """Make a check's whole environment: of the daemon's own nothing goes in."""
    return {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "HOST": target.host,
        "PORT": str(target.port),
        "SERVICE": lease.service,
        "INSTANCE": lease.instance,
    }
