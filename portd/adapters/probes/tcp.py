"""The `tcp` check: the port accepts a connection. Nothing is sent."""

from __future__ import annotations

import asyncio
import socket

from portd.adapters.probes.finding import Finding, ProbeFailed, target
from portd.core.model import Lease


async def probe(lease: Lease) -> Finding:
    """Connect and hang up; raises OSError when nobody accepts."""
    host, port = target(lease)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as connection:
        await asyncio.get_running_loop().sock_connect(connection, (host, port))
        # A port of the kernel's ephemeral range may be chosen for our own end: then we talk to ourselves (a
        # simultaneous open, RFC 9293 section 3.5), and nobody listens.
        if connection.getsockname() == connection.getpeername():
            raise ProbeFailed("connection refused")
    return Finding("passing", "connected")
