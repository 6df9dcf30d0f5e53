"""Which addresses exclude each other on one port, by the kernel's rules (tried against it in the tests)."""

from __future__ import annotations

from typing import Final

ANY_V4: Final = "0.0.0.0"
ANY: Final = "::"
"""Dual-stack, as servers bind it: it excludes every address of both families."""


def overlaps(a: str, b: str) -> bool:
    """Tell whether two bound addresses exclude each other on the same port."""
    if a == b or ANY in (a, b):
        return True
    return ANY_V4 in (a, b) and ":" not in a + b
