"""npm, for tests of and against packages; a test is skipped where the registry can't be reached."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

TIMEOUT_S = 240.0
"""Seconds that npm may take for a few packages, on a loaded machine."""
UNREACHABLE = ("EAI_AGAIN", "ENOTFOUND", "ENETUNREACH", "ECONNREFUSED")


def npm(*words: str, cwd: Path) -> str:
    """Run npm, and return what it writes."""
    ran = subprocess.run(
        ["npm", "--fetch-retries=1", "--fetch-retry-mintimeout=1000", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if ran.returncode and any(code in ran.stderr for code in UNREACHABLE):
        pytest.skip("npm can't reach its registry")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
