"""Daemons for the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.bed import Daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running daemon that the tests of a module share: each uses service names of its own."""
    made = Daemon(tmp_path_factory.mktemp("portd"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def own_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for one test alone, not yet started."""
    made = Daemon(tmp_path_factory.mktemp("portd"), "24400-24499")
    yield made
    made.stop()
