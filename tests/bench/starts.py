"""What each client adds to a program's start: to a socket that listens on a leased port, against a bare bind to port 0.

Times are from the start of the process until it says that it listens, by turns; memory is its resident set then.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tests.cli.bed import Daemon

ROUNDS: Final = 25
CLIENTS: Final = Path(__file__).parents[2] / "clients"
PYTHON: Final = """
import os, socket, sys
if sys.argv[1] == "portd":
    import portd_client
    listener = portd_client.listen("bench-start")
else:
    listener = socket.create_server(("127.0.0.1", 0))
pages = int(open("/proc/self/statm").read().split()[1])
print('{"rss_kib": %d}' % (pages * os.sysconf("SC_PAGESIZE") // 1024), flush=True)
"""
IMPORT: Final = """
import time
began = time.perf_counter()
import portd_client
portd_client.listen  # names are imported when they are first used
print((time.perf_counter() - began) * 1000)
"""


async def measure(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Return one row for each language: `bare_ms portd_ms added_ms bare_mib portd_mib added_mib`, medians; for Python
    `import_ms` as well."""
    return await asyncio.to_thread(_measure, rounds)


def _measure(rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        languages = _languages(Path(directory))
        daemon = Daemon(Path(directory), pool="25000-29999")
        daemon.start()
        environ = {name: value for name, value in daemon.environ.items() if name != "PYTHONWARNINGS"}
        try:
            rows = [_row(language, words, environ, rounds) for language, words in languages.items()]
        finally:
            daemon.stop()
    imports = [float(subprocess.check_output([sys.executable, "-c", IMPORT], env=environ)) for _ in range(rounds)]
    rows[0]["import_ms"] = round(statistics.median(imports), 1)
    return rows


def _languages(directory: Path) -> dict[str, list[str]]:
    """Return a command for each language that this machine has; its last word will be `bare` or `portd`."""
    languages = {"python": [sys.executable, "-c", PYTHON]}
    if node := shutil.which("node"):
        languages["node"] = [node, str(CLIENTS / "node/test/start_bench.mjs")]
    if go := shutil.which("go"):
        program = directory / "startbench"
        subprocess.run([go, "build", "-o", program, "./internal/startbench"], cwd=CLIENTS / "go", check=True)
        languages["go"] = [str(program)]
    return languages


def _row(language: str, words: list[str], environ: dict[str, str], rounds: int) -> dict[str, Any]:
    took: dict[str, list[float]] = {"bare": [], "portd": []}
    mib: dict[str, list[float]] = {"bare": [], "portd": []}
    for number in range(rounds + 1):
        for way in took:
            began = time.perf_counter()
            with subprocess.Popen([*words, way], env=environ, stdout=subprocess.PIPE) as program:
                assert program.stdout is not None
                line = program.stdout.readline()
                seconds = time.perf_counter() - began
            if number:  # the first round fills the caches
                took[way].append(seconds * 1000)
                mib[way].append(json.loads(line)["rss_kib"] / 1024)
    row: dict[str, Any] = {"language": language}
    for unit, values in (("ms", took), ("mib", mib)):
        bare, portd = (statistics.median(values[way]) for way in ("bare", "portd"))
        row |= {
            f"bare_{unit}": round(bare, 1),
            f"portd_{unit}": round(portd, 1),
            f"added_{unit}": round(portd - bare, 1),
        }
    return row
