"""Which ports a run of the suite has to itself, when several run on one host at the same time."""

from __future__ import annotations

import socket
from typing import NamedTuple

FIRSTS = range(25400, 24900, -100)


class Block(NamedTuple):
    """A hundred ports. `pools` are those of the daemons; `requested` and `http` are in none of them."""

    first: int

    @property
    def pools(self) -> dict[str, str]:
        """Return the ranges of the daemons' pools."""
        return {"steady": self._range(0, 49), "mortal": self._range(50, 79), "own": self._range(80, 94)}

    @property
    def requested(self) -> int:
        """Return a port that cases request: outside the pools, so that a foreign process on it disturbs no case."""
        return self.first + 95

    @property
    def http(self) -> int:
        """Return where a daemon listens on TCP."""
        return self.first + 99

    def _range(self, start: int, end: int) -> str:
        return f"{self.first + start}-{self.first + end}"


def claim() -> tuple[Block, socket.socket]:
    """Claim a block; it is given up when the socket is closed (abstract unix names end with their sockets)."""
    for first in FIRSTS:
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0portd-conformance-{first}")
        except OSError:
            mark.close()
        else:
            return Block(first), mark
    raise AssertionError(f"{len(FIRSTS)} runs of this suite are under way on this host")
