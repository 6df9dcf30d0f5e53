"""Browses the DNS-SD services of the LAN while somebody lists them (RFC 6763 sections 4 to 9): types, instances, hosts.

Questions are repeated at growing intervals (RFC 6762 section 5.2), carry the known answers, and are repeated before a
record expires, so that a host that fell silent is lost within its TTL. Nothing is kept once nobody has listed anything
for a while. What other hosts send is bounded: the records kept (`cache`), and the questions that they cause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address

from portd.adapters.mdns import wire
from portd.adapters.mdns.cache import REFRESH_S, RecordCache, refreshes_at
from portd.adapters.mdns.interfaces import Interfaces
from portd.adapters.mdns.sockets import Arrival, Sockets
from portd.adapters.mdns.wire import DNSAddress, DNSIncoming, DNSService, DNSText
from portd.core.announcing import LanService

FIRST_S, LAST_S = 1.0, 3600.0
"""Between two questions for the same: doubled each time, from one second to an hour (section 5.2)."""
QUIET_S, PATIENCE_S = 0.5, 2.5
"""A first listing is complete when nothing new came for QUIET_S (twice that for all types), or after PATIENCE_S."""
NEWS_S = 0.05
"""Records this close together are processed together: a thousand instances come in a tenth of a second."""
KEPT_S = 120.0
"""A type that nobody has listed for this time is browsed no more."""
TICK_S = 1.0
TYPES_MAX = 256
"""Types browsed because they exist, not because they were listed: a host that floods the LAN with types is ignored."""
RESOLVE_TRIES = 6
"""Questions for a missing record, the first two a quarter of a second apart, then doubling."""
QUESTIONS_PER_PACKET = 24
QUESTIONS_AT_ONCE = 20 * QUESTIONS_PER_PACKET
"""Questions for missing records sent at once on a link; the rest follows a quarter of a second later."""


class Browser:
    """Browses on the sockets of a responder, or on its own. Pass it every response by `receive`."""

    def __init__(self, sockets: Sockets, links: Callable[[], Interfaces]) -> None:
        self._sockets = sockets
        self._links = links
        self._caches: dict[int, RecordCache] = {}
        self._queries: dict[str, _Query] = {}
        self._missing: dict[int, dict[tuple[str, int], _Query]] = {}
        self._tick: asyncio.TimerHandle | None = None
        self._soon: asyncio.TimerHandle | None = None
        self._last_news = self._worked_at = 0.0
        self._now = asyncio.get_running_loop().time

    def close(self) -> None:
        """Forget everything; may be called twice."""
        for timer in (self._tick, self._soon):
            if timer is not None:
                timer.cancel()
        self._tick = self._soon = None
        self._queries.clear()
        self._caches.clear()
        self._missing.clear()

    @property
    def is_active(self) -> bool:
        """Return whether anything is browsed."""
        return bool(self._queries)

    async def browse(self, type_: str | None) -> None:
        """Browse a type (None: all) for a while; the first time, wait until `seen` is complete."""
        query = self._want(_query_name(type_))
        start = self._now()
        while not query.is_settled and self.is_active:
            await asyncio.sleep(0.05)
            now = self._now()
            quiet_s = QUIET_S if type_ else 2 * QUIET_S
            query.is_settled |= now - max(self._last_news, start) >= quiet_s or now - start >= PATIENCE_S

    def seen(self, type_: str | None) -> list[LanService]:
        """List the complete instances: named by a PTR, with a port and an address, none of it expired."""
        now_ms = self._now() * 1000
        found: dict[tuple[str, str], LanService] = {}
        for cache in self._caches.values():
            for name in [_query_name(type_)] if type_ else cache.targets(wire.TYPES_NAME, now_ms):
                for instance in cache.targets(name, now_ms):
                    service = _complete(cache, instance, name, now_ms)
                    if service is not None:
                        _merge(found, service)
        return sorted(found.values(), key=lambda service: (service.type, service.name))

    def receive(self, arrival: Arrival, message: DNSIncoming) -> None:
        """Cache what a response says."""
        if not self._queries or arrival.link not in self._links():
            return
        cache = self._caches.setdefault(arrival.link, RecordCache())
        if cache.update(message.answers(), self._now() * 1000):
            self._last_news = self._now()
            self._wake(NEWS_S)

    # --- when to work ---

    def _want(self, name: str) -> _Query:
        key = name.lower()
        query = self._queries.get(key)
        if query is None:
            query = self._queries[key] = _Query(name, wire.PTR, self._now())
            self._wake(0.0)
        query.wanted_at = self._now()
        return query

    def _wake(self, after_s: float) -> None:
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(after_s, self._work)
        self._start_ticking()

    def _start_ticking(self) -> None:
        if self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(TICK_S, self._on_tick)

    def _on_tick(self) -> None:
        """Work if there is a reason: at rest a second costs next to nothing, however many records are cached."""
        self._tick = None
        now = self._now()
        if self._expire(now):
            self._last_news = now
        if (
            self._last_news > self._worked_at
            or now - self._worked_at >= REFRESH_S
            or any(query.is_due(link, now) for query in self._queries.values() for link in self._links())
        ):
            self._work()
        if self._queries:
            self._start_ticking()

    def _expire(self, now: float) -> bool:
        """Drop expired records, and those of interfaces that are gone; returns whether there were any."""
        links, dropped = self._links(), False
        for link in list(self._caches):
            if link not in links:
                del self._caches[link]
                dropped = True
            else:
                dropped |= self._caches[link].expire(now * 1000)
        return dropped

    def _work(self) -> None:
        """Drop what nobody wants any more, and send the questions that are due."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        now = self._now()
        self._expire(now)
        self._worked_at = now
        self._want_all_types(now)
        for key in [key for key, query in self._queries.items() if now - query.wanted_at > KEPT_S]:
            del self._queries[key]
        if not self._queries:
            self.close()
            return
        for link in self._links():
            cache = self._caches.setdefault(link, RecordCache())
            self._ask_for_instances(link, cache, now)
            self._ask_for_missing(link, cache, now)

    def _want_all_types(self, now: float) -> None:
        """Browse every type that exists while all of them are wanted."""
        if wire.TYPES_NAME not in self._queries:
            return
        for cache in self._caches.values():
            for name in cache.targets(wire.TYPES_NAME, now * 1000):
                if len(self._queries) < TYPES_MAX or name.lower() in self._queries:
                    self._want(name)

    # --- questions ---

    def _ask_for_instances(self, link: int, cache: RecordCache, now: float) -> None:
        """Send the PTR questions that are due by their interval, or because an answer is about to expire."""
        now_ms = now * 1000
        due = [query for query in self._queries.values() if self._is_due(query, link, cache, now)]
        if not due:
            return
        known = [
            record
            for query in due
            for record in cache.alive(query.name, wire.PTR, now_ms)
            if record.get_remaining_ttl(now_ms) * 2 > record.ttl
        ]
        is_first = False
        for query in due:
            is_first |= query.note_asked(link, now)
        questions = [(query.name, wire.PTR) for query in due]
        unicast = is_first and self._sockets.takes_unicast
        self._send(link, wire.encode_query(questions, known, now_ms=now_ms, unicast=unicast))

    def _is_due(self, query: _Query, link: int, cache: RecordCache, now: float) -> bool:
        if query.is_due(link, now):
            return True
        return query.is_rested(link, now) and any(map(refreshes_at(now * 1000), cache.all(query.name, wire.PTR)))

    def _ask_for_missing(self, link: int, cache: RecordCache, now: float) -> None:
        """Send the questions for records without which instances are not complete, or soon will not be."""
        due = self._due_gaps(link, dict.fromkeys(self._gaps(cache, now * 1000)), now)
        for start in range(0, len(due), QUESTIONS_PER_PACKET):
            self._send(link, wire.encode_query(due[start : start + QUESTIONS_PER_PACKET]))
        if due:
            self._wake(FIRST_S / 4)

    def _due_gaps(self, link: int, gaps: dict[tuple[str, int], None], now: float) -> list[tuple[str, int]]:
        """Return the questions to repeat now, and record that they are; forget those that were answered."""
        missing = self._missing.setdefault(link, {})
        for gap in missing.keys() - gaps.keys():
            del missing[gap]
        due: list[tuple[str, int]] = []
        for gap in gaps:
            query = missing.setdefault(gap, _Query(*gap, now, first_s=FIRST_S / 4))
            if query.count < RESOLVE_TRIES and query.is_due(link, now):
                query.note_asked(link, now)
                due.append(gap)
            if len(due) == QUESTIONS_AT_ONCE:
                break
        return due

    def _gaps(self, cache: RecordCache, now_ms: float) -> Iterator[tuple[str, int]]:
        """Yield the names and types of records that instances lack, or that are about to expire."""
        refreshes = refreshes_at(now_ms)
        hosts: dict[str, str] = {}
        for name in [query.name for query in self._queries.values() if query.name != wire.TYPES_NAME]:
            for instance in cache.targets(name, now_ms):
                for type_ in (wire.SRV, wire.TXT):
                    records = cache.alive(instance, type_, now_ms)
                    if all(map(refreshes, records)):
                        yield instance, type_
                    hosts |= {record.server_key: record.server for record in records if isinstance(record, DNSService)}
        for host in hosts.values():
            yield from _address_gaps(cache, host, now_ms)

    def _send(self, link: int, packets: list[bytes]) -> None:
        self._sockets.send(packets, self._sockets.groups(link))


