"""What the tests put into boxes: environments with the tree in them, packages of it, and another Debian to boot."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TREE = Path(__file__).parents[2]
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
PLATFORMS = ("manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_36")
"""What runs on Debian 13 (glibc 2.41), of what there is."""


def build_venv(place: Path) -> None:
    """Install the tree with the system's Python, as it will stand at /opt/portd."""
    subprocess.run(["/usr/bin/python3", "-m", "venv", place], check=True)
    subprocess.run(
        [place / "bin/python3", *PIP, "install", "--no-warn-script-location", TREE], check=True, capture_output=True
    )
    program = place / "bin/portd"
    program.write_text(program.read_text().replace(str(place), "/opt/portd"))


def build_venv_for(python: str, place: Path, pip: Path) -> None:
    """Lay out the same for a Python that is not here (such as "3.13"), from wheels alone, with the pip of another."""
    packages = place / f"lib/python{python}/site-packages"
    (place / "bin").mkdir(parents=True)
    (place / "bin/python3").symlink_to("/usr/bin/python3")
    wheels = place.with_name("wheels")
    subprocess.run([pip, *PIP, "wheel", "--no-deps", "--wheel-dir", wheels, TREE], check=True, capture_output=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_{os.uname().machine}")]
    subprocess.run(
        [
            pip,
            *PIP,
            "install",
            "--target",
            packages,
            "--no-compile",
            "--only-binary=:all:",
            "--python-version",
            python,
            "--implementation",
            "cp",
            *platforms,
            *wheels.glob("portd-*.whl"),
        ],
        check=True,
        capture_output=True,
    )
    (place / "pyvenv.cfg").write_text("home = /usr/bin\n")
    program = place / "bin/portd"
    program.write_text((packages / "bin/portd").read_text().replace(str(pip), "/opt/portd/bin/python3"))
    program.chmod(0o755)


def build_package(place: Path, version: str, venv: Path, **environ: str) -> Path:
    """Build the Debian package from an environment; returns where it is."""
    quick = {**os.environ, "DPKG_DEB_COMPRESSOR_TYPE": "none", **environ}
    done = subprocess.run(
        [TREE / "systemd/debian/build", "--version", version, "--venv", venv, place],
        check=True,
        capture_output=True,
        text=True,
        env=quick,
    )
    return Path(done.stdout.strip())


def bootstrap(release: str, packages: list[str], place: Path) -> None:
    """Unpack a Debian of its own: about 20 s and 210 MB."""
    done = subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}", release, place],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
