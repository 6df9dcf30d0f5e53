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
    return daemon.main(config_path=values["config"], user=values["user"], check_config=values["check_config"])


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
