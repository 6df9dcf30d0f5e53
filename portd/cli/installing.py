"""Installs portd as a systemd unit with its manual pages, and removes it: install, uninstall.

Both are lists of steps; `--dry-run` prints them. The units are the files of `systemd/`, with the path of the installed
program in place of PROGRAM_IN_UNITS. This module must not know the daemon.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from portd._client.errors import PortdError
from portd.cli.options import Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

PROGRAM_IN_UNITS = "/opt/portd/bin/portd"
"""The program's path in the units of the source tree; replaced by that of the portd that installs them."""
PYTHON_IN_UNITS = "/opt/portd/bin/python3"
"""The path of its Python there, which runs the inspector; replaced by the Python that runs the installing portd."""
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""Directories hidden from a unit with ProtectHome= and PrivateTmp= (systemd.exec(5))."""
UNITS = ("portd.socket", "portd.service")
INSPECTOR_UNITS = ("portd-inspector.socket", "portd-inspector.service")
"""The system daemon's inspector; its socket is enabled, and starts its service."""
ACCOUNTS = ("portd", "portd-inspector")
"""Users of the units: the first is created, the second is systemd's while the inspector runs (DynamicUser=)."""
PACKAGED = Path("/usr/lib/systemd/system/portd.service")
"""A package's unit. One in /etc would override it, after upgrades too (systemd.unit(5))."""
RESOLVED = "systemd-resolved.service"
RESOLVED_DROP_IN = Path("/etc/systemd/resolved.conf.d/portd.conf")
SYSTEM_MANUAL = Path("/usr/local/share/man")
MANUAL_PAGES = ("portd.1", "portd.toml.5")
FIRST_PERSON = 1000
"""The first uid of a person; system accounts have lower ones (login.defs(5))."""
DYNAMIC_UIDS = range(61184, 65520)
"""Uids of units with DynamicUser= (systemd's uids and gids, UIDS-GIDS.md)."""
STATE = ("/var/lib/portd", "/etc/portd")


class Step:
    """One step: its text, and the function that does it; None where nothing needs to be done."""

    __slots__ = ("do", "text")

    def __init__(self, text: str, do: Callable[[], object] | None) -> None:
        self.text = text
        self.do = do


def install(values: dict[str, Any]) -> int:
    """Install units, user and directories for the portd that runs this, and start it. May be repeated."""
    return _carry_out(_install_user() if values["user"] else _install_system(values), values)


def uninstall(values: dict[str, Any]) -> int:
    """Stop portd and remove what `install` wrote; the state stays unless `--purge`."""
    return _carry_out(_uninstall_user(values) if values["user"] else _uninstall_system(values), values)


# --- the steps ---


def _install_system(values: dict[str, Any]) -> Iterator[Step]:
    _check_package()
    program = _program()
    for seen in {program, Path(sys.executable).resolve(), Path(sys.base_prefix), Path(__file__)}:
        if hidden := next((top for top in HIDDEN if seen.is_relative_to(top)), None):
            raise PortdError(
                f"{seen} lies under {hidden}, which is hidden from the hardened unit: install portd elsewhere, "
                "with 'python3 -m venv /opt/portd && /opt/portd/bin/pip install …', and run "
                "/opt/portd/bin/portd install"
            )
    _check_owners(program)
    _check_account()
    if values["resolved"]:
        _check_resolver()
    files = _system_files(resolved=values["resolved"])
    is_new = False
    for name, path in files.items():
        step = _write(name, path, program)
        is_new |= step.do is not None
        yield step
    yield from _write_manual(SYSTEM_MANUAL)
    yield _run("systemd-sysusers", "/etc/sysusers.d/portd.conf")
    yield from _start(["systemctl"], [INSPECTOR_UNITS[0], *UNITS], is_new=is_new)
    if values["resolved"]:
        yield _run("systemctl", "try-restart", RESOLVED)


def _install_user() -> Iterator[Step]:
    program = _program()
    is_new = False
    for name, path in _user_files().items():
        step = _write(name, path, program)
        is_new |= step.do is not None
        yield step
    yield from _write_manual(_user_manual())
    yield from _start(["systemctl", "--user"], UNITS, is_new=is_new)


def _start(systemctl: list[str], units: Sequence[str], *, is_new: bool) -> Iterator[Step]:
    *sockets, service = units
    if is_new:
        yield _run(*systemctl, "daemon-reload")
    yield _run(*systemctl, "enable", *units)
    if is_new and INSPECTOR_UNITS[0] in units:
        yield _run(*systemctl, "try-restart", INSPECTOR_UNITS[1])
    yield _run(*systemctl, "start", *sockets)
    # A running unit is restarted for its new text; sockets and holds survive that.
    yield _run(*systemctl, "restart" if is_new else "start", service)


