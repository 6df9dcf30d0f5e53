"""Descriptors: a daemon takes all that it may have, and has room for them before it serves."""

from __future__ import annotations

import resource
from pathlib import Path

from portd.adapters.kernel.descriptors import PREGROWN
from tests.e2e.conftest import MakeDaemon


def test_file_limit_is_raised_and_the_descriptor_table_grown(make_daemon: MakeDaemon) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    daemon = make_daemon().start()
    assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    assert table_size(daemon.pid) >= min(hard, PREGROWN)


def test_a_low_hard_limit_is_no_fault(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(prelude="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))").start()
    assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (300, 300)
    assert daemon.lease("few")


def table_size(pid: int) -> int:
    """Return how many descriptors a process' table has room for (proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("FDSize:")[2].split()[0])
