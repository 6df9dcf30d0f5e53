"""A real Chromium for the dashboard's tests, driven by playwright-core; skips where either can't be had."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import make_daemon, own_daemon, place  # noqa: F401  (fixtures)

DRIVER = Path(__file__).with_name("browser.mjs")
PACKAGES = ["playwright-core@1", "axe-core@4"]


class Browser:
    """A page that a test drives: each method is one command of `browser.mjs`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, op: str, **options: Any) -> Any:
        """Send a command and return its value; a failure of the page fails the test."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"op": op, **options}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def texts(self, selector: str) -> list[str]:
        """Return the text of every element that matches, as a person reads it, on one line each."""
        return [" ".join(text.split()) for text in self.do("text", selector=selector)]


@pytest.fixture(scope="session")
def npm_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with playwright-core and axe-core in it."""
    if shutil.which("npm") is None:
        pytest.skip("not installed: npm")
    directory = tmp_path_factory.mktemp("web")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefer-offline", "--prefix", str(directory)]
    found = subprocess.run([*command, *PACKAGES], capture_output=True, check=False, timeout=180)
    if found.returncode:
        pytest.skip(f"npm can't install {', '.join(PACKAGES)}")
    return directory


@pytest.fixture(scope="module")
def browser(npm_packages: Path) -> Iterator[Browser]:
    """A running Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("not installed: chromium")
    process = subprocess.Popen(
        ["node", str(DRIVER), str(npm_packages), chromium], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield Browser(process)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(20)
    process.stdout.close()  # type: ignore[union-attr]
