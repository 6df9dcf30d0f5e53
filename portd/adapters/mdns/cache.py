"""Records of other hosts on one link, bounded in number and in time, whatever those hosts send.

Wraps zeroconf's cache; the caller passes in the time (milliseconds of the event loop's clock). What is asked for, and
when, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from portd.adapters.mdns import wire
from portd.adapters.mdns.wire import DNSAddress, DNSCache, DNSPointer, DNSRecord, DNSService, DNSText
from portd.core.announcing import NAME_BYTES, has_control_characters

REFRESH_PERCENT = (80, 85, 90, 95)
"""Of a record's TTL: when to ask for it again (section 5.2)."""
REFRESH_S = 5.0
"""How often records are checked for these moments; 5 % of an SRV's two minutes is a little longer."""
INSTANCES_MAX = 2048
"""PTRs kept for each link; further ones are dropped until others expire."""
RECORDS_MAX = 8_192
"""Records kept for each link, about 3 MB. zeroconf's cache drops old records for new ones at 10,000: a flood would push
out what is true, so that this bound is a lower one."""
TTL_MAX = wire.OTHER_TTL
"""Seconds; a record that claims to live longer is refreshed, or lost, as one that does not (RFC 6762 section 10)."""


class RecordCache:
    """The records of a link, bounded in number and in time."""

    def __init__(self) -> None:
        self._records = DNSCache()
        self._count = self._instance_count = 0

    def update(self, received: Iterable[DNSRecord], now_ms: float) -> bool:
        """Store the records of a response, goodbyes among them; returns whether anything is new."""
        records = [
            wire.with_ttl(record, TTL_MAX) if record.ttl > TTL_MAX else record
            for record in received
            if _is_sound(record)
        ]
        unique = {(record.name, record.type, record.class_) for record in records if record.unique}
        if unique:
            self._records.async_mark_unique_records_older_than_1s_to_expire(unique, records, now_ms)
        is_news = False
        for record in records:
            is_news |= self._apply(record)
        return is_news

    def __len__(self) -> int:
        return self._count

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


def refreshes_at(now_ms: float) -> Callable[[DNSRecord], bool]:
    """Return a test whether one of a record's moments to ask for it again has just passed."""

    def refreshes(record: DNSRecord) -> bool:
        return record.ttl > 2 and any(
            0 <= now_ms - record.get_expiration_time(percent) < REFRESH_S * 1500 for percent in REFRESH_PERCENT
        )

    return refreshes


def _is_sound(record: DNSRecord) -> bool:
    """Return whether the record is of use, and its names can be asked for and shown.

    One bad name would spoil a whole packet of questions, or a terminal: names with control characters are not valid
    (RFC 6763 section 4.1.1).
    """
    match record:
        case DNSPointer():
            split = wire.split_instance(record.alias)
            return _is_sound_name(record.alias) and (split is None or len(split[0].encode()) <= NAME_BYTES)
        case DNSService():
            return _is_sound_name(record.server)
        case DNSText() | DNSAddress():
            return True
    return False


def _is_sound_name(name: str) -> bool:
    return "\ufffd" not in name and not has_control_characters(name)
