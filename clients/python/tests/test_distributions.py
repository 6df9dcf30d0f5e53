"""portd and portd-client: each is built, installed and removed without the other."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CLIENT = ROOT / "clients/python"
BUILD_TIMEOUT_S = 180.0
"""Seconds for one build or installation, far more than any takes."""


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a command and return its output."""
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build both distributions as a release does, each wheel from its source archive; return the wheels."""
    directory = tmp_path_factory.mktemp("dist")
    for source in (ROOT, CLIENT):
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, source)
    (daemon,), (client,) = directory.glob("portd-[0-9]*.whl"), directory.glob("portd_client-*.whl")
    return daemon, client


def test_the_two_wheels_share_no_file(wheels: tuple[Path, Path]) -> None:
    daemon, client = (
        {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} for wheel in wheels
    )
    assert "portd/_client/client.py" in daemon
    assert "portd_client/py.typed" in client
    assert daemon & client == set()


def test_uninstalling_the_client_leaves_the_command_line_whole(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    venv.create(tmp_path, system_site_packages=False, with_pip=True)
    python = tmp_path / "bin/python"
    (site,) = (tmp_path / "lib").glob("python*/site-packages")
    (site / "test-dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--force-reinstall", *wheels)
    run(python, "-m", "pip", "uninstall", "-q", "-y", "portd-client")
    assert "portd" in run(python, "-m", "portd", "--version", cwd=tmp_path)
    answer = run(python, "-c", "import portd.cli.listing as m; print(m.calls.__name__, m.calls.__file__)", cwd=tmp_path)
    assert answer.startswith(f"portd._client.calls {tmp_path}")


def test_the_clients_archive_carries_readme_license_and_types(wheels: tuple[Path, Path]) -> None:
    (archive,) = wheels[1].parent.glob("portd_client-*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"README.md", "LICENSE", "portd_client/py.typed", "portd_client/client.py"} <= names
