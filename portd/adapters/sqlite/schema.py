"""The shape of the database, its numbered migrations, and the judgement whether a file may be touched at all.

A file that is damaged, newer than this portd, or not portd's is left exactly as it is. The judgement reads the header
by itself and opens the file read-only, before anything could write to it.
"""

from __future__ import annotations

import sqlite3
import struct
from pathlib import Path
from typing import Final

from portd.core.errors import StoreDamaged

APPLICATION_ID: Final = 0x706F7274
""""port", in the header at byte 68 (https://www.sqlite.org/fileformat.html, section 1.3)."""
CHECK_MAX_BYTES: Final = 64 << 20
"""A larger file is not checked page by page at the start: that would cost seconds."""

MIGRATIONS: Final[tuple[str, ...]] = (
    # 1: leases (live and remembered) and the newest events
    """
    CREATE TABLE leases (
        id TEXT PRIMARY KEY,
        service TEXT NOT NULL,
        port INTEGER NOT NULL,
        protocol TEXT NOT NULL,
        live INTEGER NOT NULL,
        created_at REAL NOT NULL,
        ended_at REAL,
        body BLOB NOT NULL
    ) STRICT;
    CREATE INDEX leases_live ON leases (id) WHERE live = 1;
    CREATE INDEX leases_by_port ON leases (port, created_at);
    CREATE INDEX leases_ended ON leases (ended_at) WHERE live = 0;
    CREATE TABLE events (
        revision INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        type TEXT NOT NULL,
        body BLOB NOT NULL
    ) STRICT;
    """,
)
VERSION: Final = len(MIGRATIONS)
_MAGIC = b"SQLite format 3\0"


def judge(path: Path) -> None:
    """Raise StoreDamaged unless the file is new, or a sound database of portd's that this version understands."""
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreDamaged(f"{path} can't be read: {error.strerror}; nothing was changed") from error
    if not header:
        return  # created, and never written: a start that was cut short
    if len(header) < 100 or not header.startswith(_MAGIC):
        raise _damaged(path, "is not a SQLite database")
    version, = struct.unpack_from(">I", header, 60)
    application, = struct.unpack_from(">I", header, 68)
    if application not in (0, APPLICATION_ID) or (application == 0 and version):
        raise _damaged(path, "belongs to another program")
    if version > VERSION:
        raise StoreDamaged(f"{path} was written by a newer portd (schema {version}, this one knows {VERSION}): upgrade "
                           "portd, or start with another [store] path; nothing was changed")
    if path.stat().st_size <= CHECK_MAX_BYTES:
        _check(path)


def _check(path: Path) -> None:
    try:
        database = sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)
        try:
            (verdict,), = database.execute("PRAGMA quick_check(1)").fetchall()
        finally:
            database.close()
    except sqlite3.OperationalError as error:
        if "malformed" in str(error) or "not a database" in str(error):
            raise _damaged(path, f"is damaged ({error})") from error
        return  # it can't be opened for reading alone (a read-only directory): the real opening says why
    except sqlite3.DatabaseError as error:
        raise _damaged(path, f"is damaged ({error})") from error
    if verdict != "ok":
        raise _damaged(path, f"is damaged ({verdict})")


def migrate(database: sqlite3.Connection) -> None:
    """Bring an open database to the newest schema, in one transaction a step. Raises sqlite3.Error."""
    version, = database.execute("PRAGMA user_version").fetchone()
    for number in range(version + 1, VERSION + 1):
        database.executescript(f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; {MIGRATIONS[number - 1]} "
                               f"PRAGMA user_version = {number}; COMMIT;")


def _damaged(path: Path, what: str) -> StoreDamaged:
    return StoreDamaged(f"{path} {what}; nothing was changed. Move it aside to start with an empty store (running "
                        f"services must lease again), or restore a copy: mv {path} {path}.damaged")


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
