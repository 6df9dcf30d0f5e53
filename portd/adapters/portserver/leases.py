"""What both port servers lease: a number that is free for TCP and UDP at every address, held by nobody.

Their callers bind as they like, so portd keeps no socket on the port. Each lease has an instance of its own, so no
caller gets a number again while others are free. This module must not know any wire format.
"""

from __future__ import annotations

import secrets
import socket

from portd.core.model import Lease
from portd.core.requests import LeaseRequest
from portd.core.rights import Caller
from portd.leasing.service import LeaseService

WILDCARD = "::" if socket.has_ipv6 else "0.0.0.0"


async def lease_port(
    service: LeaseService, caller: Caller, *, pid: int | None = None, ttl: float | None = None
) -> Lease:
    """Lease a port to a process of the caller's, or for `ttl` seconds. Raises the Refusal where none is given.

    The service is named for the caller's user, since a service name belongs to one user.
    """
    name = f"portserver-{caller.uid}"
    request = LeaseRequest(
        service=name,
        instance=f"{name}-{secrets.token_hex(6)}",
        protocol="both",
        address=WILDCARD,
        hold="none",
        pid=pid,
        ttl=ttl,
    )
    granted = await service.grant([request], caller)
    return granted.leases[0]
