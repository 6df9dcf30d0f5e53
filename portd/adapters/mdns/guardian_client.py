"""The daemon's end of the guardian process: starts it, keeps its encoded goodbyes up to date, and dismisses it.

Services share packets, and a change encodes only its own packet again, so that keeping them costs the daemon little.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from portd.adapters.mdns import guardian, wire
from portd.adapters.mdns.sockets import Sockets
from portd.adapters.mdns.wire import DNSPointer, DNSRecord

PER_PACKET = 16
"""Services whose goodbyes share a slot, and mostly a packet."""
PACKETS_PER_SLOT = 24
"""Packets that the records of 16 services may need: a TXT has up to 1.3 KB."""
FLUSH_S = 0.010
"""Changes this close together are encoded together."""
RESTARTS, RESTART_S = 5, 1.0
"""A guardian that is killed is started again, but not for ever: then status shows none."""
DISMISS_S = 2.0
"""How long the guardian may take to exit once dismissed, before it is killed."""


class GuardianClient:
    """Runs the guardian. Without one everything works, but a killed daemon leaves its services on the LAN."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._watching: asyncio.Task[None] | None = None
        self._slots: list[dict[str, Sequence[DNSRecord]]] = []
        self._slot_of: dict[str, int] = {}
        self._dirty: set[int] = set()
        self._packet_counts: dict[tuple[bytes, int], int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def pid(self) -> int | None:
        """Return the guardian's pid, None while there is none."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the guardian; raises OSError."""
        ours, theirs = socket.socketpair()
        descriptors = self._sockets.filenos()
        command = [
            sys.executable,
            "-I",
            "-S",
            str(Path(guardian.__file__)),
            str(theirs.fileno()),
            *(f"{int(family)}={number}" for family, number in descriptors.items()),
        ]
        with theirs:
            try:
                self._process = await asyncio.to_thread(
                    subprocess.Popen,
                    command,
                    pass_fds=[theirs.fileno(), *descriptors.values()],
                    cwd="/",
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except OSError:
                ours.close()
                raise
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._watching = asyncio.get_running_loop().create_task(self._watch(reader))

    async def close(self) -> None:
        """Dismiss the guardian: it exits and sends nothing. May be called twice."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        if self._writer is not None:
            self._send(b"D", 0, b"")
        if self._watching is not None:
            if self._process is None:
                self._watching.cancel()
            with suppress(asyncio.TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(self._watching, DISMISS_S)
            self._watching = None
        await self._reap()

    def keep(self, key: str, records: Sequence[DNSRecord]) -> None:
        """Have goodbyes sent for these records if the daemon is killed."""
        slot = self._slot_of.get(key)
        if slot is None:
            slot = next((number for number, used in enumerate(self._slots) if len(used) < PER_PACKET), -1)
            if slot < 0:
                slot = len(self._slots)
                self._slots.append({})
            self._slot_of[key] = slot
        if self._slots[slot].get(key) != records:
            self._slots[slot][key] = records
            self._touch(slot)

    def drop(self, key: str) -> None:
        """Have none sent for these any more; nothing happens when the key is unknown."""
        slot = self._slot_of.pop(key, None)
        if slot is not None:
            del self._slots[slot][key]
            self._touch(slot)

    def set_targets(self) -> None:
        """Send the guardian the families and interfaces that packets go to now."""
        self._send(
            b"T", 0, json.dumps([[int(target.family), target.link] for target in self._sockets.groups()]).encode()
        )

    def _touch(self, slot: int) -> None:
        self._dirty.add(slot)
        if self._timer is None and not self._closing:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        self._timer = None
        slot = self._dirty.pop()
        records = [wire.with_ttl(record, 0) for records in self._slots[slot].values() for record in records]
        self._replace(b"P", slot, [record for record in records if isinstance(record, DNSPointer)])
        self._replace(b"R", slot, [record for record in records if not isinstance(record, DNSPointer)])
        if self._dirty:
            self._timer = asyncio.get_running_loop().call_later(0, self._flush)

    def _replace(self, kind: bytes, slot: int, records: Sequence[DNSRecord]) -> None:
        """Send the guardian the packets of a slot, and empty ones for those that it had more of before."""
        packets = wire.encode_response(records)[:PACKETS_PER_SLOT] if records else []
        before = self._packet_counts.get((kind, slot), 0)
        self._packet_counts[kind, slot] = len(packets)
        packets += [b""] * (before - len(packets))
        for number, packet in enumerate(packets):
            self._send(kind, slot * PACKETS_PER_SLOT + number, packet)

    def _send(self, kind: bytes, number: int, body: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(guardian.HEADER.pack(kind, number, len(body)) + body)

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        """Wait for the guardian's end, and start another unless it was dismissed."""
        with suppress(OSError):
            await reader.read()
        if self._closing:
            return
        await self._reap()
        for _ in range(RESTARTS):
            await asyncio.sleep(RESTART_S)
            with suppress(OSError):
                await self.start()
                self.set_targets()
                for slot in range(len(self._slots)):
                    self._touch(slot)
                return

    async def _reap(self) -> None:
        """Close our end and reap the process."""
        if self._writer is not None:
            self._writer.close()
            with suppress(OSError):
                await self._writer.wait_closed()
            self._writer = None
        process, self._process = self._process, None
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, DISMISS_S)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
