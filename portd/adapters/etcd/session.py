"""The session with etcd: one member for the heartbeat, the writes and the watch, and on to the next one together.

A member that is paused or partitioned receives nothing and reports nothing, so a silent watch proves nothing: the
heartbeat requests a linearizable read of the same member every second, and when it fails, all move to the next member.
What is published and what is known is decided by `portd.cluster`; this module must not know what the keys mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, Final

from portd.adapters.etcd.gateway import Compacted, EtcdError, Gateway, LeaseGone, Login
from portd.cluster.entries import Change, fence_key, host_key
from portd.cluster.publisher import Batch, Publisher
from portd.cluster.view import Position, Seen, View
from portd.core.model import Event, Lease
from portd.leasing.seams import HostFacts

HEARTBEAT_S: Final = 0.8
"""Seconds between two heartbeats; with the time-out of a call, a member that does not answer is left within 2 s."""
KEEPALIVES_A_TTL: Final = 4
"""Renewals of the cluster lease in its ttl: some may be lost."""
STATUS_S: Final = 15.0
"""Seconds between two reads of the member's status."""
RETRY_S: Final = 0.4
"""Seconds between two rounds of all members while none answers."""
STALE_S: Final = 3.0
"""Age of the view, in seconds, from which it is reported as stale: several heartbeats were missed."""
ASK_TIMEOUT_S: Final = 2.0
"""Seconds that a look-up waits for the first read of its service."""

logger = logging.getLogger(__name__)


