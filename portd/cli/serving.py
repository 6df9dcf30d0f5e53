"""`portd serve`: the daemon, imported only when it runs."""

from __future__ import annotations

import os
import sys

from portd.cli.options import Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def serve(values: dict[str, Any]) -> int:
    """Run the daemon until SIGTERM or SIGINT."""
    try:
        from portd import daemon
    except ImportError as error:
        missing = f"the Python module {error.name!r} is missing or broken" if error.name else "an import failed"
        print(f"portd: {missing} ({error}): install portd again (pip install portd)", file=sys.stderr)
        return os.EX_UNAVAILABLE
    status = daemon.main(config_path=values["config"], user=values["user"], check_config=values["check_config"])
    if values["check_config"] and status == os.EX_OK:
        _warn(values["config"], is_user=values["user"])
    return status


def _warn(config: str | None, *, is_user: bool) -> None:
    """Print what is right in the file and yet wrong on this host."""
    from portd.cli import doctor
    from portd.config import load, system_paths, user_paths

    paths = user_paths() if is_user else system_paths()
    for found in doctor.examine_settings(load(config, paths), config or paths.config):
        print(f"portd: warning: {found.what}: {found.why} {found.fix}", file=sys.stderr)


COMMANDS = (
    Command(
        "serve",
        [],
        "Run the daemon",
        serve,
        (
            Option(
                "--config",
                "FILE",
                "the configuration (/etc/portd/portd.toml; with --user ~/.config/portd/portd.toml)",
            ),
            Option("--user", "", "run a daemon of your own, with sockets and state in your directories"),
            Option("--check-config", "", "report mistakes in the configuration with their lines, and exit"),
        ),
        """
SIGTERM and Ctrl-C stop it; leases survive. SIGHUP re-reads the configuration,
and the log names the settings that need a restart.""",
    ),
)
