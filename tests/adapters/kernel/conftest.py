"""What the kernel's tests share: children that end with the test, both event loops, holds, and the file limit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from portd.adapters.kernel.holds import KernelHolds
from portd.adapters.kernel.netlink import SocketDiag
from tests.adapters.kernel.foreign import foreign

DEADLINE_S = 20.0
"""How long a condition may take on a slow machine; on a quick one nobody waits for it."""
NOBODY = 65534


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable:
    """Run a coroutine on one of the event loops that portd may run on."""
    return request.param


@pytest.fixture
def spawn(wait_until) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a process: `spawn("sleep", "60")`, or `spawn(python="...")`. It is killed and reaped after the test.

    Popen returns in the midst of exec, when the new program's command line is not there yet.
    """
    children: list[subprocess.Popen] = []

    def start(*argv: str, python: str | None = None, **options) -> subprocess.Popen:
        command = [sys.executable, "-c", python, *argv] if python is not None else list(argv)
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
        children.append(child)
        wait_until(lambda: Path(f"/proc/{child.pid}/cmdline").read_bytes() or child.poll() is not None)
        return child

    yield start
    for child in children:
        child.kill()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        child.wait()


@pytest.fixture
def wait_until() -> Callable[[Callable[[], object]], None]:
    """Look again until something is true; fails at the deadline."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            time.sleep(0.002)

    return wait


@pytest.fixture
def descriptors() -> Callable[[], int]:
    """Count the descriptors that this process has open."""
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_descriptor_left() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Be at the file limit within a `with`; `left` descriptors can still be opened."""

    @contextlib.contextmanager
    def limit(left: int = 0) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        filled = [os.open("/dev/null", os.O_RDONLY) for _ in range(left + 1)]  # holes below are filled first
        resource.setrlimit(resource.RLIMIT_NOFILE, (filled[-1] + 1, hard))
        plugs = []
        with contextlib.suppress(OSError):
            while True:  # until the limit
                plugs.append(os.open("/dev/null", os.O_RDONLY))
        for descriptor in filled[:left]:
            os.close(descriptor)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in (*filled[left:], *plugs):
                os.close(descriptor)

    return limit


@pytest.fixture
def as_nobody() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Act as a user without any right within a `with`: no capability, no sight of root's processes."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become nobody")

    @contextlib.contextmanager
    def drop() -> Iterator[None]:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)

    return drop


@pytest.fixture
def as_root() -> None:
    """Skip where the test is not root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def diag() -> Iterator[SocketDiag]:
    """The kernel's table of sockets."""
    with contextlib.closing(SocketDiag()) as diag:
        diag.listeners(1)  # its own descriptor is open from now on
        yield diag


@pytest.fixture
def holds(diag) -> Iterator[KernelHolds]:
    """Holds that end with the test."""
    with contextlib.closing(KernelHolds(diag.bound)) as holds:
        yield holds


@pytest.fixture
def port() -> int:
    """A port outside the kernel's own choice that nobody has on any address."""
    for port in random.sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), foreign("::", port), foreign("::", port, udp=True):
            return port
    pytest.fail("no free port")
