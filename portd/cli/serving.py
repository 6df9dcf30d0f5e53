"""The command that is the daemon, which is loaded only when it is to run: it brings an HTTP server along."""

from __future__ import annotations

from portd.cli.options import Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def serve(values: dict[str, Any]) -> int:
    """Run the daemon until it is told to stop."""
    from portd import daemon

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