class _Query:
    """A question that is repeated at growing intervals; on each link by itself."""

    def __init__(self, name: str, type_: int, now: float, first_s: float = FIRST_S) -> None:
        self.name = name
        self.type = type_
        self.wanted_at = now
        self.is_settled = False
        self.count = 0
        self._first_s = first_s
        self._next: dict[int, tuple[float, float]] = {}
        self._last: dict[int, float] = {}

    def is_due(self, link: int, now: float) -> bool:
        return now >= self._next.get(link, (0.0, 0.0))[0]

    def is_rested(self, link: int, now: float) -> bool:
        """Return whether it was not asked for a while: records near their end refresh once in that time."""
        return now - self._last.get(link, 0.0) >= 2 * REFRESH_S

    def note_asked(self, link: int, now: float) -> bool:
        """Record that it is asked now; returns whether it is for the first time."""
        _, interval_s = self._next.get(link, (0.0, self._first_s))
        is_first = link not in self._next
        self._next[link] = (now + interval_s, min(interval_s * 2, LAST_S))
        self._last[link] = now
        self.count += 1
        return is_first


def _query_name(type_: str | None) -> str:
    return f"{type_}.{wire.DOMAIN}" if type_ else wire.TYPES_NAME


def _address_gaps(cache: RecordCache, host: str, now_ms: float) -> Iterator[tuple[str, int]]:
    """Yield the address questions for a host: both families if none is known, else those about to expire."""
    records = cache.alive(host, wire.A, now_ms) + cache.alive(host, wire.AAAA, now_ms)
    if not records:
        yield from ((host, wire.A), (host, wire.AAAA))
    refreshes = refreshes_at(now_ms)
    yield from {(host, record.type) for record in records if refreshes(record)}


