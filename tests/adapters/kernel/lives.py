"""Lives and deaths of processes: reused PIDs, zombies, exits that are reported."""

from __future__ import annotations

import asyncio
import subprocess

import pytest

from portd.adapters.kernel import procfs
from portd.core.model import ProcessId

DEADLINE_S = 20.0


class Exits:
    """Notes who is gone, and lets a test wait for it."""

    def __init__(self) -> None:
        self.seen: list[ProcessId] = []
        self._more = asyncio.Event()

    def __call__(self, process: ProcessId) -> None:
        self.seen.append(process)
        self._more.set()

    async def wait(self, count: int = 1) -> list[ProcessId]:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.seen) < count:
                self._more.clear()
                await self._more.wait()
        return self.seen


async def turns(count: int = 5) -> None:
    """Let the loop look at its descriptors some times: whatever was ready has been called then."""
    for _ in range(count):
        await asyncio.sleep(0)


def is_zombie(pid: int) -> bool:
    return procfs.stat(pid).state == "Z"


def born_with(pid: int) -> subprocess.Popen:
    """Start a process that has a given pid, which is free: the kernel gives the number after the last one."""
    for _ in range(200):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(pid - 1))
        child = subprocess.Popen(["sleep", "60"])
        if child.pid == pid:
            return child
        end(child)
    pytest.fail(f"another process always came before us to pid {pid}")


def end(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()
