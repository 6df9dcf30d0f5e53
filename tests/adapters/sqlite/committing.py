"""A process that commits batches until it is killed, or so many are done, and acknowledges each one's last revision."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvloop

from portd.adapters.sqlite.store import SqliteStore
from tests.adapters.sqlite.nouns import a_lease, an_event, ended


async def commit_until_killed(path: Path, durability: str, acknowledgements: str, batch_count: int) -> None:
    """Every third lease ends in the batch after its grant, so that what is there changes too."""
    store = await SqliteStore.open(path, durability)  # type: ignore[arg-type]
    loaded = await store.load()
    revision, number = loaded.revision, len(loaded.live) + len(loaded.remembered)
    output = os.open(acknowledgements, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    ending = loaded.live[:1]
    for batch in range(batch_count):
        events = []
        for lease in ending:
            revision += 1
            events.append(an_event(revision, ended(lease, 1_700_000_000.0 + revision), "ended"))
        ending = []
        for _ in range(1 + batch % 12):
            number, revision = number + 1, revision + 1
            events.append(an_event(revision, a_lease(number, port=20000 + number % 10000)))
            if number % 3 == 0:
                ending.append(events[-1].lease)
        await store.commit(events)
        os.write(output, b"%d\n" % revision)
    await store.close()


if __name__ == "__main__":
    uvloop.run(commit_until_killed(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))
