"""What other hosts send is kept within bounds, and what is true survives a flood."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from portd.adapters.mdns import cache, wire
from portd.adapters.mdns.cache import RecordCache
from portd.adapters.mdns.wire import DNSRecord

WEB = "_http._tcp.local."
FOREVER = 2**31 - 1


def flood(size: int) -> list[DNSRecord]:
    """Make PTRs that claim to live for 68 years."""
    return [wire.with_ttl(wire.pointer(WEB, f"flood{number}.{WEB}"), FOREVER) for number in range(size)]


def test_a_flood_of_instances_is_bounded_and_pushes_nothing_out() -> None:
    kept = RecordCache()
    first = wire.pointer(WEB, f"Orders.{WEB}")
    kept.update([first], first.created)
    kept.update(flood(20_000), first.created)
    assert len(kept) == cache.INSTANCES_MAX
    assert kept.targets(WEB, first.created)[0] == f"Orders.{WEB}"


def test_a_flood_of_other_records_is_bounded() -> None:
    kept = RecordCache()
    for number in range(20_000):
        kept.update([wire.address(f"h{number}.local.", bytes([10, 9, number >> 8 & 255, number & 255]))], 1.0)
    assert len(kept) == cache.RECORDS_MAX


def test_no_record_is_kept_longer_than_the_longest_ttl() -> None:
    kept = RecordCache()
    records = flood(100)
    kept.update(records, records[0].created)
    assert not kept.expire(records[0].created + cache.TTL_MAX * 1000 - 1)
    assert kept.expire(records[-1].created + cache.TTL_MAX * 1000)
    assert len(kept) == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.sampled_from([0, 1, 120, FOREVER]), st.integers(0, 300), st.booleans()),
        max_size=80,
    )
)
def test_the_count_equals_the_records_after_any_history(steps: list[tuple[int, int, int, bool]]) -> None:
    kept, now_ms = RecordCache(), 1000.0
    for number, ttl, wait_s, is_pointer in steps:
        now_ms += wait_s * 1000
        name = f"s{number}.{WEB}"
        record = wire.pointer(WEB, name) if is_pointer else wire.service(name, number + 1, "h.local.")
        packet = wire.encode_response([wire.with_ttl(record, ttl)])[0]
        message = wire.decode(packet, now_ms)
        assert message is not None
        kept.expire(now_ms)
        kept.update(message.answers(), now_ms)
        present = kept.all(WEB, wire.PTR) + [one for n in range(9) for one in kept.all(f"s{n}.{WEB}", wire.SRV)]
        assert len(kept) == len(present)
    kept.expire(now_ms + cache.TTL_MAX * 1000 + 1000)
    assert len(kept) == 0


def test_records_with_unusable_names_are_dropped() -> None:
    kept = RecordCache()
    names = ["\ufffd" * 10 + "." + WEB, "x" * 64 + "." + WEB, "\x1b[31mred." + WEB, "\x9b31m." + WEB]
    kept.update([wire.pointer(WEB, name) for name in names], 1.0)
    kept.update([wire.service(f"a.{WEB}", 1, "\ufffd.local.")], 1.0)
    assert len(kept) == 0
