"""Browses the DNS-SD services of the LAN while somebody lists them (RFC 6763 sections 4 to 9): types, instances, hosts.

Questions are repeated at growing intervals (RFC 6762 section 5.2), carry the known answers, and are repeated before a
record expires, so that a host that fell silent is lost within its TTL. Nothing is kept once nobody has listed anything
for a while. What other hosts send is bounded: records and instances for each link, how long they are kept, and the
questions that they cause.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Iterator

from portd.adapters.mdns import wire
from portd.adapters.mdns.interfaces import Interfaces
from portd.adapters.mdns.sockets import Arrival, Sockets
from portd.adapters.mdns.wire import DNSAddress, DNSCache, DNSIncoming, DNSPointer, DNSRecord, DNSService, DNSText
from portd.core.announcing import NAME_BYTES, LanService

FIRST_S, LAST_S = 1.0, 3600.0
"""Between two questions for the same: doubled each time, from one second to an hour (section 5.2)."""
QUIET_S, PATIENCE_S = 0.5, 2.5
"""A first listing is complete when nothing new came for QUIET_S (twice that for all types), or after PATIENCE_S."""
NEWS_S = 0.05
"""Records this close together are processed together: a thousand instances come in a tenth of a second."""
KEPT_S = 120.0
"""A type that nobody has listed for this time is browsed no more."""
TICK_S = 1.0
REFRESH_PERCENT = (80, 85, 90, 95)
"""Of a record's TTL: when to ask for it again (section 5.2)."""
REFRESH_S = 5.0
"""How often records are checked for these moments; 5 % of an SRV's two minutes is a little longer."""
TYPES_MAX = 256
"""Types browsed because they exist, not because they were listed: a host that floods the LAN with types is ignored."""
INSTANCES_MAX = 2048
"""PTRs kept for each link; further ones are dropped until others expire."""
RECORDS_MAX = 8_192
"""Records kept for each link, about 3 MB. zeroconf's cache drops old records for new ones at 10,000: a flood would push
out what is true, so that this bound is a lower one."""
TTL_MAX = wire.OTHER_TTL
"""Seconds; a record that claims to live longer is refreshed, or lost, as one that does not (RFC 6762 section 10)."""
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
        self._caches: dict[int, _Cache] = {}
        self._queries: dict[str, _Query] = {}
        self._missing: dict[tuple[int, str, int], _Query] = {}
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
        cache = self._caches.setdefault(arrival.link, _Cache())
        if cache.update([record for record in message.answers() if _is_sound(record)], self._now() * 1000):
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
            cache = self._caches.setdefault(link, _Cache())
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

    def _ask_for_instances(self, link: int, cache: _Cache, now: float) -> None:
        """Send the PTR questions that are due by their interval, or because an answer is about to expire."""
        now_ms = now * 1000
        due = [
            query
            for query in self._queries.values()
            if query.is_due(link, now)
            or (query.is_rested(link, now) and any(map(_refreshes_at(now_ms), cache.all(query.name, wire.PTR))))
        ]
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

    def _ask_for_missing(self, link: int, cache: _Cache, now: float) -> None:
        """Send the questions for records without which instances are not complete, or soon will not be."""
        gaps = {(link, name.lower(), type_): name for name, type_ in self._gaps(cache, now * 1000)}
        for key in [key for key in self._missing if key[0] == link and key not in gaps]:
            del self._missing[key]
        due: list[tuple[str, int]] = []
        for key, name in gaps.items():
            if len(due) == QUESTIONS_AT_ONCE:
                break
            query = self._missing.get(key)
            if query is None:
                query = self._missing[key] = _Query(name, key[2], now, first_s=FIRST_S / 4)
            if query.count < RESOLVE_TRIES and query.is_due(link, now):
                query.note_asked(link, now)
                due.append((name, query.type))
        for start in range(0, len(due), QUESTIONS_PER_PACKET):
            self._send(link, wire.encode_query(due[start : start + QUESTIONS_PER_PACKET]))
        if due:
            self._wake(FIRST_S / 4)

    def _gaps(self, cache: _Cache, now_ms: float) -> Iterator[tuple[str, int]]:
        """Yield the names and types of records that instances lack, or that are about to expire."""
        refreshes = _refreshes_at(now_ms)
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


