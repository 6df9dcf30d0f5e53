"""Daemons for the tests of the client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clients.conformance.bed import Daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running daemon that the tests of a module share: each uses service names of its own."""
    with Daemon(tmp_path_factory.mktemp("portd"), 200) as made:
        made.start()
        yield made


@pytest.fixture
def own_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for one test alone, running, which it may stop and start."""
    with Daemon(tmp_path_factory.mktemp("portd"), 100) as made:
        made.start()
        yield made