def _uninstall_system(values: dict[str, Any]) -> Iterator[Step]:
    _check_package()
    yield from _stop(["systemctl"], Path("/etc/systemd/system"), (*UNITS, *INSPECTOR_UNITS))
    was_resolved = RESOLVED_DROP_IN.exists()
    for path in (*_system_files(resolved=True).values(), *_manual_paths(SYSTEM_MANUAL)):
        yield _remove(path)
    yield _run("systemctl", "daemon-reload")
    if was_resolved:
        yield _run("systemctl", "try-restart", RESOLVED)
    yield _remove(Path("/run/portd"))
    yield from (_state_step(Path(path), purge=values["purge"]) for path in STATE)
    if values["purge"]:
        yield Step("delete the user and group portd", _delete_account)


def _uninstall_user(values: dict[str, Any]) -> Iterator[Step]:
    from portd.config import user_paths

    systemctl = ["systemctl", "--user"]
    paths = user_paths()
    yield from _stop(systemctl, _user_units(), UNITS)
    for path in (*_user_files().values(), *_manual_paths(_user_manual())):
        yield _remove(path)
    yield _run(*systemctl, "daemon-reload")
    yield _remove(Path(paths.socket).parent)
    yield from (_state_step(Path(path).parent, purge=values["purge"]) for path in (paths.store, paths.config))


def _stop(systemctl: list[str], directory: Path, units: Sequence[str]) -> Iterator[Step]:
    there = [unit for unit in units if (directory / unit).exists()]
    if there:
        yield _run(*systemctl, "disable", "--now", *there)


def _state_step(path: Path, *, purge: bool) -> Step:
    if purge or not path.exists():
        return _remove(path)
    return Step(f"{path} stays; --purge deletes it", None)


def _system_files(*, resolved: bool) -> dict[str, Path]:
    units = Path("/etc/systemd/system")
    files = {name: units / name for name in (*UNITS, *INSPECTOR_UNITS, "portd-run@.service")}
    files["portd.sysusers"] = Path("/etc/sysusers.d/portd.conf")
    if resolved:
        files["portd.resolved"] = RESOLVED_DROP_IN
    return files


def _user_files() -> dict[str, Path]:
    return {f"user/{unit}": _user_units() / unit for unit in UNITS}


def _manual_paths(directory: Path) -> list[Path]:
    return [directory / f"man{name[-1]}" / name for name in MANUAL_PAGES]


def _user_manual() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or _home() / ".local/share") / "man"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise PortdError("your account has no home directory: set HOME") from None


def _user_units() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or _home() / ".config") / "systemd/user"


# --- steps ---


def _write(name: str, path: Path, program: Path) -> Step:
    text = (_tree() / name).read_text()
    return _write_text(text.replace(PYTHON_IN_UNITS, sys.executable).replace(PROGRAM_IN_UNITS, str(program)), path)


def _write_manual(directory: Path) -> Iterator[Step]:
    from portd.cli import manual

    for path, text in zip(_manual_paths(directory), manual.pages().values(), strict=True):
        yield _write_text(text, path)


def _write_text(text: str, path: Path) -> Step:
    if path.is_file() and path.read_text() == text:
        return Step(f"{path} is up to date", None)

    def write() -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(text)
        fresh.chmod(0o644)
        fresh.replace(path)  # atomically: systemd may read it at any moment

    return Step(f"write {path}", write)


def _remove(path: Path) -> Step:
    if not path.exists():
        return Step(f"{path} does not exist", None)
    return Step(f"remove {path}", lambda: shutil.rmtree(path) if path.is_dir() else path.unlink())


def _run(*words: str) -> Step:
    def run() -> None:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            raise PortdError(f"'{' '.join(words)}' failed with status {done.returncode}: {said}")

    return Step(f"run {' '.join(words)}", run)


def _delete_account() -> None:
    """Delete the user and its group, if they exist; userdel(8) deletes the user's own group too."""
    if (uid := _account("portd")) is not None and uid >= FIRST_PERSON:
        return  # not the daemon's
    for words in (["userdel", "portd"], ["groupdel", "portd"]):
        subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def _carry_out(steps: Iterator[Step], values: dict[str, Any]) -> int:
    """Print and do the steps, or only print them; raises PortdError before the first if this host can't do them."""
    if not values["dry_run"]:
        _check_host(user=values["user"])
    for step in steps:
        if step.do is None:
            print(step.text)
        elif values["dry_run"]:
            print(f"would {step.text}")
        else:
            print(step.text, flush=True)
            try:
                step.do()
            except OSError as error:
                raise PortdError(f"could not {step.text}: {error}") from error
    return 0


