"""Two daemons for all cases: one that nobody stops, and one that cases stop, kill and start again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from clients.conformance.daemons import HTTP_PORT, Stage
from clients.conformance.runner import Case, Stages

POOLS = {"steady": "25000-25099", "mortal": "25100-25199", "own": "25200-25299"}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where drivers are built."""
    return tmp_path_factory.mktemp("drivers")


@pytest.fixture(scope="session")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stage]]:
    """Start the two daemons; `portd/` is where a user's daemon would have its socket."""
    made: dict[str, Stage] = {}
    with ExitStack() as stack:
        for name in ("steady", "mortal"):
            directory = tmp_path_factory.mktemp(name) / "portd"
            directory.mkdir()
            made[name] = Stage(directory, POOLS[name],
                               {"listen": {"http": f"127.0.0.1:{HTTP_PORT}"}} if name == "steady" else {})
            stack.callback(made[name].stop)
        yield made


@pytest.fixture
def stages(_kept: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Give a case its daemon: running, without leases."""
    with ExitStack() as stack:
        def stage_of(case: Case) -> Stage:
            if case.daemon is not None:
                stage = Stage(tmp_path_factory.mktemp("own"), POOLS["own"], case.daemon)
                stack.callback(stage.stop)
            else:
                stage = _kept["mortal" if case.spoils_its_daemon else "steady"]
            stage.clear()
            return stage

        yield stage_of
