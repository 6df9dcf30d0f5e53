"""What this host publishes: a state machine between the leases of this host and the keys of its cluster lease.

Changes are debounced and written in batches. Every batch is fenced: it writes the host's fence key, and applies only if
nobody has written that key since the batch before. So nothing is applied that a suspended host sends after its lease
expired, nor a request that was given up and arrives late, behind a newer one. The host's name is claimed by comparison:
another machine's name is left alone. Time comes in as an argument (seconds of any steady clock). This module must not
know what keeps the keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from msgspec.structs import replace

from portd.cluster.entries import (
    Change,
    HostEntry,
    decode_host,
    encode_host,
    encode_lease,
    endpoint_key,
    host_key,
    split_key,
)
from portd.core.model import Lease

DEBOUNCE_S: Final = 0.1
"""Seconds that a change waits for others: a transaction of many costs every watcher a fifth of single puts."""
BATCH_MAX: Final = 98
"""Changes in a batch, the host's own entry and its fence apart: etcd accepts 128 operations in a transaction."""
BATCH_BYTES: Final = 512 << 10
"""Bytes of a batch's values: etcd refuses requests beyond 1.5 MiB, and its JSON gateway adds a third."""

State = Literal["waiting", "claimed", "refused"]
"""`waiting`: no cluster lease yet, or it was lost; `claimed`: the host's key is under it; `refused`: another machine
has the name."""


class Batch(NamedTuple):
    """Changes to write in one transaction under cluster lease `lease_id`, if the fence key was last written at revision
    `fence`; the transaction writes it too."""

    lease_id: int
    fence: int
    changes: tuple[Change, ...]


