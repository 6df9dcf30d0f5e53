"""The service manager's protocols: readiness, the watchdog, passed sockets, and holds that its descriptor store keeps
from one run to the next.

The protocols are sd_notify(3) and sd_listen_fds(3); they are a few lines each, so no library is needed. This module
must not know what a hold is for.

The manager's descriptor store compares each descriptor with all that it has: ten thousand would stop PID 1 for a while.
So holds are stored in parcels: one end of a socket pair, in whose queue a message waits that carries hundreds of them
(SCM_RIGHTS, unix(7)); the other end is closed. The message also names their leases: FDNAME= is one short string for all
descriptors.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Iterable
from typing import Final

FIRST_DESCRIPTOR: Final = 3
"""Where passed descriptors start (sd_listen_fds(3))."""
PARCEL_SIZE: Final = 250
"""Descriptors in one message; the kernel takes 253 (SCM_MAX_FD)."""
PARCEL_MAX_BYTES: Final = 64 * 1024
PARCELS: Final = "holds"
"""The parcels' FDNAME."""
BARRIER_MS: Final = 500
"""How long the manager may take to take up what it was given; after that a stop goes on without knowing."""

Owned = tuple[str, socket.socket]
"""A socket, and the id of the lease that it belongs to."""


def notify(*lines: str) -> None:
    """Notify the service manager, if there is one: `READY=1`, `STATUS=…`, `STOPPING=1`, `WATCHDOG=1`."""
    _send(lines)


def store(owned: Iterable[Owned]) -> bool:
    """Give sockets to the manager for the next run; returns when it has them, True if it says so.

    False where there is no manager that keeps anything. Blocks for a few milliseconds: only at the stop.
    """
    waiting = list(owned)
    if not waiting or not os.environ.get("NOTIFY_SOCKET"):
        return False
    for start in range(0, len(waiting), PARCEL_SIZE):
        with _parcel(waiting[start : start + PARCEL_SIZE]) as parcel:
            # FDPOLL=0: its other end is closed, which the manager would take for the end of its use.
            if not _send(("FDSTORE=1", f"FDNAME={PARCELS}", "FDPOLL=0"), parcel.fileno()):
                return False
    return _barrier()


def unpack(parcels: Iterable[socket.socket]) -> dict[str, list[socket.socket]]:
    """Take the sockets out of the parcels of the last run, by lease id; the manager then keeps none of them."""
    found: dict[str, list[socket.socket]] = {}
    for parcel in parcels:
        with parcel:
            try:
                message, descriptors, _, _ = socket.recv_fds(
                    parcel, PARCEL_MAX_BYTES, PARCEL_SIZE, socket.MSG_CMSG_CLOEXEC
                )
            except OSError:
                continue  # empty: a run that died while it unpacked
            for lease_id, descriptor in zip(message.decode().split(), descriptors, strict=True):
                found.setdefault(lease_id, []).append(socket.socket(fileno=descriptor))
    if found:
        notify("FDSTOREREMOVE=1", f"FDNAME={PARCELS}")
    return found


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
        taken.setblocking(False)  # a parcel too: an empty one must not stop the start
        passed.setdefault(name, []).append(taken)
    return passed


def turn_away(listener: socket.socket) -> None:
    """Hang up on whoever comes to a passed socket that is not served.

    The manager keeps it open whatever this process does with its copy: unanswered, callers would wait for ever.
    """

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            listener.accept()[0].close()

    asyncio.get_running_loop().add_reader(listener, hang_up)


async def feed_watchdog() -> None:
    """Ping the manager's watchdog twice in its period, from the event loop; return at once if there is none."""
    period_us = int(os.environ.get("WATCHDOG_USEC", "0"))
    if not period_us or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(period_us / 2_000_000)


def _parcel(owned: list[Owned]) -> socket.socket:
    """Pack sockets into one that can be stored in their stead; raises OSError at a limit of descriptors."""
    packer, parcel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with packer:
        try:
            socket.send_fds(
                packer, [" ".join(lease_id for lease_id, _ in owned).encode()], [kept.fileno() for _, kept in owned]
            )
        except BaseException:
            parcel.close()
            raise
    return parcel


def _barrier() -> bool:
    """Wait until the manager has taken up all that it was sent before (sd_notify_barrier(3)); False if it does not."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        sent = _send(("BARRIER=1",), writing)
    finally:
        os.close(writing)
    try:
        poll = select.poll()
        poll.register(reading, 0)
        return sent and bool(poll.poll(BARRIER_MS))  # it hangs up when the manager closes its copy
    finally:
        os.close(reading)


def _send(lines: Iterable[str], *descriptors: int) -> bool:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    target = "\0" + address[1:] if address.startswith("@") else address
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendmsg(["\n".join(lines).encode()], rights, 0, target)
        except OSError:
            return False  # the manager has exited
    return True
