"""`kill -9` at any moment, again and again: what was acknowledged is there afterwards, and nothing is there twice.

`python -m tests.e2e.torture 500` runs it at length and prints what it counted.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from tests.e2e.harness import NOBODY, Daemon, Reply, is_bindable, unique
from tests.e2e.puppet import Puppet

CONNECTIONS = 6
SEED = 20_240


class Worker(threading.Thread):
    """One connection that leases and releases until the daemon is gone; it remembers what was acknowledged."""

    def __init__(self, daemon: Daemon, seed: int, mine: dict[str, Any]) -> None:
        super().__init__()
        self._daemon = daemon
        self._random = random.Random(seed)
        self.held = dict(mine)
        self.released: dict[str, Any] = {}
        self.unsure: dict[str, Any] = {}
        """Leases whose release was asked for and not acknowledged: either answer is right."""
        self.refused: list[Reply] = []
        self.answered = threading.Semaphore(0)

    def run(self) -> None:
        """Work until the connection breaks."""
        connection = self._daemon.connect(self._random.choice(("unix", "tcp")))
        try:
            while True:
                self._step(connection)
                self.answered.release()
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            return  # the daemon is gone, in the middle of something
        finally:
            self.answered.release()
            connection.close()

    def _step(self, connection: Any) -> None:
        if self.held and self._random.random() < 0.5:
            lease_id = self._random.choice(sorted(self.held))
            self.unsure[lease_id] = lease = self.held.pop(lease_id)
            reply = connection.call("DELETE", f"/v1/leases/{lease_id}")
            if reply.status == 204:
                self.released[lease_id] = self.unsure.pop(lease_id)
            else:
                self.refused.append(reply)
                self.held[lease_id] = lease
            return
        count = self._random.choice((1, 1, 1, 3))
        wish: dict[str, Any] = {"service": f"s{self._random.randrange(5)}"}
        if self._random.random() < 0.3:
            wish["ttl"] = 3600
        reply = connection.call("POST", "/v1/leases", wish if count == 1 else [wish] * count)
        if reply.status == 201:
            for lease in reply.body if count > 1 else [reply.body]:
                self.held[lease["id"]] = lease
        else:
            self.refused.append(reply)


def torture(rounds: int, directory: Path | None = None) -> dict[str, int]:
    """Kill the daemon `rounds` times under load, and return counts: `lost`, `doubled` and `risen` should be 0.

    `lost`: acknowledged leases that are gone or changed; `doubled`: ports that two leases or a lease and a foreign process
    could have; `risen`: releases that were acknowledged and undone; `rewound`: revisions that did not grow.
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as made:
            return torture(rounds, Path(made))
    chance = random.Random(SEED)
    counts: Counter[str] = Counter(granted=0, released=0, unanswered=0, lost=0, doubled=0, risen=0, rewound=0)
    held: list[dict[str, Any]] = [{} for _ in range(CONNECTIONS)]
    revision = 0
    with Daemon(directory, port_count=1000) as daemon, Puppet(daemon, uid=NOBODY) as nobody:
        daemon.start()
        for _ in range(rounds):
            workers = [Worker(daemon, chance.getrandbits(32), mine) for mine in held]
            before = set().union(*held)
            for worker in workers:
                worker.start()
            for _ in range(chance.randrange(1, 120)):  # a random moment, counted in answers
                workers[chance.randrange(CONNECTIONS)].answered.acquire(timeout=5)
            daemon.kill()
            for worker in workers:
                worker.join()
                assert not worker.refused, worker.refused
            daemon.start()
            revision = _judge(daemon, workers, before, revision, counts)
            held = [dict(worker.held) for worker in workers]
            _tidy(daemon, nobody, held, chance)
        daemon.check_log()
    return {"rounds": rounds, **counts}


def _judge(daemon: Daemon, workers: list[Worker], before: set[str], revision: int, counts: Counter[str]) -> int:
    """Compare what is there with what was acknowledged."""
    live = daemon.leases()
    known: set[str] = set()
    for worker in workers:
        for lease_id, lease in worker.held.items():
            known.add(lease_id)
            same = live.get(lease_id)
            counts["lost"] += same is None or any(
                same[name] != lease[name] for name in ("port", "service", "instance", "address", "lifetime")
            )
            counts["granted"] += lease_id not in before
        for lease_id in worker.released:
            counts["risen"] += lease_id in live
        counts["released"] += len(worker.released)
        known |= worker.unsure.keys()
    counts["unanswered"] += len(live.keys() - known)
    counts["doubled"] += not unique((lease["address"], lease["port"]) for lease in live.values())
    counts["doubled"] += not unique((lease["service"], lease["instance"]) for lease in live.values())
    counts["doubled"] += sum(is_bindable(lease["port"]) for lease in live.values())
    now = daemon.call("GET", "/v1/leases?limit=1").revision
    newest = max((lease["revision"] for worker in workers for lease in worker.held.values()), default=0)
    counts["rewound"] += now <= max(revision, newest)
    return now


def _tidy(daemon: Daemon, nobody: Puppet, held: list[dict[str, Any]], chance: random.Random) -> None:
    """Keep the pool from filling: release what nobody was told of, and some of the rest as somebody else would, by
    tokens that must work."""
    with daemon.connect() as connection:
        for lease_id in daemon.leases().keys() - set().union(*held):
            assert connection.call("DELETE", f"/v1/leases/{lease_id}").status == 204
    for worker in held:
        for lease_id in [one for one in worker if len(worker) > 20 or chance.random() < 0.2]:
            token = worker.pop(lease_id)["token"]
            reply = nobody.call("DELETE", f"/v1/leases/{lease_id}", over="tcp", Authorization=f"Bearer {token}")
            assert reply.status == 204, reply


if __name__ == "__main__":
    print(json.dumps(torture(int(sys.argv[1]) if len(sys.argv) > 1 else 25)))
