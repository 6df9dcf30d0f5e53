"""The command that is the daemon, which is loaded only when it is to run: it brings an HTTP server along."""

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
                "the configuration; /etc/portd/portd.toml unless given, with --user ~/.config/portd/portd.toml",
            ),
            Option("--user", "", "run as a user's daemon: its own sockets and state, in the user's own directories"),
            Option("--check-config", "", "say what is wrong in the configuration, and where; do nothing else"),
        ),
        """
SIGTERM and Ctrl-C stop it; leases stay, and are there again after the next start.
SIGHUP reads the configuration again, and says what can't change while it runs.""",
    ),
)
