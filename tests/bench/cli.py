"""What the command line and the Python client cost: processes, from start to end, one after the other.

`portd lease` is compared with curl making the same request of the same daemon (the promise: within three times), and a
program that takes its port by `portd_client.listen` with one that binds port 0.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.cli.bed import Daemon

RUNS = 30
LAUNCHER = """#!{python}
import sys
from portd.__main__ import main
if __name__ == "__main__":
    sys.exit(main())
"""
"""What pip 25 writes for a console script; older ones import `re` first, 5 ms more."""
BARE = "import socket; socket.create_server(('127.0.0.1', 0))"
LEASED = "import portd_client; portd_client.listen('bench-client')"


async def measure(runs: int = RUNS) -> list[dict[str, Any]]:
    """Return one row for each way: `what median_ms fastest_ms times_curl`, the ways of one round in turn."""
    return await asyncio.to_thread(_measure, runs)


def _measure(runs: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        daemon = Daemon(Path(directory), pool="25000-29999")
        daemon.start()
        try:
            took = _rounds(_ways(daemon, Path(directory)), daemon.environ, runs)
        finally:
            daemon.stop()
    curl_ms = statistics.median(took["curl, the same request"])
    return [
        {
            "what": what,
            "median_ms": round(statistics.median(times), 1),
            "fastest_ms": round(min(times), 1),
            "times_curl": round(statistics.median(times) / curl_ms, 2),
        }
        for what, times in took.items()
    ]


def _ways(daemon: Daemon, directory: Path) -> dict[str, list[str]]:
    launcher = directory / "portd"
    launcher.write_text(LAUNCHER.format(python=sys.executable))
    launcher.chmod(0o755)
    body = json.dumps({"service": "bench", "pid": os.getpid()})
    lease = ["lease", "bench", "--pid", str(os.getpid())]
    return {
        "curl, the same request": [
            "curl",
            "-s",
            "-o",
            "/dev/null",
            "--unix-socket",
            f"{daemon.directory}/portd.sock",
            "-H",
            "Content-Type: application/json",
            "-d",
            body,
            "http://localhost/v1/leases",
        ],
        "portd lease": [str(launcher), *lease],
        "portd lease --json": [str(launcher), *lease, "--json"],
        "python -m portd lease": [sys.executable, "-m", "portd", *lease],
        "portd resolve": [str(launcher), "resolve", "bench", "--one"],
        "portd run … -- true": [str(launcher), "run", "bench-run", "--", "true"],
        "python -c pass": [sys.executable, "-c", "pass"],
        "python, import portd_client": [sys.executable, "-c", "import portd_client"],
        "python, binds port 0": [sys.executable, "-c", BARE],
        "python, portd_client.listen": [sys.executable, "-c", LEASED],
    }


def _rounds(ways: dict[str, list[str]], environ: dict[str, str], runs: int) -> dict[str, list[float]]:
    environ = {name: value for name, value in environ.items() if name != "PYTHONWARNINGS"}
    took: dict[str, list[float]] = {what: [] for what in ways}
    for number in range(runs + 1):
        for what, words in ways.items():
            began = time.perf_counter()
            subprocess.run(words, env=environ, stdout=subprocess.DEVNULL, check=True)
            if number:  # the first round fills the caches
                took[what].append((time.perf_counter() - began) * 1000)
    return took


if __name__ == "__main__":
    for row in asyncio.run(measure()):
        print(f"{row['what']:32} {row['median_ms']:8} ms   fastest {row['fastest_ms']:6} ms   {row['times_curl']:5} x")