class Publisher:
    """What this host has to publish, and what of it is written. One batch is in flight at a time."""

    def __init__(self, host: str, about: HostEntry, advertise: Sequence[str] = ()) -> None:
        self.host = host
        self.advertise = tuple(advertise)
        self.state: State = "waiting"
        self.name_holder: HostEntry | None = None
        """Who has this host's name, while `state` is `refused`."""
        self.lease_id: int | None = None
        self.fence: int | None = None
        """The revision at which the fence key was last written; None while that is not known."""
        self._about = about
        self._counts: Counter[str] = Counter()  # instances by service
        self._endpoints: Counter[tuple[str, str]] = Counter()  # by (service, instance)
        self._wanted: dict[str, bytes] = {}
        self._written: dict[str, bytes | None] = {}  # None: there is a key, its value is not known
        self._dirty: dict[str, None] = {}  # in the order of first changes
        self._is_host_dirty = False
        self._dirty_since: float | None = None
        self._in_flight: Batch | None = None

    @property
    def key_count(self) -> int:
        """Return how many keys are to be published, the host's own one included."""
        return len(self._wanted) + 1

    @property
    def waiting_count(self) -> int:
        """Return how many changes are not written yet."""
        return len(self._dirty) + self._is_host_dirty

    @property
    def about(self) -> HostEntry:
        """Return this host's entry as it is now."""
        return replace(self._about, services=dict(sorted(self._counts.items())))

    def observe(self, lease: Lease, now: float) -> None:
        """Apply a lease of this host as it is now; an ended one is withdrawn."""
        key = endpoint_key(lease, self.host)
        value = None if lease.state == "ended" else encode_lease(lease, self.advertise)
        before = self._wanted.get(key)
        if value == before:
            return
        if value is None:
            del self._wanted[key]
            self._count(lease, -1)
        else:
            self._wanted[key] = value
            if before is None:
                self._count(lease, 1)
        self._mark([key], now)

    # --- the host's name ---

    def claim(self) -> bytes:
        """Return the value with which the host's key is claimed."""
        return encode_host(self.about)

    def may_adopt(self, holder: bytes) -> bool:
        """Return whether the host's key, which has this value, is this machine's own, of a run before."""
        entry = decode_host(holder)
        return entry is not None and entry.machine == self._about.machine

    def claimed(self, lease_id: int, fence: int, written_keys: Iterable[str], now: float) -> None:
        """Note that the host's key and its fence, written at revision `fence`, are under this cluster lease, and which
        other keys are (of a run before)."""
        self.state, self.lease_id, self.fence = "claimed", lease_id, fence
        self.name_holder, self._in_flight = None, None
        self._written = {key: None for key in written_keys if self._is_own(key)}
        self._dirty.clear()
        self._is_host_dirty = False
        self._dirty_since = None
        self._mark([*self._wanted, *(key for key in self._written if key not in self._wanted)], now - DEBOUNCE_S)

    def refused(self, holder: bytes) -> None:
        """Note that another machine has the host's name: nothing is published until a claim succeeds."""
        self._lose("refused")
        self.name_holder = decode_host(holder) or HostEntry(machine="")

    def lease_lost(self) -> None:
        """Note that the cluster lease is gone, and every key with it: it is to be taken anew."""
        self._lose("waiting")

    def verified(self, fence: int) -> None:
        """Note at which revision the fence key was last written, under the cluster lease, after a batch failed."""
        self.fence = fence

    def _lose(self, state: State) -> None:
        self.state, self.lease_id, self.fence, self._in_flight = state, None, None, None
        self._written.clear()

    # --- batches ---

    def due_at(self) -> float | None:
        """Return when the next batch is due; None while there is none to write."""
        if self.fence is None or self._in_flight is not None or self._dirty_since is None:
            return None
        return self._dirty_since + DEBOUNCE_S

    def next_batch(self, now: float) -> Batch | None:
        """Return the batch that is due, which is then in flight until `committed`, `failed` or a lost lease."""
        due_at = self.due_at()
        if due_at is None or now < due_at or self.lease_id is None or self.fence is None:
            return None
        changes: list[Change] = []
        size = 0
        for key in self._dirty:
            value = self._wanted.get(key)
            size += len(key) + len(value or b"")
            if len(changes) == BATCH_MAX or (changes and size > BATCH_BYTES):
                break
            changes.append(Change(key, value))
        for change in changes:
            del self._dirty[change.key]
        if self._is_host_dirty:
            changes.append(Change(host_key(self.host), encode_host(self.about)))
            self._is_host_dirty = False
        self._dirty_since = now - DEBOUNCE_S if self._dirty else None
        self._in_flight = Batch(self.lease_id, self.fence, tuple(changes))
        return self._in_flight

    def committed(self, batch: Batch, revision: int) -> None:
        """Note that a batch is written, at this revision."""
        if batch is not self._in_flight:
            return
        self._in_flight, self.fence = None, revision
        for key, value in batch.changes:
            if value is None:
                self._written.pop(key, None)
            else:
                self._written[key] = value

    def failed(self, batch: Batch, now: float) -> None:
        """Note that nobody knows whether a batch is written: its keys are written again, as they are by then, after
        `verified`."""
        if batch is not self._in_flight:
            return
        self._in_flight, self.fence = None, None
        for key, value in batch.changes:
            if value is not None:
                self._written[key] = None
        self._is_host_dirty = True
        self._mark([key for key, _ in batch.changes if key != host_key(self.host)], now, force=True)

    def _mark(self, keys: Iterable[str], now: float, *, force: bool = False) -> None:
        for key in keys:
            if not force and self._in_flight is None and self._is_as_written(key):
                self._dirty.pop(key, None)
            else:
                self._dirty[key] = None
        if not self._dirty and not self._is_host_dirty:
            self._dirty_since = None
        elif self._dirty_since is None:
            self._dirty_since = now

    def _is_as_written(self, key: str) -> bool:
        """Return whether the key is in the cluster as it is wanted."""
        if key not in self._written:
            return key not in self._wanted
        written = self._written[key]
        return written is not None and written == self._wanted.get(key)

    def _is_own(self, key: str) -> bool:
        parts = split_key(key)
        return parts is not None and parts.host == self.host

    def _count(self, lease: Lease, step: int) -> None:
        """Count an endpoint that appears or disappears; the host's entry changes with the number of instances."""
        instance = (lease.service, lease.instance)
        self._endpoints[instance] += step
        if self._endpoints[instance] == max(step, 0):  # its first endpoint, or its last one
            self._counts[lease.service] += step
            self._is_host_dirty = True
        if not self._endpoints[instance]:
            del self._endpoints[instance]
        if not self._counts[lease.service]:
            del self._counts[lease.service]
