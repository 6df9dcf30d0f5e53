"""A deterministic simulator of several hosts on a model of etcd: every order of messages, losses, crashes and waits
comes from a seed. `python -m tests.simulation.test_cluster STEPS [SEED]` runs more of it."""

from __future__ import annotations

import random
import sys
from collections import deque

import pytest
from msgspec.structs import replace

from portd.cluster.entries import FENCES, HOSTS, SERVICES, HostEntry, fence_key, host_key
from portd.cluster.publisher import Batch, Publisher
from portd.cluster.view import Position, View
from portd.core.model import Lease, Owner

TTL_S = 10.0
BOUND_S = 4.0
"""Seconds within which a connected host has heard of a change: a heartbeat, the debounce and a delayed message."""
SERVICE_NAMES = ("orders", "cart", "mail")


def lease(host: str, number: int, service: str, **fields: object) -> Lease:
    base = Lease(
        id=f"{host}-{number}",
        service=service,
        instance=f"{service}-{number}",
        endpoint="main",
        protocol="tcp",
        address="0.0.0.0",
        port=20000 + number,
        pool="default",
        hold="shared",
        state="bound",
        lifetime="process",
        owner=Owner(known_by="socket"),
        host=host,
        created_at=1.0,
    )
    return replace(base, **fields)


class Etcd:
    """A model of etcd: keys with leases, one revision a transaction, history that compaction cuts, and its fence."""

    def __init__(self) -> None:
        self.cluster_id = 1
        self.next_lease = 100
        self.reset()

    def reset(self) -> None:
        self.revision, self.compacted = 1, 0
        self.keys: dict[str, tuple[bytes, int]] = {}
        self.written_at: dict[str, int] = {}
        self.history: list[tuple[int, str, bytes | None]] = []
        self.leases: dict[int, float] = {}

    @property
    def position(self) -> Position:
        return Position(self.cluster_id, self.revision)

    def grant(self, now: float) -> int:
        self.next_lease += 1
        self.leases[self.next_lease] = now + TTL_S
        return self.next_lease

    def keep_alive(self, lease_id: int, now: float) -> bool:
        if lease_id in self.leases:
            self.leases[lease_id] = now + TTL_S
        return lease_id in self.leases

    def write(self, changes, lease_id: int) -> None:
        self.revision += 1
        for key, value in changes:
            if value is None and self.keys.pop(key, None) is None:
                continue
            if value is not None:
                self.keys[key] = (value, lease_id)
                self.written_at[key] = self.revision
            self.history.append((self.revision, key, value))

    def fence(self, host: str) -> tuple[int, int]:
        """Return the revision and the lease of a host's fence key; zeros where there is none."""
        key = fence_key(host)
        return (self.written_at[key], self.keys[key][1]) if key in self.keys else (0, 0)

    def commit(self, batch: Batch, host: str) -> bool:
        """Apply a fenced batch; False where the fence key was written by somebody else since."""
        if batch.lease_id not in self.leases or self.fence(host)[0] != batch.fence:
            return False
        self.write([*batch.changes, (fence_key(host), b"")], batch.lease_id)
        return True

    def expire(self, now: float) -> None:
        for lease_id in [one for one, until in self.leases.items() if until <= now]:
            del self.leases[lease_id]
            self.write([(key, None) for key, (_, owner) in list(self.keys.items()) if owner == lease_id], 0)

    def since(self, revision: int) -> list[tuple[int, str, bytes | None]]:
        """Return the history from a revision on, oldest first."""
        found = []
        for entry in reversed(self.history):
            if entry[0] < revision:
                break
            found.append(entry)
        return found[::-1]

    def under(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, (value, _) in self.keys.items() if key.startswith(prefix)}


