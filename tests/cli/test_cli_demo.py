"""The demo shows what it says, in time, and leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.bed import ROOT, wait_for

TIME_S = 20.0
"""What the demo promises to stay under."""


@contextmanager
def demo(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the demo in a pipe, with `directory` as the place for temporary files."""
    environ = {
        **os.environ,
        "TMPDIR": str(directory),
        "PYTHONPATH": f"{ROOT}:{ROOT}/clients/python",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "portd", "demo"],
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def processes_of(directory: Path) -> list[int]:
    """Find the processes that know of the demo's directory: its daemon and its services."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str(directory).encode() in (place / "environ").read_bytes() and int(place.name) != os.getpid():
                found.append(int(place.name))
        except (OSError, ValueError):
            continue
    return found


def test_the_demo_shows_all_its_steps_in_time(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with demo(tmp_path) as process:
        text, _ = process.communicate(timeout=TIME_S)
    assert process.returncode == 0, text
    assert time.monotonic() - started_s < TIME_S
    ports = re.findall(r"orders +orders-1 +(\d+) +\S+ .*bound +passing", text)
    assert len(ports) == 2, text  # before the crash, and after
    assert ports[0] == ports[1]
    assert re.search(r"hello from orders, process \d+", text)
    assert re.search(r"lease [0-9a-f]+ ended \d+ ms later", text)
    assert f"orders is on port {ports[0]} again" in text
    assert not list(tmp_path.iterdir())
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_tidies_up_when_it_is_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    with demo(tmp_path) as process:
        wait_for(lambda: len(processes_of(tmp_path)) > 2, "the demo has started something")
        process.send_signal(number)
        text, _ = process.communicate(timeout=TIME_S)
    assert process.returncode == 128 + number
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())
    assert not processes_of(tmp_path)
