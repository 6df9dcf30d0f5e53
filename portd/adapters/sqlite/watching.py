"""Notices when somebody else deletes, replaces, truncates or overwrites the files of the open database.

SQLite does not: it goes on writing to the files that it has open. The writing thread records what the files look like
after its own work, and compares before the next. Knows stat(2) and nothing of SQL.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """What identifies a file and its content, as far as stat(2) says."""

    device: int
    inode: int
    size: int
    changed_ns: int


class FileWatch:
    """The database and its log, as the writer left them."""

    def __init__(self, database: Path, log: Path) -> None:
        self._files = (database, log)
        self._states = self._read()

    def record(self) -> None:
        """Record the files as they are now: the writer's own work."""
        self._states = self._read()

    def problem(self) -> str | None:
        """Say what another program has done to the files since `record`, or None."""
        now = self._read()
        if now == self._states:
            return None
        for path, before, after in zip(self._files, self._states, now, strict=True):
            if before == after or before is None:
                continue
            if after is None:
                return f"{path} was deleted while portd uses it"
            if after[:2] != before[:2]:
                return f"{path} was replaced while portd uses it"
            if after.size < before.size:
                return f"{path} was truncated while portd uses it"
            return f"{path} was changed by another program while portd uses it"
        return None

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the sizes of the database and its log in bytes, as of the last `record`."""
        database, log = self._states
        return (database.size if database else 0, log.size if log else 0)

    def _read(self) -> tuple[FileState | None, FileState | None]:
        database, log = (_state(path) for path in self._files)
        return database, log


def _state(path: Path) -> FileState | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