class Host:
    """A host: the pure publisher and view, and the simplest session between them and the model."""

    def __init__(self, name: str, machine: str, etcd: Etcd, rng: random.Random) -> None:
        self.name, self.machine, self.etcd, self.rng = name, machine, etcd, rng
        self.leases: dict[int, Lease] = {}
        self.is_running = True
        self.is_connected = True
        self.disturbed_at = 0.0
        self.was_away = False
        self.watching: dict[str, int] = {}
        self.delayed: deque[Batch] = deque()
        self.boot()

    def boot(self) -> None:
        self.publisher = Publisher(self.name, HostEntry(machine=self.machine), ("10.0.0.1",))
        self.view = View(self.name, TTL_S, "all")
        self.watching = {}
        for one in self.leases.values():
            self.publisher.observe(one, 0.0)

    @property
    def is_active(self) -> bool:
        return self.is_running and self.is_connected

    def heartbeat(self, now: float) -> None:
        """Keep the cluster lease, or take one and claim the name; then watch, from where the view is."""
        etcd, publisher = self.etcd, self.publisher
        is_other_past = self.view.is_other_past(etcd.position)
        if publisher.lease_id is not None and not etcd.keep_alive(publisher.lease_id, now):
            publisher.lease_lost()
            is_other_past = True
        if publisher.lease_id is None:
            is_other_past |= self.was_away and self.view.position is not None
            self.claim(now)
        self.was_away = False
        if is_other_past:
            self.view.forget_revisions()
            self.watching = {}
        for prefix in self.view.unsynced:
            self.view.resync(prefix, etcd.under(prefix), etcd.position, now, is_other_past=is_other_past)
        self.watching = {prefix: self.watching.get(prefix, at) for prefix, at in self.view.next_revisions.items()}
        self.view.hear(etcd.position, now)

    def claim(self, now: float) -> None:
        etcd, key = self.etcd, host_key(self.name)
        holder = etcd.keys.get(key)
        if holder is not None and not self.publisher.may_adopt(holder[0]):
            self.publisher.refused(holder[0])
            return
        lease_id = etcd.grant(now) if holder is None else holder[1]
        etcd.keep_alive(lease_id, now)
        written = [one for one, (_, owner) in etcd.keys.items() if owner == lease_id]
        etcd.write([(key, self.publisher.claim()), (fence_key(self.name), b"")], lease_id)
        self.publisher.claimed(lease_id, etcd.revision, written, now)

    def publish(self, now: float) -> None:
        """Write a batch; the request or its answer may be lost, or arrive much later."""
        if self.publisher.lease_id is not None and self.publisher.fence is None:
            fence, lease_id = self.etcd.fence(self.name)
            if lease_id == self.publisher.lease_id:
                self.publisher.verified(fence)
            else:
                self.publisher.lease_lost()
        batch = self.publisher.next_batch(now)
        if batch is None:
            return
        fate = self.rng.random()
        if fate < 0.05:
            self.publisher.failed(batch, now)
        elif fate < 0.1:
            self.delayed.append(batch)
            self.publisher.failed(batch, now)
        elif not self.etcd.commit(batch, self.name) or fate < 0.15:
            self.publisher.failed(batch, now)
        else:
            self.publisher.committed(batch, self.etcd.revision)

    def listen(self, now: float) -> None:
        """Receive the changes of every watch, in order, some at a time."""
        for prefix, next_revision in list(self.watching.items()):
            if next_revision <= self.etcd.compacted:
                self.view.forget_revisions()
                self.watching = {}
                return
            until = self.etcd.revision if self.rng.random() < 0.8 else min(self.etcd.revision, next_revision)
            news = [(at, key, value) for at, key, value in self.etcd.since(next_revision) if at <= until]
            by_revision: dict[int, list] = {}
            for at, key, value in news:
                if key.startswith(prefix):
                    by_revision.setdefault(at, []).append((key, value))
            for at, changes in by_revision.items():
                self.view.apply(prefix, changes, at, now)
            self.watching[prefix] = max(next_revision, until + 1)


