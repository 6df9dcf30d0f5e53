"""Daemons for the tests of the client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clients.conformance.bed import Daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running daemon that the tests of a module share: each uses service names of its own."""
    made = Daemon(tmp_path_factory.mktemp("portd"), "24500-24699")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def own_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for one test alone, running, which it may stop and start."""
    made = Daemon(tmp_path_factory.mktemp("portd"), "24700-24799")
    made.start()
    yield made
    made.stop()
