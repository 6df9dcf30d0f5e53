"""`portd stop`: ends the process that has a lease, by pidfd, after comparing who it is."""

from __future__ import annotations

import os
import select
import signal

from portd._client import calls
from portd._client.client import Client
from portd._client.errors import LeaseLost, PortdError
from portd.cli.options import JSON, Command, Option, duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from portd._client.types import LeaseDocument

TIMEOUT_S = 10.0
"""Seconds between SIGTERM and SIGKILL, as in systemd's spirit but for people who wait."""
KILLED_S = 5.0
"""Seconds for the kernel to end a killed process."""
SEEN_S = 2.0
"""Seconds for the daemon to see the exit."""
PASSES_MAX = 16
"""Processes that a lease may pass to while it is stopped: workers of a server go on listening one after the other."""


class NotStopped(PortdError):
    """The process can't be ended; the message says why."""

    code = "failed"


def stop(values: dict[str, Any]) -> int:
    """End the processes of the leases that X means, and wait for that."""
    from portd.cli import printing, targets

    client = Client()
    timeout_s = TIMEOUT_S if values["timeout"] is None else values["timeout"]
    stopped: dict[int, str] = {}
    for found in targets.find(client, values["x"]):
        lease = found
        for _ in range(PASSES_MAX):
            pid = lease["owner"]["pid"]
            if pid is None or pid in stopped:
                break
            stopped[pid] = _end(client, lease, timeout_s)
            lease = _after_exit(client, lease)
            if lease["state"] == "ended":
                break
    if not stopped:
        printing.error(f"{values['x']} has no process that portd knows", code="not_found", as_json=values["json"])
        return 1
    if values["json"]:
        printing.json({"stopped": [{"pid": pid, "signal": name} for pid, name in stopped.items()]})
    return 0


def _end(client: Client, lease: LeaseDocument, timeout_s: float) -> str:
    """End a lease's owner and return the signal that did it.

    The descriptor is opened first, then the daemon is queried again: it still knows the same process, so the descriptor
    is that process's, whatever the pid is used for later.
    """
    owner = lease["owner"]
    pid = owner["pid"]
    assert pid is not None
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return "none"
    try:
        now = client.call(calls.lease(lease["id"]))
        if now["state"] == "ended" or (now["owner"]["pid"], now["owner"]["started_at"]) != (pid, owner["started_at"]):
            return "none"
        for number, seconds in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, KILLED_S)):
            signal.pidfd_send_signal(descriptor, number)
            if select.select([descriptor], [], [], seconds)[0]:
                return number.name
    except ProcessLookupError:
        return "none"
    except PermissionError:
        raise NotStopped(
            f"process {pid} of {lease['instance']} belongs to {owner['user']}: stop it as that user"
        ) from None
    finally:
        os.close(descriptor)
    raise NotStopped(f"process {pid} of {lease['instance']} does not end, not even by SIGKILL")


def _after_exit(client: Client, lease: LeaseDocument) -> LeaseDocument:
    """Return the lease once the daemon has seen that its owner is gone: ended, or passed to another process."""
    import time

    end = time.monotonic() + SEEN_S
    while True:
        try:
            now = client.call(calls.lease(lease["id"]))
        except LeaseLost:
            return {**lease, "state": "ended"}
        if now["state"] == "ended" or now["owner"]["pid"] != lease["owner"]["pid"] or time.monotonic() > end:
            return now
        time.sleep(0.02)


COMMANDS = (
    Command(
        "stop",
        ["X"],
        "End the process that has a lease: SIGTERM, then SIGKILL",
        stop,
        (Option("--timeout", "SECONDS", f"time between the two signals ({TIMEOUT_S:g} s)", duration), JSON),
        """
X is a lease id, an instance name, or a port.

The process is compared with the lease's owner first, and signalled through a
pidfd: a process that got the same pid later is safe. A worker that goes on
listening is ended too. A service manager may start the service again.""",
    ),
)
