"""Daemons for the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.bed import Daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running daemon that the tests of a module share: each uses service names of its own."""
    with Daemon(tmp_path_factory.mktemp("portd")) as made:
        made.start()
        yield made


@pytest.fixture
def own_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for one test alone, not yet started."""
    with Daemon(tmp_path_factory.mktemp("portd"), 100) as made:
        yield made
