"""A process that brings a database to the newest schema; run on a disk by test_sqlite_migrations.py."""

from __future__ import annotations

import sys
from pathlib import Path

from portd.adapters.sqlite.schema import prepare

if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
