"""`python -m tests.bench [NAME…] [--json]`: measure portd beside its yardsticks, on this machine, in this hour.

Names are those below, or of single rooms; without one, everything is measured. Servers run on one core and load on
another, everything in temporary directories; some of it needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import signal
import sys
from typing import Any

ROOMS: dict[str, tuple[str, ...]] = {
    "grants": ("grants", "memory", "exits", "crashes"),
    "ports": ("ports_who", "handing", "race"),
    "lookup": ("lookup", "fanout", "dns", "checks"),
    "lan": ("lan",),
    "clients": ("starts", "cli"),
    "users": ("abuse",),
}
"""What is measured under which name: rooms of this directory, each with `async def measure() -> list[dict]`."""


def main() -> int:
    """Measure, and print; returns the exit status."""
    rooms = dict.fromkeys(room for some in ROOMS.values() for room in some)
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*ROOMS, *rooms]))
    parser.add_argument("--json", action="store_true", help="one JSON object, by room")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long `soak` runs; only by its name")
    options = parser.parse_args()
    rooms["soak"] = None
    if unknown := [name for name in options.names if name not in ROOMS and name not in rooms]:
        parser.error(f"there is no measurement {', '.join(unknown)}")
    wanted = dict.fromkeys(room for name in options.names or ROOMS for room in ROOMS.get(name, (name,)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    results = {}
    for room in wanted:
        module = importlib.import_module(f"tests.bench.{room}")
        try:
            results[room] = asyncio.run(module.measure(options.minutes) if room == "soak" else module.measure())
        except (OSError, RuntimeError, AssertionError) as error:  # one that can't be had must not hide the others
            results[room] = [{"failed": f"{type(error).__name__}: {error}"}]
        if not options.json:
            show((module.__doc__ or room).partition("\n\n")[0].replace("\n", " "), results[room])
    if options.json:
        print(json.dumps(results, indent=1))
    return int(any("failed" in row for rows in results.values() for row in rows))


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table: with lines on a terminal, plain columns in a pipe."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_text(row.get(name)) for name in columns] for row in rows]
    numeric = {name for name in columns if any(isinstance(row.get(name), int | float) for row in rows)}
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for name in columns:
            table.add_column(name.replace("_", " "), justify="right" if name in numeric else "left")
        for line in cells:
            table.add_row(*line)
        Console().print(table)
        return
    widths = [max(len(line[at]) for line in [columns, *cells]) for at in range(len(columns))]
    print(f"# {title}")
    for line in [columns, *cells]:
        print(
            "  ".join(
                cell.rjust(width) if name in numeric else cell.ljust(width)
                for name, cell, width in zip(columns, line, widths, strict=True)
            ).rstrip()
        )
    print(flush=True)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
