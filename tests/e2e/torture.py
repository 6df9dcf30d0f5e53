"""`kill -9` and power cuts under load: what was acknowledged is there afterwards, and nothing is there twice.

A power cut is played on a file system of its own (ext4 on a loop device): the daemon is stopped, and goes on from a
copy of the device, which lacks everything that was not synced. With `durability = "fast"` that loses leases: the
control that shows that the run can see a loss. A follower watches all the time: its replay must equal the listing.

`python -m tests.e2e.torture 500` runs it at length and prints what it counted; `… 50 fast` is the control.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.harness import NOBODY, Daemon, Reply, Stream, is_bindable, unique, wait_for
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
        self.moving: dict[str, Any] = {}
        """Leases with a change under way: they are there, as they were or as they were to be."""
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
        choice = self._random.random()
        if self.held and choice < 0.25:
            self._change(connection, self._random.choice(sorted(self.held)))
            return
        if self.held and choice < 0.6:
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
        request: dict[str, Any] = {"service": f"s{self._random.randrange(5)}"}
        if self._random.random() < 0.3:
            request["ttl"] = 3600
        reply = connection.call("POST", "/v1/leases", request if count == 1 else [request] * count)
        if reply.status == 201:
            for lease in reply.body if count > 1 else [reply.body]:
                self.held[lease["id"]] = lease
        else:
            self.refused.append(reply)

    def _change(self, connection: Any, lease_id: str) -> None:
        """Renew, drain, decline or change a lease; until that is answered it is `moving`."""
        method, path, body = self._random.choice(
            (
                ("POST", "/drain", {"drain": self._random.random() < 0.5}),
                ("POST", "/decline", None),
                ("POST", "/renew", {"seconds": 3000}),
                ("PATCH", "", {"tags": [f"t{self._random.randrange(9)}"]}),
            )
        )
        lease = self.held.pop(lease_id)
        self.moving[lease_id] = lease
        reply = connection.call(method, f"/v1/leases/{lease_id}{path}", body)
        if reply.status == 200:
            lease = {**lease, **reply.body}
        elif reply.code not in ("no_clock", "pool_exhausted"):
            self.refused.append(reply)
        del self.moving[lease_id]
        self.held[lease_id] = lease


class Follower(threading.Thread):
    """Follows every event, over restarts too; `view` is what their replay makes of the listing (id to revision)."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon=True)
        self._daemon = daemon
        self.view: dict[str, int] = {}
        self.revision = 0
        self.gone_count = 0
        self.wrong: list[str] = []
        self._is_done = False

    def run(self) -> None:
        """Follow until `stop`; a stream that ends is resumed, one that is gone begins with a listing."""
        self._list()
        while not self._is_done:
            try:
                self._follow()
            except (OSError, http.client.HTTPException, ValueError, AssertionError):
                continue  # the daemon is away

    def stop(self) -> None:
        """End after the next event."""
        self._is_done = True

    def _follow(self) -> None:
        with Stream(self._daemon, timeout_s=2.0, Last_Event_ID=str(self.revision)) as stream:
            if stream.status == 410:
                self.gone_count += 1
                self._list()
                return
            for event in stream:
                if event.id <= self.revision:
                    self.wrong.append(f"event {event.id} after {self.revision}")
                lease_id = event.data["lease"]["id"]
                if event.type == "ended":
                    self.view.pop(lease_id, None)
                else:
                    self.view[lease_id] = event.id
                self.revision = event.id

    def _list(self) -> None:
        while not self._is_done:
            try:
                reply = self._daemon.call("GET", "/v1/leases?limit=10000")
            except OSError:
                continue
            self.view = {lease["id"]: lease["revision"] for lease in reply.body["leases"]}
            self.revision = reply.revision
            return


