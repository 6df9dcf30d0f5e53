"""One daemon for each state directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from portd.core.errors import StateInUse


class StateLock:
    """A lock beside the database, held by the kernel for as long as this process lives, however it ends (flock(2))."""

    def __init__(self, store: Path) -> None:
        """Take the lock; raises StateInUse when another daemon has it."""
        path = store.with_name(store.name + ".lock")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise StateInUse(f"another portd (pid {holder}) uses {store}: stop it, or give this one a [store] path of "
                             "its own") from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Let another daemon start here."""
        os.close(self._descriptor)
