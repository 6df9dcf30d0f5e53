"""Ports that one run of the tests has to itself, when several run on one host at the same time."""

from __future__ import annotations

import socket

BLOCKS = range(61_000, 65_500, 100)
"""Blocks of ports for the tests' pools, above the kernel's ephemeral range and what others may run meanwhile."""


def claim_ports(count: int) -> tuple[int, list[socket.socket]]:
    """Claim `count` consecutive ports (at least) that no other run of these tests on this host uses meanwhile.

    Returns the first one, and the claims: abstract unix sockets, one a block, given up when they are closed.
    """
    claims: list[socket.socket] = []
    for first in BLOCKS:
        claim = socket.socket(socket.AF_UNIX)
        claims.append(claim)
        try:
            claim.bind(f"\0portd-e2e-{first}")
        except OSError:
            for one in claims:
                one.close()
            claims.clear()
            continue
        if len(claims) * BLOCKS.step >= count:
            return first - (len(claims) - 1) * BLOCKS.step, claims
    for one in claims:
        one.close()
    raise AssertionError("no ports are left to claim")


def free_tcp_port(address: str = "127.0.0.1") -> int:
    """Return a port of the kernel's choice."""
    with socket.socket() as one:
        one.bind((address, 0))
        port: int = one.getsockname()[1]
        return port