class PowerCuts:
    """An ext4 file system on a loop device whose power can be cut."""

    def __init__(self, directory: Path) -> None:
        self._image, self.mount = directory / "image", directory / "disk"
        self.mount.mkdir()
        _run("truncate", "-s", "64M", str(self._image))
        _run("mkfs.ext4", "-q", str(self._image))
        self._attach()

    def cut(self, daemon: Daemon) -> None:
        """Stop the daemon in the middle of what it does, and give it back a disk without what was not synced."""
        os.kill(daemon.pid, signal.SIGSTOP)
        wait_for(lambda: _state(daemon.pid) == "T", "it is stopped")
        _run("cp", "--sparse=always", str(self._image), f"{self._image}.cut")
        daemon.kill()
        self.detach()
        Path(f"{self._image}.cut").rename(self._image)
        self._attach()

    def detach(self) -> None:
        """Unmount."""
        _run("umount", str(self.mount))

    def _attach(self) -> None:
        # The kernel writes back what nobody synced only after five minutes.
        _run("mount", "-o", "loop,commit=300", str(self._image), str(self.mount))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def power_cuts(directory: Path) -> Iterator[PowerCuts]:
    """Make a disk whose power can be cut; raises AssertionError where there are no loop devices."""
    cuts = PowerCuts(directory)
    try:
        yield cuts
    finally:
        cuts.detach()


def torture(
    rounds: int, directory: Path | None = None, *, cuts: PowerCuts | None = None, durability: str = "full"
) -> dict[str, int]:
    """Kill the daemon `rounds` times under load, and return counts: `lost`, `doubled` and `risen` should be 0.

    `lost`: acknowledged leases that are gone or changed; `doubled`: ports that two leases or a lease and a foreign
    process could have; `risen`: releases that were acknowledged and undone; `rewound`: revisions that did not grow;
    `misled`: moments at which a follower's replay was not the listing. With `cuts` every other end is a power cut.
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as made:
            return torture(rounds, Path(made), cuts=cuts, durability=durability)
    chance = random.Random(SEED)
    counts: Counter[str] = Counter(
        granted=0, released=0, unanswered=0, lost=0, doubled=0, risen=0, rewound=0, misled=0, power_cuts=0
    )
    held: list[dict[str, Any]] = [{} for _ in range(CONNECTIONS)]
    revision = 0
    with Daemon(directory, port_count=1000) as daemon, Puppet(daemon, uid=NOBODY) as nobody:
        if cuts is not None:
            daemon.store = cuts.mount / "portd.db"
        daemon.configure("", path=f'"{daemon.store}"\ndurability = "{durability}"')
        daemon.start()
        follower = Follower(daemon)
        follower.start()
        for number in range(rounds):
            workers = [Worker(daemon, chance.getrandbits(32), mine) for mine in held]
            before = set().union(*held)
            for worker in workers:
                worker.start()
            for _ in range(chance.randrange(1, 120)):  # a random moment, counted in answers
                workers[chance.randrange(CONNECTIONS)].answered.acquire(timeout=5)
            if cuts is not None and number % 2:
                cuts.cut(daemon)
                counts["power_cuts"] += 1
            else:
                daemon.kill()
            for worker in workers:
                worker.join()
                assert not worker.refused, worker.refused
            daemon.start()
            revision = _judge(daemon, workers, before, revision, counts)
            held = [_found(daemon, worker) for worker in workers]
            _tidy(daemon, nobody, held, chance)
            counts["misled"] += not _is_right(daemon, follower)
        follower.stop()
        counts["gone"] = follower.gone_count
        counts["misled"] += len(follower.wrong)
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
        known |= worker.moving.keys()
        counts["lost"] += len(worker.moving.keys() - live.keys())
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


def _found(daemon: Daemon, worker: Worker) -> dict[str, Any]:
    """Return the leases that the worker has, as they are now, with their tokens."""
    live, mine = daemon.leases(), {**worker.held, **worker.moving}
    return {lease_id: {**lease, **live[lease_id]} for lease_id, lease in mine.items() if lease_id in live}


def _is_right(daemon: Daemon, follower: Follower) -> bool:
    """Return whether the follower's replay comes to equal the listing."""

    def compare() -> bool:
        reply = daemon.call("GET", "/v1/leases?limit=10000")
        listed = {lease["id"]: lease["revision"] for lease in reply.body["leases"]}
        return follower.revision >= reply.revision and follower.view == listed

    try:
        return wait_for(compare, "the follower's view is the listing", 5.0)
    except AssertionError:
        return False


def _tidy(daemon: Daemon, nobody: Puppet, held: list[dict[str, Any]], chance: random.Random) -> None:
    """Keep the pool from filling: release what was granted and not answered, and some of the rest as another user, by
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
    with tempfile.TemporaryDirectory() as place, power_cuts(Path(place)) as disk:
        how = sys.argv[2] if len(sys.argv) > 2 else "full"
        print(json.dumps(torture(int(sys.argv[1]) if len(sys.argv) > 1 else 25, cuts=disk, durability=how)))
