"""Daemons, and a directory where the package is installed as its users install it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.conformance.bed import Daemon
from tests.support.npm import npm

PACKAGE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running daemon that the tests share: each takes service names of its own."""
    with Daemon(tmp_path_factory.mktemp("portd"), 100) as made:
        made.start()
        yield made


@pytest.fixture
def own_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for one test alone, running, which it may stop and start."""
    with Daemon(tmp_path_factory.mktemp("portd"), 100) as made:
        made.start()
        yield made


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the packed client, Express and TypeScript installed, for programs to be put in."""
    directory = tmp_path_factory.mktemp("project")
    npm("pack", str(PACKAGE), cwd=directory)
    (archive,) = directory.glob("*.tgz")
    npm(
        "install",
        "--no-audit",
        "--no-fund",
        f"./{archive.name}",
        "express@5",
        "@types/express@5",
        "@types/node@20",
        "typescript@5",
        cwd=directory,
    )
    return directory
