"""How results look: tables on a terminal, tab-separated lines in a pipe, JSON when asked."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

COLORS = {
    "passing": "green",
    "bound": "green",
    "warning": "yellow",
    "critical": "red",
    "conflict": "red",
    "held": "cyan",
    "cooling": "yellow",
    "declined": "yellow",
    "draining": "yellow",
}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows: with headers and colours on a terminal, as tab-separated lines for a program."""
    if not sys.stdout.isatty():
        sys.stdout.write("".join("\t".join(clean(cell) for cell in row) + "\n" for row in rows))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        drawn.add_column(header, no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(clean(cell), style=COLORS.get(cell, "")) for cell in row))
    console = Console()
    whole = console.measure(drawn, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, whole)  # a narrow terminal wraps lines: better than cells cut, ids above all
    console.print(drawn)


def aligned(headers: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Print rows with headers in aligned columns, wherever they go."""
    lines = [list(headers), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        print(indent + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one a line; an empty name goes on with the value above."""
    width = max((len(name) for name, _ in pairs), default=0)
    sys.stdout.write("".join(f"{name:{width}}  {clean(value)}".rstrip() + "\n" for name, value in pairs))


def json(document: Any) -> None:
    """Print a document as JSON: indented on a terminal, on one line in a pipe."""
    import json as codec

    print(codec.dumps(document, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


def clean(text: str) -> str:
    """Take out what could move a terminal's cursor: other people's command lines and LAN names are printed here."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def age(moment: str | None) -> str:
    """Tell how long ago a time (RFC 3339) was: 12s, 5m, 3h, 2d; "-" for None."""
    if moment is None:
        return "-"
    from datetime import UTC, datetime

    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()))
    for size, letter in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{letter}"
    return f"{seconds}s"


def local(moment: str | None) -> str:
    """Write a time (RFC 3339) as the clock on the wall says it; "-" for None."""
    if moment is None:
        return "-"
    from datetime import datetime

    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def owner(process: Mapping[str, Any] | None) -> str:
    """Name a process in a few letters: python3[4711] alice."""
    if process is None:
        return "-"
    program = (process.get("exe") or "").rpartition("/")[2] or "?"
    pid = process.get("pid")
    user = process.get("user") or (f"uid {process['uid']}" if process.get("uid") is not None else "")
    return f"{program}[{pid}] {user}".rstrip() if pid is not None else user or "-"


def place(lease: Mapping[str, Any]) -> str:
    """Name a lease's port: the bare number, with what is unusual about it: 127.77.0.2:5432, 2000/udp."""
    host = lease["address"]
    shown = str(lease["port"]) if host == "127.0.0.1" else host_port(host, lease["port"])
    return shown if lease["protocol"] == "tcp" else f"{shown}/{lease['protocol']}"


def host_port(host: str, port: int) -> str:
    """Write host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def instance(lease: Mapping[str, Any]) -> str:
    """Name an endpoint: the instance, and the endpoint where it is not `main`."""
    return str(lease["instance"]) + ("" if lease["endpoint"] == "main" else f":{lease['endpoint']}")


def health(lease: Mapping[str, Any]) -> str:
    """Tell how a lease is: draining goes first; "-" where it has no check."""
    if lease["drain"]:
        return "draining"
    return str(lease["health"]) if lease.get("check") else "-"
