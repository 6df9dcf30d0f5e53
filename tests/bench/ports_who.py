"""`who` and the full listing against ss, side by side, on a host of 500 processes with 2,000 listeners.

portd's side is the kernel half of a query, in a process that runs already; ss' side is a whole run of it, of which the
start of the process is the row "ss, no processes". `python -m tests.bench ports` shows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from portd.adapters.kernel.listeners import KernelSocketTable
from portd.adapters.kernel.netlink import SocketDiag

CROWD: Final = Path(__file__).parents[1] / "adapters" / "kernel" / "crowd.py"
PROCESS_COUNT: Final = 500
LISTENER_COUNT: Final = 2_000
ROUND_COUNT: Final = 9

Way = Callable[[], Awaitable[object]]


@contextlib.asynccontextmanager
async def crowd() -> AsyncIterator[None]:
    """Have the crowd listen."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        CROWD,
        str(PROCESS_COUNT),
        str(LISTENER_COUNT),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        yield
    finally:
        await process.communicate(b"")  # None would leave its input open


async def ss(*arguments: str) -> None:
    """Run ss as somebody would."""
    process = await asyncio.create_subprocess_exec("ss", "-H", *arguments, stdout=asyncio.subprocess.PIPE)
    await process.communicate()
    assert process.returncode == 0, arguments


async def ask(table: KernelSocketTable, port: int | None) -> None:
    """Ask who listens on a port, or on all of them."""
    found = table.listeners(port)
    owners = await table.owners([one.inode for one in found])
    assert owners, port


async def measure() -> list[dict[str, Any]]:
    """Return one row for each question and way: `question way median_ms fastest_ms`, the ways of one round in turn."""
    async with crowd():
        with contextlib.closing(SocketDiag()) as diag:
            warm = KernelSocketTable(diag)
            tcp = [one for one in warm.listeners() if one.protocol == "tcp"]
            known = await warm.owners([one.inode for one in tcp])
            youngest = max((one for one in tcp if one.inode in known), key=lambda one: known[one.inode].pid or 0)
            port = youngest.port  # the last place where portd looks
            only = f"sport = :{port}"
            questions: dict[str, dict[str, Way]] = {
                "who has a port": {
                    "portd": lambda: ask(warm, port),
                    "portd, asked for the first time": lambda: ask(KernelSocketTable(diag), port),
                    "ss -tlnp sport": lambda: ss("-tlnp", only),
                    "ss, no processes": lambda: ss("-tln", only),
                },
                "all listeners": {
                    "portd": lambda: ask(warm, None),
                    "ss -tulnp": lambda: ss("-tulnp"),
                    "ss, no processes": lambda: ss("-tuln"),
                },
            }
            return [row for question, ways in questions.items() for row in await compare(question, ways)]


async def compare(question: str, ways: dict[str, Way]) -> list[dict[str, Any]]:
    """Time the ways in turn, so that whatever slows the host slows all of them."""
    times_ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUND_COUNT):
        for name, way in ways.items():
            began = time.perf_counter()
            await way()
            times_ms[name].append((time.perf_counter() - began) * 1e3)
    return [
        {
            "question": question,
            "way": name,
            "median_ms": round(statistics.median(some), 2),
            "fastest_ms": round(min(some), 2),
        }
        for name, some in times_ms.items()
    ]


if __name__ == "__main__":
    for row in asyncio.run(measure()):
        print("{question:16} {way:32} {median_ms:9.2f} ms  (fastest {fastest_ms:.2f})".format(**row))
