"""All commands by name, and the room that each lives in: a room is loaded only when one of its commands is wanted."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portd.cli.options import Command

GROUPS = {
    "lease ports": {"run": "running", "lease": "leasing", "renew": "leasing", "release": "leasing", "drain": "leasing"},
    "see who has what": {"ls": "listing", "who": "listing", "history": "listing"},
    "find services": {"services": "finding", "resolve": "finding", "browse": "following", "watch": "following"},
    "the daemon": {
        "serve": "serving",
        "status": "condition",
        "doctor": "doctor",
        "demo": "demo",
        "install": "installing",
        "uninstall": "installing",
    },
}


def find(name: str) -> Command | None:
    """Load a command; None when there is none of that name."""
    for rooms in GROUPS.values():
        if name in rooms:
            module = __import__(f"portd.cli.{rooms[name]}", fromlist=["COMMANDS"])
            commands: tuple[Command, ...] = module.COMMANDS
            return next(command for command in commands if command.name == name)
    return None


def names() -> list[str]:
    """List all names."""
    return [name for rooms in GROUPS.values() for name in rooms]


def overview() -> str:
    """Write what `portd --help` says."""
    lines = ["usage: portd COMMAND …", "", "portd leases ports to the processes of this host, and tells who has which."]
    lines.append("")
    for title, rooms in GROUPS.items():
        lines.append(f"{title}:")
        for name in rooms:
            command = find(name)
            assert command is not None
            lines.append(f"  {name:10} {command.summary}")
        lines.append("")
    lines += [
        "'portd COMMAND --help' says more. A first look:  portd demo",
        "A service of your own:                           portd run orders -- python3 -m http.server {port}",
        "",
        "The daemon is found by PORTD_URL, else the first that answers of the user's socket, the system's socket and",
        "http://127.0.0.1:7783. Exit status: 0 done, 1 a clear no, 2 wrong usage, 3 no daemon answers.",
    ]
    return "\n".join(lines)
