"""Sees the DNS-SD services of the LAN, while somebody asks: types, their instances, their hosts (RFC 6763 sections 4
to 9). Questions grow rarer as time goes (RFC 6762 section 5.2), say what is known, and are sent again before a record
expires, so that what went silent is lost within its TTL. Nothing is kept once nobody has asked for a while.
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

OnChange = Callable[[], None]

FIRST_S, LAST_S = 1.0, 3600.0
"""Between two questions for the same: doubled each time, from one second to an hour (section 5.2)."""
QUIET_S, PATIENCE_S = 0.5, 2.5
"""A first look is complete when nothing new came for QUIET_S (twice that for all types), or after PATIENCE_S."""
NEWS_S = 0.05
"""What comes this close together is looked at together: a thousand instances come in a tenth of a second."""
KEPT_S = 120.0
"""A type that nobody has asked for in this time is browsed no more."""
TICK_S = 1.0
REFRESH_PERCENT = (80, 85, 90, 95)
"""Of a record's TTL: when to ask for it again (section 5.2)."""
REFRESH_S = 5.0
"""How often these moments are looked for; 5 % of an SRV's two minutes is a little longer."""
MOST_TYPES = 256
"""Browsed because they are there, not because they were asked for: whoever floods the LAN with types floods not us."""
RESOLVE_TRIES = 6
"""For the SRV, TXT and addresses of an instance; doubling from a quarter of a second. Then its next PTR starts anew."""
QUESTIONS_PER_PACKET = 24


