"""What passes between portd and the service manager: readiness, the watchdog, sockets that it has opened already.

The protocols are sd_notify(3) and sd_listen_fds(3); they are a few lines each, and no library is needed for them.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Final

FIRST_DESCRIPTOR: Final = 3
"""Where passed descriptors start (sd_listen_fds(3))."""


def notify(*lines: str) -> None:
    """Tell the service manager, if there is one: `READY=1`, `STATUS=…`, `STOPPING=1`, `WATCHDOG=1`."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    target = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto("\n".join(lines).encode(), target)
        except OSError:
            return  # the manager has gone: there is nobody to tell


def passed_sockets() -> dict[str, list[socket.socket]]:
    """Take the sockets that the service manager passed, by their names; empty when it passed none to this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    passed: dict[str, list[socket.socket]] = {}
    for index in range(count):
        descriptor = FIRST_DESCRIPTOR + index
        os.set_inheritable(descriptor, False)
        name = names[index] if index < len(names) else "unknown"
        taken = socket.socket(fileno=descriptor)
        taken.setblocking(False)
        passed.setdefault(name, []).append(taken)
    return passed


async def feed_watchdog() -> None:
    """Tell the manager's watchdog that the loop turns, twice in its period; returns at once when it has none."""
    period_us = int(os.environ.get("WATCHDOG_USEC", "0"))
    if not period_us or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(period_us / 2_000_000)
