"""Descriptors: each hold and each owner costs one, so the daemon takes all that it may have (getrlimit(2))."""

from __future__ import annotations

import fcntl
import os
import resource
from typing import Final

ROOM_FOR: Final = 1 << 15
"""Descriptors that there is room for from the start, 8 bytes of kernel memory each. The kernel doubles a full table,
and where there are threads it waits until all cores have seen the new one (expand_fdtable in fs/file.c): each time the
loop stood still for 7 to 20 ms."""


def take_all() -> None:
    """Raise the limit to the hard one, and make room. To be called while there are no threads yet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with open(os.devnull) as file:
        os.close(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, min(hard, ROOM_FOR) - 1))