class Simulation:
    """Steps of a random world, and the invariants of the cluster."""

    def __init__(self, seed: int, host_count: int = 6) -> None:
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.etcd = Etcd()
        self.is_etcd_up = True
        self.hosts = [Host(f"host-{n}", f"machine-{n}", self.etcd, self.rng) for n in range(host_count)]
        self.hosts.append(Host("host-0", "impostor", self.etcd, self.rng))
        self.changed_at: dict[str, float] = {}
        self.disturbed_at = 0.0

    def run(self, steps: int) -> None:
        for step in range(steps):
            self.step()
            if step % 50 == 0:
                self.check()
            if step % 2000 == 1999:
                self.calm()

    def step(self) -> None:
        rng = self.rng
        self.now += rng.random() * 0.4
        host = rng.choice(self.hosts)
        action = rng.random()
        if action < 0.25:
            self.change(host)
        elif action < 0.26:
            self.disturb(host)
        elif action < 0.262:
            self.disturb_etcd()
        self.tick()

    def tick(self) -> None:
        """Let every host that runs and reaches etcd do what is due; its timers are well within the bound."""
        if not self.is_etcd_up:
            return
        self.etcd.expire(self.now)
        for host in self.hosts:
            if host.is_active and self.rng.random() < 0.7:
                host.heartbeat(self.now)
                host.publish(self.now)
                host.listen(self.now)
            if host.delayed and self.rng.random() < 0.2:
                self.deliver_late(host)
            host.view.review(self.now)

    def deliver_late(self, host: Host) -> None:
        """Deliver a batch that its sender gave up on: nothing applies that is older than what was written since."""
        batch = host.delayed.popleft()
        fence, lease_id = self.etcd.fence(host.name)
        applied = self.etcd.commit(batch, host.name)
        assert applied == (fence == batch.fence), "the fence does not hold"
        assert not applied or lease_id == batch.lease_id, "a zombie's write is applied"

    def change(self, host: Host) -> None:
        if not host.is_running:
            return
        number = self.rng.randrange(20)
        one = host.leases.pop(number, None)
        if one is None or self.rng.random() < 0.6:
            one = one or lease(host.name, number, self.rng.choice(SERVICE_NAMES))
            one = replace(one, health=self.rng.choice(("passing", "critical")), drain=self.rng.random() < 0.2)
            host.leases[number] = one
        else:
            one = replace(one, state="ended")
        self.changed_at[f"{host.machine}/{number}"] = self.now
        host.publisher.observe(one, self.now)

    def disturb(self, host: Host) -> None:
        kind = self.rng.choice(("suspend", "kill", "partition", "back", "back", "reconnect"))
        if kind == "back":
            if not host.is_running:
                host.is_running = True
                if self.rng.random() < 0.5:
                    host.boot()
            host.is_connected = True
        elif kind == "reconnect":
            host.watching = {}
        elif kind == "partition":
            host.is_connected = False
        else:
            host.is_running = False
            if kind == "kill":
                host.boot()
        host.disturbed_at = self.now
        host.was_away = True

    def disturb_etcd(self) -> None:
        kind = self.rng.choice(("compact", "compact", "away", "wipe"))
        self.disturbed_at = self.now
        if kind == "compact":
            self.etcd.compacted = self.etcd.revision - self.rng.randrange(5)
            self.etcd.history = [one for one in self.etcd.history if one[0] > self.etcd.compacted]
        elif kind == "away":
            self.now += self.rng.choice((1.0, 3600.0))
            for lease_id in self.etcd.leases:  # they start a full ttl again with etcd
                self.etcd.leases[lease_id] = self.now + TTL_S
            for host in self.hosts:
                host.disturbed_at = self.now
        else:
            before = {id(host): {one.id for one in host.view.leases()} for host in self.hosts}
            self.etcd.reset()
            self.etcd.cluster_id += self.rng.randrange(2)
            for host in self.hosts:
                host.disturbed_at = self.now
                if host.is_active:
                    host.heartbeat(self.now)
                    lost = before[id(host)] - {one.id for one in host.view.leases()}
                    assert not lost, f"a wiped etcd emptied the view of {host.name}"

    # --- invariants ---

    def check(self) -> None:
        """Compare every undisturbed host's view with what undisturbed hosts have, and with what dead ones had."""
        for viewer in self.hosts:
            if not viewer.is_active or self.now - max(viewer.disturbed_at, self.disturbed_at) < TTL_S + BOUND_S:
                continue
            shown = {(one.host, one.id): one for one in viewer.view.leases()}
            for other in self.hosts:
                if other.name == viewer.name or self.now - other.disturbed_at < TTL_S + BOUND_S:
                    continue
                if not other.is_active:
                    if other.name == "host-0":
                        continue  # two share the name: the other one may have it
                    assert not any(name == other.name for name, _ in shown), f"{other.name} is dead and shown"
                elif other.publisher.state == "claimed" and other.name != "host-0":
                    self.check_shown(other, shown)

    def check_shown(self, other: Host, shown: dict[tuple[str, str], Lease]) -> None:
        for number, one in other.leases.items():
            if self.now - self.changed_at[f"{other.machine}/{number}"] > BOUND_S + TTL_S:
                seen = shown.get((other.name, one.id))
                assert seen is not None, f"{one.id} of a live host is missing"
                assert (seen.health, seen.drain) == (one.health, one.drain), f"{one.id} is shown as it was"

    def calm(self) -> None:
        """Let everything settle: all views are then equal to what the claimed hosts have."""
        for host in self.hosts:
            host.is_running = host.is_connected = True
            host.disturbed_at = self.now
        for _ in range(150):
            self.now += 0.2
            self.tick()
        holders = {host.name: host for host in self.hosts if host.publisher.state == "claimed"}
        assert len(holders) == len({host.name for host in self.hosts}), "a name is claimed by nobody"
        claimed = [host for host in self.hosts if host.publisher.state == "claimed"]
        assert len(claimed) == len(holders), "a name is claimed by two"
        for viewer in self.hosts:
            wanted = {
                (host.name, one.id, one.health, one.drain)
                for host in claimed
                if host.name != viewer.name
                for one in host.leases.values()
            }
            shown = {(one.host, one.id, one.health, one.drain) for one in viewer.view.leases()}
            assert shown == wanted, f"{viewer.name} shows {shown ^ wanted}"
            assert set(viewer.view.hosts) == set(holders) - {viewer.name}
        for key, (_, lease_id) in self.etcd.keys.items():
            assert lease_id in self.etcd.leases, f"{key} belongs to no live lease"
            assert key.startswith((FENCES, HOSTS, SERVICES))


@pytest.mark.parametrize("seed", range(10))
def test_views_follow_hosts_through_every_failure(seed):
    Simulation(seed).run(10_000)


if __name__ == "__main__":
    steps, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    Simulation(seed).run(steps)
    print(f"{steps} steps of seed {seed}: every invariant held")
