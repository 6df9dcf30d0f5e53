"""Leases and events to store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace

from portd.core.model import Announcement, Event, EventType, HttpCheck, Lease, Owner, ProcessId


def a_lease(number: int = 1, **fields: Any) -> Lease:
    """Make a lease with every field filled, secrets too; `number` tells it from others."""
    described: dict[str, Any] = {
        "id": f"lease-{number:06d}",
        "service": "orders",
        "instance": f"orders-{number}",
        "endpoint": "main",
        "protocol": "tcp",
        "address": "127.0.0.1",
        "port": 20000 + number,
        "pool": "default",
        "hold": "shared",
        "lifetime": "process",
        "host": "testhost",
        "created_at": 1_700_000_000.0 + number,
        "revision": number,
        "owner": Owner(
            pid=4711,
            uid=1000,
            user="alice",
            exe="/usr/bin/naïve",
            cmdline=("naïve", "--port", "20001"),
            unit="orders.service",
            started_at=1.7e9,
            known_by="peercred",
        ),
        "uid": 1000,
        "tags": ("blue",),
        "metadata": {"version": "1.4.2"},
        "check": HttpCheck(path="/healthz"),
        "announce": Announcement(type="_http._tcp", name="Orders"),
        "token_hash": bytes(range(32)),
        "ttl": 30.0,
        "process": ProcessId(4711, 12345, "0b00701d-0000-4000-8000-000000000000", 7),
    }
    return Lease(**(described | fields))


def an_event(revision: int, lease: Lease, kind: EventType = "granted") -> Event:
    """Make the event that leaves `lease`."""
    return Event(revision, kind, 1_700_000_000.0 + revision, replace(lease, revision=revision))


def ended(lease: Lease, at: float) -> Lease:
    """Make the lease as its end leaves it."""
    return replace(lease, state="ended", ended_at=at, ended_because="released")


def granted(numbers: Iterable[int]) -> list[Event]:
    """Make one grant a number, with the number as its revision."""
    return [an_event(number, a_lease(number)) for number in numbers]
