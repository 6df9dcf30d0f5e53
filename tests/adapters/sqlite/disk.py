"""A disk to test on: it fails on request, and remembers what was synced, so that a power cut can be played through.

`disk.c` stands between a process and its files; what it wrote down is replayed here into what the disk would have held.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
SECTOR = 512
_ENTRY = struct.Struct("=IIQQ")


class Entry(NamedTuple):
    """One thing that the disk was asked: W(rite), T(runcate) or S(ync)."""

    kind: str
    name: str
    offset: int
    data: bytes


class Disk:
    """Builds the shim once, and starts processes on it."""

    def __init__(self, place: Path) -> None:
        self._library = place / "disk.so"
        source = Path(__file__).with_name("disk.c")
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", self._library, source, "-ldl", "-pthread"], check=True)

    def start(
        self, script: str, *arguments: str, directory: Path, journal: Path | None = None, faults: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start one of the scripts beside this file with `directory` on the disk."""
        environment = os.environ | {
            "LD_PRELOAD": str(self._library),
            "DISK_DIR": str(directory),
            "PYTHONPATH": str(ROOT),
        }
        if journal is not None:
            environment["DISK_JOURNAL"] = str(journal)
        if faults is not None:
            faults.write_bytes(bytes(8))
            environment["DISK_FAULTS"] = str(faults)
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments],
            text=True,
            stdout=subprocess.PIPE,
            env=environment,
        )


def read_journal(journal: Path) -> Iterator[Entry]:
    """Read what the disk was asked, in order; an entry that a kill cut short is left out."""
    data = journal.read_bytes()
    at = 0
    while at + _ENTRY.size <= len(data):
        kind, name_size, offset, size = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        end = at + name_size + (size if kind == ord("W") else 0)
        if end > len(data):
            return
        yield Entry(chr(kind), data[at : at + name_size].decode(), offset, data[at + name_size : end])
        at = end


class Platters:
    """What the disk holds, and what only the cache has, file by file."""

    def __init__(self, directory: Path) -> None:
        self._synced = {
            path.name: bytearray(path.read_bytes())
            for path in directory.iterdir()
            if path.is_file() and not path.name.endswith("-shm")
        }
        self._cached: dict[str, list[Entry]] = {}

    def ask(self, entry: Entry) -> None:
        """Take an entry: writes stay in the cache until their file is synced."""
        if entry.kind == "S":
            for cached in self._cached.pop(entry.name, []):
                _apply(self._synced.setdefault(entry.name, bytearray()), cached)
        else:
            self._cached.setdefault(entry.name, []).append(entry)

    def cut_power(self, into: Path, chance: random.Random, kept: float) -> None:
        """Write what is left into a directory: all that was synced, and a share `kept` of the cached sectors, chosen
        one by one and in no order, since a disk writes its cache as it likes."""
        into.mkdir()
        for name in {*self._synced, *self._cached}:
            content = bytearray(self._synced.get(name, b""))
            for cached in self._cached.get(name, []):
                for piece in _sectors(cached):
                    if chance.random() < kept:
                        _apply(content, piece)
            (into / name).write_bytes(content)


def _sectors(entry: Entry) -> Iterator[Entry]:
    if entry.kind == "T":
        yield entry
        return
    start = 0
    while start < len(entry.data):
        end = start + SECTOR - (entry.offset + start) % SECTOR
        yield entry._replace(offset=entry.offset + start, data=entry.data[start:end])
        start = end


def _apply(content: bytearray, entry: Entry) -> None:
    if entry.kind == "T":
        del content[entry.offset :]
        return
    content.extend(bytes(max(0, entry.offset - len(content))))
    content[entry.offset : entry.offset + len(entry.data)] = entry.data
