"""Which clients there are, and how the driver of each is started."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BUILD_TIMEOUT_S = 180.0
"""Seconds that building a driver may take: the first time Go compiles its standard library, too."""


class Language(NamedTuple):
    """A client: the driver's source (left out while there is none), the tool that it needs, and what it can't do."""

    source: Path
    command: Sequence[str]
    tool: str = ""
    cannot: frozenset[str] = frozenset()

    @property
    def missing(self) -> str:
        """Return why the driver can't run on this machine; "" where it can."""
        return f"{self.tool} is not installed" if self.tool and shutil.which(self.tool) is None else ""


PYTHON = ROOT / "clients/python/tests"
NODE = ROOT / "clients/node/test/driver.mjs"
GO = ROOT / "clients/go/internal/driver/main.go"

LANGUAGES = {
    name: language
    for name, language in {
        "python": Language(
            PYTHON / "driver.py", [sys.executable, str(PYTHON / "driver.py")], cannot=frozenset({"unwatch"})
        ),
        "asyncio": Language(PYTHON / "driver_aio.py", [sys.executable, str(PYTHON / "driver_aio.py")]),
        "node": Language(NODE, ["node", str(NODE)], "node", frozenset({"handoff"})),
        "go": Language(GO, [], "go"),
    }.items()
    if language.source.exists()
}


def command(name: str, directory: Path) -> list[str]:
    """Return the words that start a driver; Go's is built in `directory` first, which is done once a session."""
    language = LANGUAGES[name]
    if name != "go":
        return list(language.command)
    binary = directory / "driver"
    if not binary.exists():
        built = subprocess.run(
            ["go", "build", "-o", str(binary), "./internal/driver"],
            cwd=GO.parents[2],
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
        assert built.returncode == 0, built.stderr
    return [str(binary)]
