"""The box that the tests of a module share, with portd installed and running; and boxes of a test's own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from box import Box, missing
from builds import build_package, build_venv

SEED = """\
chroot . useradd --system --no-create-home foreign
mkdir -p etc/portd
cat >etc/portd/portd.toml <<'EOF'
[leases]
cooldown = 0
EOF
chroot . useradd --create-home alice
"""


@pytest.fixture(scope="session")
def venv(tmp_path_factory) -> Path:
    """Install the tree once, as it will stand at /opt/portd."""
    if reason := missing():
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("opt") / "portd"
    build_venv(place)
    return place


@pytest.fixture(scope="session")
def packages(venv, tmp_path_factory) -> list[Path]:
    """Build the Debian package twice, the second with a higher version."""
    place = tmp_path_factory.mktemp("packages")
    return [build_package(place, version, venv) for version in ("0.9.1", "0.9.2")]


@pytest.fixture(scope="session")
def make_box(venv, tmp_path_factory) -> Iterator[Callable[..., Box]]:
    """Make booted boxes, with portd in /opt by default; all are removed at the end."""
    boxes: list[Box] = []

    def make(**options: Any) -> Box:
        box = Box(tmp_path_factory.mktemp("box"), **{"venv": venv, "seed": SEED, **options})
        boxes.append(box)
        box.boot()
        return box

    yield make
    for box in boxes:
        box.close()


@pytest.fixture(scope="module")
def installed(make_box) -> Box:
    """Return a box in which `portd install` has been run."""
    box = make_box()
    box.run("portd install")
    return box


@pytest.fixture
def box(installed) -> Box:
    """Return the module's box with portd running, however the test before left it."""
    installed.run("systemctl reset-failed portd.service; systemctl start portd.socket portd.service")
    return installed


def pytest_terminal_summary(terminalreporter) -> None:
    """Say aloud what was left out: a green run without a box says nothing about systemd."""
    if reason := missing():
        terminalreporter.write_line(f"portd was NOT tested under systemd: {reason}", red=True, bold=True)
    elif shutil.which("mmdebstrap") is None:
        terminalreporter.write_line("portd was NOT tested on Debian 13: there is no mmdebstrap", red=True, bold=True)
