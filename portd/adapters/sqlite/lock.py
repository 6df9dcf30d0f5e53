"""One daemon for each state directory, and what one run leaves to the next. Knows a file and the kernel's locks.

The lock file has three lines: the pid, `open` or `closed` (a clean stop), and the id of the store. Behind them lies
space that is reserved for the moment when the disk is full.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from portd.core.errors import StateInUse

TEXT_BYTES: Final = 64
RESERVE_BYTES: Final = 256 << 10
"""Space that ends of leases may use on a full disk: some 200 of them until a checkpoint makes room in the log."""
RESERVE_MIN_BYTES: Final = 8 << 10
RESERVE_SHARE: Final = 16
"""The reserve is at most this part of the free space: a small disk is not filled by it."""


class LastRun(NamedTuple):
    """What the run before wrote. `store_id` is "" where there was none; `is_open`: it did not stop cleanly."""

    store_id: str
    is_open: bool


class StateLock:
    """A lock on a file beside the database, kept by the kernel until this process ends, however it ends (flock(2)).

    The file stays behind: unlinking it would let two daemons lock two files of one name.
    """

    def __init__(self, database: Path) -> None:
        """Lock; raises StateInUse when another daemon has the lock, OSError when there can be no lock file."""
        self._path = path = database.with_name(database.name + ".lock")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = [*os.pread(self._descriptor, TEXT_BYTES, 0).rstrip(b"\0").decode("ascii", "replace").split(), ""]
        except BlockingIOError as error:
            lines = [*os.pread(self._descriptor, TEXT_BYTES, 0).rstrip(b"\0").decode("ascii", "replace").split(), ""]
            os.close(self._descriptor)
            raise StateInUse(
                f"another portd (pid {lines[0] or 'unknown'}) uses {database}: stop it, "
                "or give this one a [store] path of its own"
            ) from error
        except OSError:
            os.close(self._descriptor)
            raise
        self.last_run = LastRun(lines[2] if len(lines) > 3 else "", "open" in lines[1:2])
        self._write(self.last_run)

    def mark(self, store_id: str, *, is_open: bool) -> None:
        """Record which store is in use, and whether this run is still using it."""
        self._write(LastRun(store_id, is_open))

    def reserve_space(self) -> bool:
        """Reserve space on the disk for `release_space`; False where there is too little."""
        try:
            if os.fstat(self._descriptor).st_size > TEXT_BYTES:
                return True
            disk = os.fstatvfs(self._descriptor)
            size = min(RESERVE_BYTES, disk.f_bavail * disk.f_frsize // RESERVE_SHARE)
            if size < RESERVE_MIN_BYTES:
                return False
            os.posix_fallocate(self._descriptor, 0, size)
        except OSError:
            return False
        return True

    def release_space(self) -> bool:
        """Give the reserved space back; False when there is none."""
        with suppress(OSError):
            if os.fstat(self._descriptor).st_size > TEXT_BYTES:
                os.ftruncate(self._descriptor, TEXT_BYTES)
                return True
        return False

    def release(self) -> None:
        """Let another daemon start here. Call it once.

        A lock file that was deleted is written again: the next start must know that there was a store.
        """
        if not self._path.exists():
            with suppress(OSError):
                self._path.write_bytes(os.pread(self._descriptor, TEXT_BYTES, 0))
                self._path.chmod(0o600)
        os.close(self._descriptor)

    def _write(self, run: LastRun) -> None:
        text = f"{os.getpid():<10}\n{'open' if run.is_open else 'closed':<8}\n{run.store_id}\n"
        with suppress(OSError):  # a full disk: the lock holds all the same, only the refusal then names no pid
            os.pwrite(self._descriptor, text.encode().ljust(TEXT_BYTES, b"\0"), 0)
