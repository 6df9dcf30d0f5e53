"""Which addresses exclude each other on one port, by the kernel's rules."""

from __future__ import annotations


def overlaps(a: str, b: str) -> bool:
    """Tell whether two bound addresses exclude each other on the same port.

    `::` is dual-stack, as servers bind it, and excludes everything; `0.0.0.0` excludes every IPv4 address.
    """
    if a == b or "::" in (a, b):
        return True
    if a == "0.0.0.0":
        return ":" not in b
    return b == "0.0.0.0" and ":" not in a
