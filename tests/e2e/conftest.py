"""Daemons for the end-to-end tests; each is looked over when its test is done: no traceback, no unexpected error."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Daemon

MakeDaemon = Callable[..., Daemon]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter, with a name short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="portd-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def make_daemon(place: Path) -> Iterator[MakeDaemon]:
    """Make daemons for one test, not yet started; all are ended and their logs checked."""
    made: list[Daemon] = []
    with ExitStack() as stack:

        def make(**options: Any) -> Daemon:
            made.append(stack.enter_context(Daemon(place / f"d{len(made)}", **options)))
            return made[-1]

        yield make
    for daemon in made:
        daemon.check_log()


@pytest.fixture
def own_daemon(make_daemon: MakeDaemon) -> Daemon:
    """A running daemon for one test alone."""
    return make_daemon().start()


@pytest.fixture(scope="module")
def _shared() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="portd-") as directory:
        Path(directory).chmod(0o755)
        with Daemon(Path(directory)) as made:
            yield made.start()


@pytest.fixture
def daemon(_shared: Daemon) -> Iterator[Daemon]:
    """A running daemon that the tests of a room share: each takes service names of its own, and leaves it running."""
    yield _shared
    assert _shared.process is not None
    assert _shared.process.poll() is None, _shared.log()
    _shared.check_log()
