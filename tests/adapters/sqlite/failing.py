"""A process whose disk fails: run by test_sqlite_failures.py, one scenario a process. Exits with 0 when all held."""

from __future__ import annotations

import errno
import os
import struct
import sys
import traceback
from pathlib import Path

import pytest
import uvloop

from portd.adapters.sqlite.schema import wal_of
from portd.adapters.sqlite.store import SqliteStore
from portd.core.errors import StoreLost, StoreUnavailable
from tests.adapters.sqlite.nouns import granted


class Faults:
    """What the disk answers from now on; 0 lets it work."""

    def __init__(self, file: str) -> None:
        self._file = os.open(file, os.O_RDWR)

    def set(self, *, write: int = 0, sync: int = 0) -> None:
        os.pwrite(self._file, struct.pack("=ii", write, sync), 0)


async def writes_refused(path: Path, faults: Faults) -> None:
    store = await SqliteStore.open(path, "full")
    await store.load()
    await store.commit(granted([1]))
    for number in (errno.EROFS, errno.EDQUOT, errno.EIO, errno.ENOSPC):
        faults.set(write=number)
        with pytest.raises(StoreUnavailable, match="the disk"):
            await store.commit(granted([2, 3]))
        assert store.condition()["problem"].startswith("the disk")
        assert await store.lease("lease-000001") is not None, "reads go on"
        assert await store.lease("lease-000002") is None
        # Nor does a crash now bring back what was refused.
        await check_copy(path, ["lease-000001"], faults)
    faults.set()
    await store.commit(granted([2, 3]))
    assert store.condition()["problem"] is None
    assert len((await store.load()).live) == 3
    await store.close()


async def check_copy(path: Path, live: list[str], faults: Faults) -> None:
    """Open what a crash at this moment would leave."""
    copy = path.parent.parent / "copy" / path.name
    copy.parent.mkdir(exist_ok=True)
    for file in (path, wal_of(path)):
        (copy.parent / file.name).write_bytes(file.read_bytes())
    store = await SqliteStore.open(copy, "full")
    assert [lease.id for lease in (await store.load()).live] == live
    await store.close()


async def sync_failed(path: Path, faults: Faults) -> None:
    store = await SqliteStore.open(path, "full")
    await store.load()
    await store.commit(granted([1]))
    faults.set(sync=errno.EIO)
    with pytest.raises(StoreLost, match="not known"):
        await store.commit(granted([2]))
    faults.set()  # the disk works again, but what it has can't be trusted before it is read anew
    before = path.read_bytes(), wal_of(path).read_bytes()
    for refused in (
        store.commit(granted([3])),
        store.lease("lease-000001"),
        store.load(),
        store.history(20001),
        store.prune(2e9, 0),
    ):
        with pytest.raises(StoreLost):
            await refused
    assert "SQLITE_IOERR" in store.condition()["problem"]
    await store.close()
    assert (path.read_bytes(), wal_of(path).read_bytes()) == before
    store = await SqliteStore.open(path, "full")  # starting over from the disk
    assert {lease.id for lease in (await store.load()).live} >= {"lease-000001"}
    await store.commit(granted([3]))
    await store.close()


async def checkpoint_failed(path: Path, faults: Faults) -> None:
    store = await SqliteStore.open(path, "fast")
    await store.load()
    await store.commit(granted(range(1, 200)))
    faults.set(sync=errno.EIO)
    await store._writing.run(store._writer.checkpoint)
    assert "the checkpoint of the log failed" in store.condition()["problem"]
    assert len((await store.load()).live) == 199
    await store.commit(granted([200]))  # the log still takes commits
    faults.set()
    await store._writing.run(store._writer.checkpoint)
    assert store.condition()["problem"] is None
    await store.close()
    assert wal_of(path).stat().st_size == 0
    assert len(path.read_bytes()) > 199 * 500


if __name__ == "__main__":
    scenario = {"writes_refused": writes_refused, "sync_failed": sync_failed, "checkpoint_failed": checkpoint_failed}
    try:
        uvloop.run(scenario[sys.argv[1]](Path(sys.argv[2]), Faults(sys.argv[3])))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the threads of a store that was not closed would keep the process
