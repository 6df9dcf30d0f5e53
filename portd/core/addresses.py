"""Which addresses exclude each other on one port, by the kernel's rules (tried against it in the tests)."""

from __future__ import annotations

from typing import Final

ANY_V4: Final = "0.0.0.0"
ANY: Final = "::"
"""Dual-stack, as servers bind it: it excludes every address of both families."""


def overlaps(a: str, b: str, *, v6only: bool = False) -> bool:
    """Tell whether two bound addresses exclude each other on the same port.

    `v6only` says that `a` was bound with IPV6_V6ONLY: as `::` it then leaves IPv4 alone (RFC 3493 section 5.3).
    """
    if a == ANY and v6only:
        return ":" in b
    if a == b or ANY in (a, b):
        return True
    return ANY_V4 in (a, b) and ":" not in a + b
