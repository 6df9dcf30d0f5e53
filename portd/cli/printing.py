"""The output formats: tables on a terminal, tab-separated lines in a pipe, JSON when requested.

Everything that others chose (command lines, names on the LAN, health notes) passes through `clean` or `escaped`: no
control or bidirectional character reaches a terminal.
"""

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
LOOPBACK = ("127.", "::1", "localhost", "::ffff:127.")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], drop: Sequence[str] = ()) -> None:
    """Print rows: with headers and colours on a terminal, as tab-separated lines in a pipe.

    On a terminal too narrow for all columns those of `drop` are left out, in that order, until the rest fits.
    """
    if not sys.stdout.isatty():
        sys.stdout.write("".join("\t".join(clean(cell) for cell in row) + "\n" for row in rows))
        return
    from rich.console import Console

    console = Console()
    shown = list(range(len(headers)))
    for name in ("", *drop):
        shown = [column for column in shown if headers[column] != name]
        drawn = _drawn([headers[column] for column in shown], [[row[column] for column in shown] for row in rows])
        whole = console.measure(drawn, options=console.options.update(max_width=1000)).maximum
        if whole <= console.width:
            break
    console.width = max(console.width, whole)  # what still does not fit wraps: better than cells cut, ids above all
    console.print(drawn)


def _drawn(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        drawn.add_column(header, no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(clean(cell), style=COLORS.get(cell, "")) for cell in row))
    return drawn


def aligned(headers: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Print rows with headers in aligned columns, wherever stdout goes."""
    lines = [list(headers), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        print(indent + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one a line; an empty name continues the value above."""
    width = max((len(name) for name, _ in pairs), default=0)
    sys.stdout.write("".join(f"{name:{width}}  {clean(value)}".rstrip() + "\n" for name, value in pairs))


def json(document: Any) -> None:
    """Print a document as JSON: indented on a terminal, on one line in a pipe."""
    import json as codec

    print(escaped(codec.dumps(document, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False)))


def error(text: str, *, code: str, as_json: bool) -> None:
    """Print an error on stderr: one line, or the shortest problem document (RFC 9457)."""
    if as_json:
        from portd._client import documents

        print(escaped(documents.encode({"code": code, "detail": text}).decode()), file=sys.stderr)
    else:
        print("portd: " + clean(" ".join(text.split())), file=sys.stderr)


def clean(text: str) -> str:
    """Replace what could move a terminal's cursor or reorder its text: other people's words are printed here."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def escaped(text: str) -> str:
    r"""Escape in JSON text what `clean` replaces, and what stdout's encoding lacks, as \uXXXX: its value stays."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    is_unicode = encoding == "utf8"
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char == "\n" or (char.isprintable() and (is_unicode or char.isascii())) else _json_escape(char)
        for char in text
    )


def _json_escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def age(moment: str | None) -> str:
    """Write how long ago a time (RFC 3339) was: 12s, 5m, 3h, 2d; "-" for None."""
    if moment is None:
        return "-"
    from datetime import UTC, datetime

    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()))
    for size, letter in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{letter}"
    return f"{seconds}s"


def local(moment: str | None) -> str:
    """Write a time (RFC 3339) in the local time zone; "-" for None."""
    if moment is None:
        return "-"
    from datetime import datetime

    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def process(view: Mapping[str, Any] | None) -> str:
    """Name a process without its user: node[4711]; "-" for none, "a hidden process" where the kernel hides it."""
    if view is None:
        return "-"
    program = (view.get("exe") or "").rpartition("/")[2] or "?"
    return f"{program}[{view['pid']}]" if view.get("pid") is not None else "a hidden process"


def owner(view: Mapping[str, Any] | None) -> str:
    """Name a process with its user: node[4711] alice; the user alone where the process is not known."""
    if view is None:
        return "-"
    user = view.get("user") or (f"uid {view['uid']}" if view.get("uid") is not None else "")
    return f"{process(view)} {user}".rstrip() if view.get("pid") is not None else user or "-"


def binding(lease: Mapping[str, Any]) -> str:
    """Write a lease's port: the number alone, with what is unusual about it: 127.77.0.2:5432, 2000/udp."""
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
    """Write a lease's health: "draining" outranks it; "-" without a check."""
    if lease["drain"]:
        return "draining"
    return str(lease["health"]) if lease.get("check") else "-"


def wider(lease: Mapping[str, Any]) -> str:
    """Return where a loopback lease listens beyond loopback; "" where it does not."""
    if not lease["address"].startswith(LOOPBACK):
        return ""
    found = [one for one in lease.get("listening") or () if not one.startswith(LOOPBACK)]
    return ", ".join(host_port(one, lease["port"]) for one in found)


def elsewhere(lease: Mapping[str, Any]) -> str:
    """Return the ports that a lease's owner listens on instead of the leased one; "" where there are none."""
    return ", ".join(host_port(one["address"], one["port"]) for one in lease.get("elsewhere") or ())


def note(lease: Mapping[str, Any]) -> str:
    """Return what is remarkable about a lease in a few words: "-" where nothing is."""
    said = []
    if other := elsewhere(lease):
        said.append(f"listens on {other} instead")
    if wide := wider(lease):
        said.append(f"listens on {wide}: open to the LAN")
    if lease.get("check") and lease["health"] not in ("passing", "unknown") and lease.get("health_note"):
        said.append(f"{lease['health_note']} ({age(lease.get('health_since'))})")
    return "; ".join(said) or "-"
