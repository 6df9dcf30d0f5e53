"""All commands by name, and the module of each, which is imported only when one of its commands runs."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from portd.cli.options import Command

GROUPS = {
    "lease ports": {
        "run": "running",
        "lease": "leasing",
        "adopt": "leasing",
        "renew": "leasing",
        "release": "leasing",
        "drain": "leasing",
        "transfer": "leasing",
        "stop": "stopping",
    },
    "see who has what": {"ls": "listing", "who": "listing", "history": "listing", "checks": "listing"},
    "find services": {
        "services": "lookup",
        "hosts": "cluster",
        "cluster": "cluster",
        "resolve": "lookup",
        "wait": "lookup",
        "url": "urls",
        "browse": "following",
        "watch": "following",
    },
    "the daemon": {
        "serve": "serving",
        "status": "condition",
        "doctor": "doctor",
        "gateway": "gateway",
        "open": "opening",
        "demo": "demo",
        "install": "installing",
        "uninstall": "installing",
        "completion": "completion",
    },
}
OTHER_NAMES = {"list": "ls", "ps": "ls", "kill": "release", "free": "release", "start": "run", "check": "checks"}
"""Names of other tools' commands that people try."""


def find(name: str) -> Command | None:
    """Import a command; None when there is none of that name."""
    for modules in GROUPS.values():
        if name in modules:
            module = __import__(f"portd.cli.{modules[name]}", fromlist=["COMMANDS"])
            commands: tuple[Command, ...] = module.COMMANDS
            return next(command for command in commands if command.name == name)
    return None


def every() -> Iterator[Command]:
    """Import and yield all commands, in the order of the overview."""
    for modules in GROUPS.values():
        for name in modules:
            command = find(name)
            assert command is not None
            yield command


def suggestion(name: str) -> str:
    """Return what to append to "there is no command …"."""
    from difflib import get_close_matches

    names = [known for modules in GROUPS.values() for known in modules]
    found = [OTHER_NAMES[name]] if name in OTHER_NAMES else get_close_matches(name, names, 1)
    return f"; did you mean {found[0]!r}?" if found else "; 'portd --help' lists them"


def overview() -> str:
    """Write the text of `portd --help`."""
    lines = [
        "usage: portd COMMAND …",
        "",
        "portd leases ports to the processes of this host, and knows who has which.",
        "",
    ]
    summaries = {command.name: command.summary for command in every()}
    for title, modules in GROUPS.items():
        lines.append(f"{title}:")
        lines += [f"  {name:10} {summaries[name]}" for name in modules]
        lines.append("")
    lines += [
        "'portd help COMMAND' shows a command's options. See everything once: portd demo",
        "Run a service on a leased port:  portd run orders -- python3 -m http.server {port}",
        "",
        "Commands use the daemon that PORTD_URL names, else the first that answers of the",
        "user's socket, the system's socket and http://127.0.0.1:7783.",
        "Exit status: 0 done, 1 a clear no, 2 wrong usage, 3 no daemon answers.",
    ]
    return "\n".join(lines)
