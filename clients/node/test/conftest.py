"""Daemons, and a directory where the package is installed as its users install it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.conformance.bed import Daemon

PACKAGE = Path(__file__).parents[1]
INSTALL_TIMEOUT_S = 240.0
"""Seconds that npm may take for four packages."""


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


def npm(*words: str, cwd: Path) -> str:
    """Run npm, and return what it writes."""
    ran = subprocess.run(
        ["npm", *words], cwd=cwd, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
