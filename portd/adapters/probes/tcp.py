"""The `tcp` check: the port accepts a connection, and the TLS handshake succeeds where TLS is configured.

Nothing else is sent.
"""

from __future__ import annotations

from portd.adapters.probes.connection import Target, Trust, opened
from portd.adapters.probes.results import CheckResult


async def probe(target: Target, trust: Trust | None) -> CheckResult:
    """Connect and hang up; raises ProbeFailed or OSError when nobody accepts."""
    async with opened(target, trust):
        return CheckResult("passing", "connected")