class Browser:
    """Browses on the sockets of a responder, or on its own. Give it what is heard by `hear`."""

    def __init__(self, sockets: Sockets, links: Callable[[], Interfaces]) -> None:
        self._sockets = sockets
        self._links = links
        self._caches: dict[int, DNSCache] = {}
        self._queries: dict[str, _Query] = {}
        self._missing: dict[tuple[int, str, int], _Query] = {}
        self._followers: dict[OnChange, str | None] = {}
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
        """Tell whether anything is browsed."""
        return bool(self._queries)

    async def look(self, type_: str | None) -> None:
        """Make sure that what `seen` tells is worth something: waits at the first time, and not again."""
        name = f"{type_}.{wire.DOMAIN}" if type_ else wire.TYPES_NAME
        query = self._want(name)
        start = self._now()
        if query.is_settled:
            return
        while not query.is_settled and self.is_active:
            await asyncio.sleep(0.05)
            now = self._now()
            quiet_s = QUIET_S if type_ else 2 * QUIET_S
            query.is_settled |= now - max(self._last_news, start) >= quiet_s or now - start >= PATIENCE_S

    def follow(self, type_: str | None, on_change: OnChange) -> None:
        """Browse until `unfollow`, and call when what `seen` tells may have changed: many changes, one call."""
        self._followers[on_change] = type_
        self._want(f"{type_}.{wire.DOMAIN}" if type_ else wire.TYPES_NAME)

    def unfollow(self, on_change: OnChange) -> None:
        """Call no more."""
        self._followers.pop(on_change, None)

    def seen(self, type_: str | None) -> list[LanService]:
        """List the instances that are whole: named by a PTR, with a port and an address, none of it expired."""
        now_ms = self._now() * 1000
        found: dict[tuple[str, str], LanService] = {}
        for cache in self._caches.values():
            names = [f"{type_}.{wire.DOMAIN}"] if type_ else self._types(cache, now_ms)
            for name in names:
                for pointer in _alive(cache, name, wire.PTR, now_ms):
                    assert isinstance(pointer, DNSPointer)
                    service = _whole(cache, pointer.alias, name, now_ms)
                    if service is not None:
                        _merge(found, service)
        return sorted(found.values(), key=lambda service: (service.type, service.name))

    def hear(self, arrival: Arrival, message: DNSIncoming) -> None:
        """Take in what a response says."""
        if not self._queries or arrival.link not in self._links():
            return
        cache = self._caches.setdefault(arrival.link, DNSCache())
        now_ms = self._now() * 1000
        answers = [record for record in message.answers() if _is_sound(record)]
        unique = {(record.name, record.type, record.class_) for record in answers if record.unique}
        if unique:
            cache.async_mark_unique_records_older_than_1s_to_expire(unique, answers, now_ms)
        is_news = False
        for record in answers:
            is_news |= wire.take_leave(cache, record, now_ms) if record.ttl == 0 else cache.async_add_records([record])
        if is_news:
            self._last_news = self._now()
            self._wake(NEWS_S)

    # --- what is asked ---

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
        self._wake_later()

    def _ticked(self) -> None:
        """Do each second only what a second needs: at rest that is next to nothing, however much is known."""
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
            self._wake_later()

    def _wake_later(self) -> None:
        if self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(TICK_S, self._ticked)

    def _expire(self, now: float) -> bool:
        """Drop what has run out, and what came by an interface that is gone; tells whether there was any."""
        links, dropped = self._links(), False
        for link in list(self._caches):
            if link not in links:
                del self._caches[link]
                dropped = True
            else:
                dropped |= bool(self._caches[link].async_expire(now * 1000))
        return dropped

    def _work(self) -> None:
        """Forget what nobody wants, ask what is due, and tell followers."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        now = self._now()
        is_news = self._expire(now) or self._last_news >= self._worked_at
        self._worked_at = now
        for type_ in self._followers.values():
            self._want(f"{type_}.{wire.DOMAIN}" if type_ else wire.TYPES_NAME)
        self._follow_types(now)
        for key in [key for key, query in self._queries.items() if now - query.wanted_at > KEPT_S]:
            del self._queries[key]
        if not self._queries:
            self.close()
            return
        for link in self._links():
            self._ask(link, self._caches.setdefault(link, DNSCache()), now)
        if is_news:
            for on_change in list(self._followers):
                on_change()

    def _follow_types(self, now: float) -> None:
        """Browse every type that there is while all of them are wanted."""
        if wire.TYPES_NAME not in self._queries:
            return
        for cache in self._caches.values():
            for name in self._types(cache, now * 1000):
                if len(self._queries) < MOST_TYPES or name.lower() in self._queries:
                    self._want(name)

    def _types(self, cache: DNSCache, now_ms: float) -> list[str]:
        return [
            record.alias
            for record in _alive(cache, wire.TYPES_NAME, wire.PTR, now_ms)
            if isinstance(record, DNSPointer)
        ]

    def _ask(self, link: int, cache: DNSCache, now: float) -> None:
        now_ms = now * 1000
        questions: list[tuple[str, int]] = []
        known: list[DNSRecord] = []
        is_first = False
        for query in self._queries.values():
            if query.is_due(link, now) or (
                query.is_rested(link, now)
                and any(
                    _needs_refresh(record, now_ms) for record in cache.async_all_by_details(query.name, wire.PTR, 1)
                )
            ):
                is_first |= query.asked(link, now)
                questions.append((query.name, wire.PTR))
                known += [
                    record
                    for record in _alive(cache, query.name, wire.PTR, now_ms)
                    if record.get_remaining_ttl(now_ms) * 2 > record.ttl
                ]
        if questions:
            self._send(
                link,
                wire.encode_query(questions, known, now_ms=now_ms, unicast=is_first and self._sockets.takes_unicast),
            )
        gaps = list(self._gaps(cache, now_ms))
        present = {(link, name.lower(), type_) for name, type_ in gaps}
        for missing in [missing for missing in self._missing if missing[0] == link and missing not in present]:
            del self._missing[missing]
        due = [gap for gap in gaps if self._is_gap_due(link, *gap, now)]
        for start in range(0, len(due), QUESTIONS_PER_PACKET):
            self._send(link, wire.encode_query(due[start : start + QUESTIONS_PER_PACKET]))

    def _gaps(self, cache: DNSCache, now_ms: float) -> Iterator[tuple[str, int]]:
        """Yield what an instance lacks to be whole, or will soon: questions to ask."""
        hosts: dict[str, str] = {}
        for query in self._queries.values():
            if query.name == wire.TYPES_NAME:
                continue
            for pointer in _alive(cache, query.name, wire.PTR, now_ms):
                assert isinstance(pointer, DNSPointer)
                for type_ in (wire.SRV, wire.TXT):
                    records = _alive(cache, pointer.alias, type_, now_ms)
                    if not records or all(_needs_refresh(record, now_ms) for record in records):
                        yield pointer.alias, type_
                    hosts |= {record.server_key: record.server for record in records if isinstance(record, DNSService)}
        for host in hosts.values():
            records = _alive(cache, host, wire.A, now_ms) + _alive(cache, host, wire.AAAA, now_ms)
            if not records:
                yield from ((host, wire.A), (host, wire.AAAA))
            yield from {(host, record.type) for record in records if _needs_refresh(record, now_ms)}

    def _is_gap_due(self, link: int, name: str, type_: int, now: float) -> bool:
        key = (link, name.lower(), type_)
        query = self._missing.get(key)
        if query is None:
            query = self._missing[key] = _Query(name, type_, now, first_s=FIRST_S / 4)
        if query.count >= RESOLVE_TRIES or not query.is_due(link, now):
            return False
        query.asked(link, now)
        self._wake(FIRST_S / 4)
        return True

    def _send(self, link: int, packets: list[bytes]) -> None:
        self._sockets.send(packets, self._sockets.groups(link))


class _Query:
    """A question that is asked again and again, at growing intervals; on each link by itself."""

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
        """Tell whether it was not asked for the same reason just now."""
        return now - self._last.get(link, 0.0) >= 2 * REFRESH_S

    def asked(self, link: int, now: float) -> bool:
        """Note that it is asked now; tells whether it is for the first time."""
        _, interval_s = self._next.get(link, (0.0, self._first_s))
        is_first = link not in self._next
        self._next[link] = (now + interval_s, min(interval_s * 2, LAST_S))
        self._last[link] = now
        self.count += 1
        return is_first


def _is_sound(record: DNSRecord) -> bool:
    """Tell whether the names in a record can be asked for: no packet of ours may be spoilt by what others send."""
    if isinstance(record, DNSPointer):
        split = wire.split_instance(record.alias)
        return "\ufffd" not in record.alias and (split is None or len(split[0].encode()) <= NAME_BYTES)
    return not isinstance(record, DNSService) or "\ufffd" not in record.server


def _alive(cache: DNSCache, name: str, type_: int, now_ms: float) -> list[DNSRecord]:
    return [record for record in cache.async_all_by_details(name, type_, 1) if not record.is_expired(now_ms)]


def _needs_refresh(record: DNSRecord, now_ms: float) -> bool:
    """Tell whether one of the moments to ask again has just passed."""
    return record.ttl > 2 and any(
        0 <= now_ms - record.get_expiration_time(percent) < REFRESH_S * 1500 for percent in REFRESH_PERCENT
    )


def _whole(cache: DNSCache, name: str, type_name: str, now_ms: float) -> LanService | None:
    services = [record for record in _alive(cache, name, wire.SRV, now_ms) if isinstance(record, DNSService)]
    split = wire.split_instance(name)
    if not services or split is None:
        return None
    newest = max(services, key=lambda record: record.created)
    addresses = [
        _text(record)
        for type_ in (wire.A, wire.AAAA)
        for record in _alive(cache, newest.server, type_, now_ms)
        if isinstance(record, DNSAddress)
    ]
    if not addresses:
        return None
    texts = [record for record in _alive(cache, name, wire.TXT, now_ms) if isinstance(record, DNSText)]
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
    """Put together what two links tell of one instance."""
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
