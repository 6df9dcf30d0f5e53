"""How long it takes from the exit of owners until their ports are free and everybody knows: one, or many at once.

`python -m tests.e2e.exits 1 1000` prints milliseconds for each number of owners.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.harness import Daemon, Stream, is_bindable, python, read_line, tell

CROWD = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
children = []
read, write = os.pipe()
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)  # until everybody's end of the pipe is closed: at once for all
        os._exit(0)
    children.append(child)
print(*children)
sys.stdin.readline()
os.close(write)
sys.stdin.readline()
"""
"""Children of one process that all exit at the same moment."""


def exit_to_free(owners: int) -> float:
    """Give `owners` processes a lease each, have them exit together; returns milliseconds until the last port was free
    and its event here. Fails when one lease has not ended, or a port can't be bound then."""
    with (
        tempfile.TemporaryDirectory() as directory,
        Daemon(Path(directory), port_count=owners) as daemon,
        python(CROWD, str(owners)) as crowd,
    ):
        daemon.start()
        pids = [int(pid) for pid in read_line(crowd).split()]
        requests = [{"service": f"crowd{n}", "pid": pid} for n, pid in enumerate(pids)]
        ports = set()
        for at in range(0, owners, 256):
            reply = daemon.call("POST", "/v1/leases", requests[at : at + 256])
            assert reply.status == 201, reply
            ports.update(lease["port"] for lease in reply.body)
        assert len(ports) == owners
        taken_ms = _wait_for_ends(daemon, lambda: tell(crowd), owners)
        assert all(map(is_bindable, ports))
        assert daemon.leases() == {}
        tell(crowd)
        daemon.check_log()
        return taken_ms


def _wait_for_ends(daemon: Daemon, leave: Callable[[], None], owners: int) -> float:
    with Stream(daemon) as stream:
        began = time.perf_counter()
        leave()
        ended = set()
        for event in stream:
            if event.type == "ended":
                assert event.data["lease"]["ended_because"] == "owner_exited"
                ended.add(event.data["lease"]["id"])
            if len(ended) == owners:
                break
        return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    print(json.dumps({count: round(exit_to_free(int(count)), 2) for count in sys.argv[1:] or ("1", "1000")}))
