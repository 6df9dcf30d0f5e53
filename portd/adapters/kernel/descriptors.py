"""The file limit: each hold and owner costs a descriptor, so the soft limit becomes the hard one (getrlimit(2))."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from typing import Final

PREGROWN: Final = 1 << 15
"""Descriptors that the table has space for from the start, 8 bytes of kernel memory each. The kernel doubles a full
table and waits until all cores have seen the new one (expand_fdtable in fs/file.c): the loop stood still for 7 to 20 ms
each time."""
RESERVED: Final = 64
"""Descriptors (an eighth of a small limit) that holds and pidfds leave to connections, the store and /proc."""

_first_reserved = 1 << 30
"""The lowest descriptor of the reserve. The kernel gives the lowest free number (open(2)), so whoever gets a number
from here on has used up the rest."""


def check_unreserved(descriptor: int) -> None:
    """Raise OSError (EMFILE) for a descriptor of the reserve; its owner must close it then."""
    if descriptor >= _first_reserved:
        raise OSError(errno.EMFILE, "the remaining descriptors are reserved")


def are_short() -> bool:
    """Return whether nearly all descriptors outside the reserve are in use."""
    with open(os.devnull) as file:
        return file.fileno() >= _first_reserved - _first_reserved // 20


def raise_fd_limit() -> None:
    """Raise RLIMIT_NOFILE to the hard limit and pre-grow the table. Call it before there are threads."""
    global _first_reserved
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _first_reserved = hard - min(RESERVED, hard // 8)
    with open(os.devnull) as file:
        os.close(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, min(hard, PREGROWN) - 1))