class _Cache:
    """The records of a link, bounded in number and in time."""

    def __init__(self) -> None:
        self._records = DNSCache()
        self._count = self._instance_count = 0

    def update(self, records: list[DNSRecord], now_ms: float) -> bool:
        """Store the records of a response, goodbyes among them; returns whether anything is new."""
        records = [wire.with_ttl(record, TTL_MAX) if record.ttl > TTL_MAX else record for record in records]
        unique = {(record.name, record.type, record.class_) for record in records if record.unique}
        if unique:
            self._records.async_mark_unique_records_older_than_1s_to_expire(unique, records, now_ms)
        is_news = False
        for record in records:
            is_news |= self._apply(record)
        return is_news

    def _apply(self, record: DNSRecord) -> bool:
        if record.ttl == 0:
            return wire.apply_goodbye(self._records, record)
        if self._records.get(record) is None:
            is_instance = isinstance(record, DNSPointer)
            if self._count >= RECORDS_MAX or (is_instance and self._instance_count >= INSTANCES_MAX):
                return False
            self._count += 1
            self._instance_count += is_instance
        return self._records.async_add_records([record])

    def expire(self, now_ms: float) -> bool:
        """Drop expired records; returns whether there were any."""
        expired = self._records.async_expire(now_ms)
        self._count -= len(expired)
        self._instance_count -= sum(isinstance(record, DNSPointer) for record in expired)
        return bool(expired)

    def all(self, name: str, type_: int) -> list[DNSRecord]:
        """Return the records of a name and type, those that have just expired too."""
        return self._records.async_all_by_details(name, type_, 1)

    def alive(self, name: str, type_: int, now_ms: float) -> list[DNSRecord]:
        """Return the records of a name and type."""
        return [record for record in self.all(name, type_) if not record.is_expired(now_ms)]

    def targets(self, name: str, now_ms: float) -> list[str]:
        """Return the names that the PTRs of a name point to."""
        return [record.alias for record in self.alive(name, wire.PTR, now_ms) if isinstance(record, DNSPointer)]


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


def _is_sound(record: DNSRecord) -> bool:
    """Return whether the record is of use and its names can be asked for: one bad name would spoil a whole packet."""
    match record:
        case DNSPointer():
            split = wire.split_instance(record.alias)
            return "\ufffd" not in record.alias and (split is None or len(split[0].encode()) <= NAME_BYTES)
        case DNSService():
            return "\ufffd" not in record.server
        case DNSText() | DNSAddress():
            return True
    return False


def _refreshes_at(now_ms: float) -> Callable[[DNSRecord], bool]:
    """Return a test whether one of a record's moments to ask for it again has just passed."""

    def refreshes(record: DNSRecord) -> bool:
        return record.ttl > 2 and any(
            0 <= now_ms - record.get_expiration_time(percent) < REFRESH_S * 1500 for percent in REFRESH_PERCENT
        )

    return refreshes


def _address_gaps(cache: _Cache, host: str, now_ms: float) -> Iterator[tuple[str, int]]:
    """Yield the address questions for a host: both families if none is known, else those about to expire."""
    records = cache.alive(host, wire.A, now_ms) + cache.alive(host, wire.AAAA, now_ms)
    if not records:
        yield from ((host, wire.A), (host, wire.AAAA))
    refreshes = _refreshes_at(now_ms)
    yield from {(host, record.type) for record in records if refreshes(record)}


def _complete(cache: _Cache, name: str, type_name: str, now_ms: float) -> LanService | None:
    """Return an instance, None while its SRV or its host's addresses are missing."""
    services = [record for record in cache.alive(name, wire.SRV, now_ms) if isinstance(record, DNSService)]
    split = wire.split_instance(name)
    if not services or split is None:
        return None
    newest = max(services, key=lambda record: record.created)
    addresses = [
        _text(record)
        for type_ in (wire.A, wire.AAAA)
        for record in cache.alive(newest.server, type_, now_ms)
        if isinstance(record, DNSAddress)
    ]
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


def _text(record: DNSAddress) -> str:
    return socket.inet_ntop(socket.AF_INET if len(record.address) == 4 else socket.AF_INET6, record.address)


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
