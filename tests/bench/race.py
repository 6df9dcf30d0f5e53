"""Eight processes grab ports of the pool by bind() as fast as they can, while eight others lease one and listen.

A failure is a port that a process was given and could not listen on. Between receiving the port and listening, every
process waits for the same short time, as a server does that has yet to start. portpicker runs in the same setting:
alone, and with its portserver.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.bench import bed, grants
from tests.bench.handing import take

PROCESS_COUNT: Final = 8
POOL: Final = (20_000, 23_999)
GRABBED: Final = 20
"""Ports that one grabber keeps at a time: all of them together have a twenty-fifth of the pool. portpicker alone looks
in a larger one of its own (15,000 to 24,999), of which the grabbers' is the middle."""
HANDED: Final = 20_000
OTHERS: Final = 2_000
START_S: Final = 0.02
"""Seconds from the port to `listen`: a fifth of what a server written in Python takes."""
LIMIT_S: Final = 300.0
"""Seconds for one setting; what was done by then is what counts."""


async def measure() -> list[dict[str, Any]]:
    """Return one row for each way: `way grabbers leases failures seconds`."""
    return await asyncio.to_thread(_measure)


def _measure() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        daemon = bed.Portd(directory, f"{POOL[0]}-{POOL[1]}")
        rows = []
        with daemon.serving(core=None):
            rows.append(_race("handoff", "with SO_REUSEADDR", HANDED, daemon.socket, daemon.handoff))
            rows.append(_race("handoff", "plain", OTHERS, daemon.socket, daemon.handoff))
            rows.append(_race("shared hold, then bind", "plain", OTHERS, daemon.socket, daemon.handoff))
    rows.append(_race("portpicker", "plain", OTHERS, "", ""))
    with contextlib.ExitStack() as stack:
        if program := grants.portserver_program():
            url = stack.enter_context(grants.portserver(program, f"{POOL[0]}-{POOL[1]}"))
            rows.append(_race("portpicker with portserver", "plain", OTHERS, url.removeprefix("unix:"), ""))
    return rows


def _race(way: str, grabbers: str, count: int, place: str, handoff: str) -> dict[str, Any]:
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for _ in range(PROCESS_COUNT):
            stack.enter_context(bed.running(sys.executable, "-m", "tests.bench.race", "grab", grabbers, core=None))
        leasers = [
            stack.enter_context(
                bed.running(
                    sys.executable,
                    "-m",
                    "tests.bench.race",
                    way,
                    str(count // PROCESS_COUNT),
                    place,
                    handoff,
                    core=None,
                    stdout=subprocess.PIPE,
                )
            )
            for _ in range(PROCESS_COUNT)
        ]
        results = [json.loads(leaser.communicate(timeout=LIMIT_S + bed.DEADLINE_S)[0]) for leaser in leasers]
    return {
        "way": way,
        "grabbers": grabbers,
        "leases": sum(done for done, _ in results),
        "failures": sum(failed for _, failed in results),
        "seconds": round(time.perf_counter() - began, 1),
    }


def grab(*, reuse: bool) -> None:
    """Bind ports of the pool at random, and keep the newest few, until killed."""
    kept: deque[socket.socket] = deque()
    while True:
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            one.bind(("127.0.0.1", random.randint(*POOL)))
        except OSError:
            one.close()
            continue
        kept.append(one)
        if len(kept) > GRABBED:
            kept.popleft().close()


def lease(way: str, count: int, place: str, handoff: str) -> tuple[int, int]:
    """Get ports and listen on them, one after the other; returns how many, and how many could not be listened on."""
    done = failures = 0
    end = time.monotonic() + LIMIT_S
    with _listening(way, place, handoff) as listen:
        while done < count and time.monotonic() < end:
            done += 1
            try:
                listen().close()
            except OSError:
                failures += 1
    return done, failures


@contextlib.contextmanager
def _listening(way: str, place: str, handoff: str) -> Iterator[Callable[[], socket.socket]]:
    """Give a way to get a listening socket; what it leased before is released with the next one."""
    if way.startswith("portpicker"):
        os.environ.pop("PORTSERVER_ADDRESS", None)
        if place:
            os.environ["PORTSERVER_ADDRESS"] = place
        import portpicker

        yield lambda: _bound(portpicker.pick_unused_port())
        return
    name = f"racer-{os.getpid()}"
    with (
        contextlib.closing(bed.Call(place)) as call,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
    ):
        connection.connect(handoff)
        leased: list[str] = []

        def listen() -> socket.socket:
            if leased:
                call.ask("DELETE", f"/v1/leases/{leased.pop()}")
            if way == "handoff":
                lease_id, made = take(connection, name)
                leased.append(lease_id)
                time.sleep(START_S)
                return made
            lease = call.ask("POST", "/v1/leases", {"service": name})
            leased.append(lease["id"])
            return _bound(lease["port"])

        yield listen


def _bound(port: int | None) -> socket.socket:
    assert port is not None, "portpicker found no port"
    time.sleep(START_S)
    return socket.create_server(("127.0.0.1", port))


if __name__ == "__main__":
    if sys.argv[1] == "grab":
        grab(reuse=sys.argv[2] != "plain")
    else:
        print(json.dumps(lease(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])))
