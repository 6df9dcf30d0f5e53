"""One daemon for each state directory. Knows a file and the kernel's locks, and nothing of what they guard."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from portd.core.errors import StateInUse


class StateLock:
    """A lock on a file beside the database, kept by the kernel until this process ends, however it ends (flock(2)).

    The file stays behind: unlinking it would let two daemons lock two files of one name.
    """

    def __init__(self, database: Path) -> None:
        """Take the lock; raises StateInUse when another daemon has it, OSError when there can be no lock file."""
        path = database.with_name(database.name + ".lock")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise StateInUse(
                f"another portd (pid {holder}) uses {database}: stop it, or give this one a [store] path of its own"
            ) from error
        except OSError:
            os.close(self._descriptor)
            raise
        with suppress(OSError):  # a full disk: the lock holds all the same, only the refusal then names no pid
            os.pwrite(self._descriptor, b"%-10d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Let another daemon start here. To be called once."""
        os.close(self._descriptor)