def _complete(cache: RecordCache, name: str, type_name: str, now_ms: float) -> LanService | None:
    """Return an instance, None while its SRV or its host's addresses are missing."""
    services = [record for record in cache.alive(name, wire.SRV, now_ms) if isinstance(record, DNSService)]
    split = wire.split_instance(name)
    if not services or split is None:
        return None
    newest = max(services, key=lambda record: record.created)
    addresses = _addresses(cache, newest.server, now_ms)
    if not addresses:
        return None
    texts = [record for record in cache.alive(name, wire.TXT, now_ms) if isinstance(record, DNSText)]
    txt = wire.decode_txt(max(texts, key=lambda record: record.created).text) if texts else {}
    return LanService(
        type=type_name.removesuffix("." + wire.DOMAIN),
        name=split[0],
        host=newest.server.removesuffix("."),
        addresses=tuple(addresses),
        port=newest.port,
        txt=txt,
    )


def _addresses(cache: RecordCache, host: str, now_ms: float) -> list[str]:
    records = cache.alive(host, wire.A, now_ms) + cache.alive(host, wire.AAAA, now_ms)
    return [str(ip_address(record.address)) for record in records if isinstance(record, DNSAddress)]


def _merge(found: dict[tuple[str, str], LanService], service: LanService) -> None:
    """Merge what two links have of one instance."""
    key = (service.type, service.name)
    other = found.get(key)
    if other is not None:
        addresses: Iterable[str] = dict.fromkeys((*other.addresses, *service.addresses))
        service = LanService(
            type=service.type,
            name=service.name,
            host=service.host,
            addresses=tuple(addresses),
            port=service.port,
            txt=service.txt,
        )
    found[key] = service