class EtcdSession:
    """Keeps a publisher and a view up to date with etcd. `on_seen` is called with visible changes of other hosts."""

    def __init__(
        self,
        endpoints: Sequence[str],
        login: Login,
        publisher: Publisher,
        view: View,
        ttl_s: int,
        on_seen: Callable[[list[Seen]], None] = lambda seen: None,
    ) -> None:
        self.publisher = publisher
        self.view = view
        self.on_seen = on_seen
        self._endpoints = list(endpoints)
        self._login = login
        self._ttl_s = ttl_s
        self._member = 0
        self._is_connected = False
        self._problem: str | None = "not connected yet"
        self._status: dict[str, Any] = {}
        self._keeps_missing = False
        self._keep_alive_at = 0.0
        self._started_at: float | None = None
        self._publish_now = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._watch_anew = asyncio.Event()
        self._was_read = asyncio.Event()
        self.moved_count = 0

    # --- what others use ---

    def restore(self, leases: Collection[Lease]) -> None:
        """Enter the live leases of before the start."""
        for lease in leases:
            self.publisher.observe(lease, 0.0)

    def apply(self, event: Event) -> None:
        """Follow an event of this host. Never raises or waits."""
        self.publisher.observe(event.lease, _now())
        self._publish_now.set()

    async def ask(self, service: str) -> None:
        """Read a service that is not known yet, for ASK_TIMEOUT_S at most; return at once while etcd is away."""
        if not self.view.ask(service, _now()) or not self._is_connected:
            return
        self._watch_anew.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(ASK_TIMEOUT_S):
                while not self.view.is_known(service):
                    await self._was_read.wait()

    def of_service(self, service: str) -> Collection[Lease]:
        """Return the other hosts' leases of a service."""
        return self.view.of_service(service)

    def leases(self) -> Sequence[Lease]:
        """Return all leases of other hosts that are known."""
        return self.view.leases()

    def hosts(self) -> Sequence[HostFacts]:
        """Return the hosts, this one first."""
        age_s = self.view.stale_s(_now())
        about = self.publisher.about
        own = HostFacts(self.publisher.host, about.address, about.version, about.services, 0.0)
        others = [
            HostFacts(name, one.address, one.version, one.services, age_s)
            for name, one in sorted(self.view.hosts.items())
        ]
        return [own, *others]

    def stale_s(self) -> float | None:
        """Return for how many seconds etcd has not been heard from; None while the view is fresh."""
        now = _now()
        age_s = self.view.stale_s(now)
        if age_s is None:
            return now - self._started_at if self._started_at is not None else 0.0
        return age_s if age_s > STALE_S else None

    def condition(self) -> dict[str, Any]:
        """Return what status shows."""
        publisher, view, stale_s = self.publisher, self.view, self.stale_s()
        return {
            "enabled": True,
            "engine": "etcd",
            "node": publisher.host,
            "member": self._endpoints[self._member] if self._is_connected else None,
            "lease": None if publisher.lease_id is None else f"{publisher.lease_id:x}",
            "ttl": self._ttl_s,
            "state": publisher.state,
            "published": publisher.key_count,
            "waiting": publisher.waiting_count,
            "hosts": len(view.hosts) + 1,
            "instances": len(view.leases()),
            "revision": 0 if view.position is None else view.position.revision,
            "follows": "all" if len(view.prefixes) == 2 and "portd/v1/s/" in view.prefixes else "asked",
            "stale": None if stale_s is None else round(stale_s, 1),
            "moved": self.moved_count,
            "malformed": view.malformed_count,
            "etcd_version": self._status.get("version"),
            "db_size_bytes": int(self._status.get("dbSize", 0)),
            "problem": self._name_problem() or self._problem,
        }

    def warnings(self) -> list[str]:
        """Return what an operator should know, a sentence each."""
        found = []
        if problem := self._name_problem():
            found.append(problem)
        if (stale_s := self.stale_s()) is not None and self._problem:
            found.append(f"the cluster is stale: etcd has not been heard from for {stale_s:.0f} s ({self._problem})")
        if any(url.startswith("http://") for url in self._endpoints) and not self._login.user:
            found.append(
                "[cluster] speaks plain HTTP to an etcd without authentication: etcd answers every web page "
                "(Access-Control-Allow-Origin: *), so any page open on a host that reaches it can write to it; use "
                "https with client certificates, or user and password_file"
            )
        return found

    def _name_problem(self) -> str | None:
        holder = self.publisher.name_holder
        if holder is None:
            return None
        where = f" at {holder.address}" if holder.address else ""
        return (
            f"the host name {self.publisher.host!r} is taken by another machine{where}: nothing of this host is "
            "published; set another [cluster] node"
        )

    # --- the session ---

    async def run(self) -> None:
        """Speak to one member after the other, for ever."""
        self._started_at = _now()
        failed = 0
        while True:
            url = self._endpoints[self._member]
            gateway = Gateway(url, self._login)
            try:
                await self._serve(gateway)
            except EtcdError as error:
                failed = 1 if self._is_connected else failed + 1
                if self._is_connected or self._problem != str(error):
                    logger.warning("cluster: %s", error)
                self._problem = str(error)
            except Exception as error:  # a peer must not stop the daemon, whatever it answers
                failed += 1
                self._problem = f"{url} answers what portd does not understand: {error!r}"
                logger.exception("cluster: %s", self._problem)
            finally:
                self._is_connected = False
                await gateway.close()
            self.moved_count += 1
            self._member = (self._member + 1) % len(self._endpoints)
            if failed >= len(self._endpoints):
                failed = 0
                await asyncio.sleep(RETRY_S)

    async def _serve(self, gateway: Gateway) -> None:
        """Use one member until it fails; raises EtcdError."""
        self._keep_alive_at = 0.0
        if self.publisher.lease_id is None and self.view.position is not None:
            self._read_again()  # without a lease nothing proves that etcd has not been wiped meanwhile
        await self._beat(gateway)
        self._is_connected, self._problem = True, None
        logger.info("cluster: connected to %s", gateway.url)
        await _first_done(
            self._beat_regularly(gateway), self._publish(gateway), self._watch(gateway), self._read_status(gateway)
        )

    async def _beat_regularly(self, gateway: Gateway) -> None:
        while True:
            self._beat_now.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._beat_now.wait()
            await self._beat(gateway)

    async def _beat(self, gateway: Gateway) -> None:
        """Hear from the member, keep the cluster lease or take one, and drop what has been missing for too long."""
        publisher, view = self.publisher, self.view
        header, fence = await gateway.get(fence_key(publisher.host))
        position = Position(*header)
        now = _now()
        if view.is_other_past(position):
            logger.warning("cluster: etcd has another past (wiped or restored): reading everything again")
            self._read_again()
        if publisher.lease_id is not None:
            is_gone = fence is None or fence.lease_id != publisher.lease_id
            if not is_gone and now >= self._keep_alive_at:
                is_gone = await gateway.keep_alive(publisher.lease_id) is None
                self._keep_alive_at = now + self._ttl_s / KEEPALIVES_A_TTL
            if is_gone:
                logger.warning("cluster: the lease of this host is gone: taking a new one")
                publisher.lease_lost()
                self._read_again()
        if publisher.lease_id is None:
            await self._claim(gateway)
        if not self._keeps_missing:
            view.hear(position, _now())
        self._report(view.review(_now()))
        if self._is_connected and view.unsynced:
            self._watch_anew.set()

    def _read_again(self) -> None:
        self._keeps_missing = True
        self.view.forget_revisions()
        self._watch_anew.set()

    async def _claim(self, gateway: Gateway) -> None:
        """Claim this host's name, unless another machine has it; take up the lease of the run before where it lives."""
        publisher = self.publisher
        key = host_key(publisher.host)
        _, holder = await gateway.get(key)
        if holder is not None and not publisher.may_adopt(holder.value):
            if publisher.state != "refused":
                publisher.refused(holder.value)
                logger.error("cluster: %s", self._name_problem())
            return
        lease_id = None
        if holder is not None and holder.lease_id and await gateway.keep_alive(holder.lease_id) == self._ttl_s:
            lease_id = holder.lease_id
        if lease_id is None:
            lease_id = await gateway.grant(self._ttl_s)
        compare = (key, "CREATE", 0) if holder is None else (key, "MOD", holder.mod_revision)
        changes = [(key, publisher.claim()), (fence_key(publisher.host), b"")]
        try:
            is_applied, revision = await gateway.write(lease_id, changes, compare)
        except LeaseGone:
            return  # the next heartbeat tries again
        if is_applied:
            publisher.claimed(lease_id, revision, await gateway.keys_of(lease_id), _now())
            self._keep_alive_at = _now() + self._ttl_s / KEEPALIVES_A_TTL
            self._publish_now.set()

    # --- publishing ---

    async def _publish(self, gateway: Gateway) -> None:
        publisher = self.publisher
        while True:
            if publisher.lease_id is not None and publisher.fence is None:
                await self._verify_fence(gateway)
            due_at = publisher.due_at()
            self._publish_now.clear()
            if due_at is None or due_at > _now():
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(due_at):
                        await self._publish_now.wait()
            elif batch := publisher.next_batch(_now()):
                await self._write(gateway, batch)

    async def _write(self, gateway: Gateway, batch: Batch) -> None:
        publisher = self.publisher
        fence = fence_key(publisher.host)
        try:
            is_applied, revision = await gateway.write(
                batch.lease_id, [*batch.changes, (fence, b"")], (fence, "MOD", batch.fence)
            )
        except LeaseGone:
            publisher.lease_lost()
            self._read_again()
            self._beat_now.set()
        except BaseException:  # cancelled too: nobody knows whether it is applied
            publisher.failed(batch, _now())
            raise
        else:
            if is_applied:
                publisher.committed(batch, revision)
            else:
                publisher.failed(batch, _now())

    async def _verify_fence(self, gateway: Gateway) -> None:
        publisher = self.publisher
        _, fence = await gateway.get(fence_key(publisher.host))
        if fence is not None and fence.lease_id == publisher.lease_id:
            publisher.verified(fence.mod_revision)
        else:
            publisher.lease_lost()
            self._read_again()
            self._beat_now.set()

    # --- watching ---

    async def _watch(self, gateway: Gateway) -> None:
        """Read what is followed and not known, then watch all of it, until what is followed changes; for ever."""
        while True:
            self._watch_anew.clear()
            try:
                await self._read(gateway)
                starts = list(self.view.next_revisions.items())
                await _first_done(self._follow(gateway, starts), self._watch_anew.wait())
            except Compacted as error:
                logger.info("cluster: %s: reading everything again", error)
                self.view.forget_revisions()

    async def _read(self, gateway: Gateway) -> None:
        while unsynced := self.view.unsynced:
            prefix = unsynced[0]
            header, found = await gateway.read(prefix)
            position = Position(*header)
            self._report(self.view.resync(prefix, found, position, _now(), is_other_past=self._keeps_missing))
        self._keeps_missing = False
        self._was_read.set()
        self._was_read.clear()

    async def _follow(self, gateway: Gateway, starts: Sequence[tuple[str, int]]) -> None:
        async for news in gateway.watch(starts):
            if self.view.is_other_past(Position(*news.header)):
                self._beat_now.set()  # which reads everything again
                return
            prefix = starts[news.watch_id - 1][0] if 0 < news.watch_id <= len(starts) else None
            if prefix is None:
                continue
            for revision, changes in groupby(news.changes, key=lambda change: change[0]):
                changed = [Change(key, value) for _, key, value in changes]
                self._report(self.view.apply(prefix, changed, revision, _now()))

    def _report(self, seen: list[Seen]) -> None:
        if seen:
            self.on_seen(seen)

    async def _read_status(self, gateway: Gateway) -> None:
        while True:
            with suppress(EtcdError):  # some versions show it to administrators alone
                self._status = dict(await gateway.status())
            await asyncio.sleep(STATUS_S)


async def _first_done(*parts: Coroutine[Any, Any, Any]) -> None:
    """Run parts until one of them ends, end the others, and raise what the first one raised, if anything."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _now() -> float:
    return asyncio.get_running_loop().time()
