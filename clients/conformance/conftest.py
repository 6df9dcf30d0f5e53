"""The daemons: one that nobody stops, one that cases stop and start, and those with settings of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from clients.conformance.blocks import claim
from clients.conformance.daemons import Stage
from clients.conformance.runner import Case, Stages


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where drivers are built."""
    return tmp_path_factory.mktemp("drivers")


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Give a case its daemon: running, without leases. Every language meets the same one."""
    made: dict[str, Stage] = {}
    block, mark = claim()
    facts = {"requested": block.requested, "http": f"http://127.0.0.1:{block.http}"}
    with mark, ExitStack() as stack:

        def stage_of(case: Case) -> Stage:
            kind = "own" if case.daemon is not None else "mortal" if case.spoils_its_daemon else "steady"
            name = case.name if kind == "own" else kind
            if name not in made:
                directory = tmp_path_factory.mktemp(kind) / "portd"  # as a user's daemon has it in XDG_RUNTIME_DIR
                directory.mkdir()
                settings = {"listen": {"http": f"127.0.0.1:{block.http}"}} if kind == "steady" else case.daemon or {}
                made[name] = Stage(directory, block.pools[kind], settings, facts)
                stack.callback(made[name].stop)
            made[name].clear()
            return made[name]

        yield stage_of
    for stage in made.values():
        assert not re.search(r"Traceback| (ERROR|CRITICAL) ", stage.log()), stage.log()