def _check_host(*, user: bool) -> None:
    if not Path("/run/systemd/system").is_dir():  # sd_booted(3)
        raise PortdError("this host does not run systemd: start 'portd serve' from its own init system")
    if not user and os.geteuid() != 0:
        raise PortdError("only root can install for the whole host: use sudo, or --user for your own account")
    if user and not os.environ.get("XDG_RUNTIME_DIR"):
        raise PortdError(
            "XDG_RUNTIME_DIR is unset, so your service manager can't be reached: log in as this user "
            "(machinectl shell USER@, or ssh)"
        )


def _check_package() -> None:
    """Raise PortdError if a package has installed portd for the whole host."""
    if PACKAGED.exists():
        raise PortdError(
            f"this host has portd from a package ({PACKAGED}): use that, or remove it first "
            "(apt remove portd; leases and configuration stay)"
        )


def _check_owners(program: Path) -> None:
    """Raise PortdError if anybody but root can change what the unit would run."""
    top = Path(sys.prefix) if sys.prefix != sys.base_prefix else Path(__file__).parents[1]
    above = {parent for path in (program, Path(sys.executable).resolve(), top) for parent in path.parents}
    inside = (Path(directory) / name for directory, names, files in os.walk(top) for name in (*names, *files))
    for path in (*sorted(above), top, *inside):
        status = path.lstat()
        if status.st_uid != 0 or (status.st_mode & 0o022 and not path.is_symlink()):
            raise PortdError(
                f"{path} can be changed by another user than root, and the unit would run it: install portd as root, "
                "with 'python3 -m venv /opt/portd && /opt/portd/bin/pip install …'; then /opt/portd/bin/portd install"
            )


def _check_account() -> None:
    """Raise PortdError if the name of a unit's user belongs to a person."""
    for name in ACCOUNTS:
        if (uid := _account(name)) is not None and uid >= FIRST_PERSON and not _is_dynamic(uid):
            raise PortdError(f"the user '{name}' is a person's account (uid {uid}), which portd can't use: rename it")


def _account(name: str) -> int | None:
    """Return the uid of a user; None where there is none."""
    import pwd

    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def _is_dynamic(uid: int) -> bool:
    """Return whether systemd gives this uid to units while they run (DynamicUser= in systemd.exec(5))."""
    return uid in DYNAMIC_UIDS


def _check_resolver() -> None:
    """Raise PortdError if the drop-in would break lookups of portd's zone or of others (resolved.conf(5)).

    Global servers are alternatives to each other: systemd-resolved would send every query to one of them.
    """
    resolv_conf = Path("/etc/resolv.conf")
    if not resolv_conf.resolve().is_relative_to("/run/systemd/resolve"):
        raise PortdError(
            f"{resolv_conf} is not systemd-resolved's, so lookups bypass it; "
            "see 'Modes of operation' in systemd-resolved(8)"
        )
    settings = Path("/etc/systemd/resolved.conf")
    for path in (settings, *sorted(RESOLVED_DROP_IN.parent.glob("*.conf"))):
        if path != RESOLVED_DROP_IN and path.exists() and re.search(r"(?m)^\s*DNS\s*=\s*\S", path.read_text()):
            raise PortdError(
                f"{path} sets global DNS servers, which --resolved can't be combined with: "
                "set them on a network link instead"
            )


def _program() -> Path:
    """Return the portd beside the Python that runs this, which is the one that the unit starts."""
    program = Path(sys.executable).parent / "portd"  # unresolved: a venv's python is a link to the system's
    if not os.access(program, os.X_OK):
        raise PortdError(
            f"there is no {program} beside the Python that runs this: install portd with pip first, into "
            "a virtual environment"
        )
    return program


def _tree() -> Path:
    """Return the directory of the units: in the installed package, else at the top of the source tree."""
    packaged = Path(__file__).parents[1] / "systemd"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "systemd"


_DRY_RUN = Option("--dry-run", "", "print what would be done, and do nothing")
_USER = Option("--user", "", "for your own account, without root")

COMMANDS = (
    Command(
        "install",
        [],
        "Install as a systemd unit, and start it",
        install,
        (
            _DRY_RUN,
            _USER,
            Option("--resolved", "", "make systemd-resolved query portd for names below portd.internal"),
        ),
        """
Writes units and manual pages for the portd that runs this, creates the user
'portd', enables and starts the units. May be repeated after an upgrade.""",
    ),
    Command(
        "uninstall",
        [],
        "Stop portd, and remove the systemd unit",
        uninstall,
        (
            _DRY_RUN,
            _USER,
            Option("--purge", "", "delete leases, history, configuration and the user 'portd' as well"),
        ),
        """
Services on leased ports keep running. State and configuration stay unless
--purge is given.""",
    ),
)
