"""What a host publishes: addresses that others reach, in fenced batches within etcd's bounds, under a claimed name."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from portd.cluster.entries import EndpointKey, HostEntry, decode_lease, encode_host, encode_lease, endpoint_key
from portd.cluster.publisher import BATCH_BYTES, BATCH_MAX, DEBOUNCE_S, Publisher
from portd.core.model import HttpCheck, Lease, Owner

ADVERTISE = ("10.1.0.7", "fd00::7")


def lease(number=1, **fields):
    base = Lease(
        id=f"id-{number}",
        service="orders",
        instance=f"orders-{number}",
        endpoint="main",
        protocol="tcp",
        address="0.0.0.0",
        port=20000,
        pool="default",
        hold="shared",
        state="bound",
        lifetime="process",
        owner=Owner(known_by="socket", cmdline=("secret",)),
        host="a",
        created_at=1.0,
    )
    return replace(base, **fields)


def claimed(*leases):
    publisher = Publisher("a", HostEntry(machine="m"), ADVERTISE)
    for one in leases:
        publisher.observe(one, 0.0)
    publisher.claimed(7, 5, (), 0.0)
    return publisher


@pytest.mark.parametrize(
    ("listening", "published"),
    [
        (("0.0.0.0",), ("10.1.0.7",)),
        (("::",), ADVERTISE),
        (("127.0.0.1",), None),
        (("127.0.0.1", "192.168.1.2"), ("192.168.1.2",)),
        (("::1",), None),
        (("fe80::1",), None),
    ],
)
def test_entry_has_only_addresses_that_others_reach(listening, published):
    value = encode_lease(lease(listening=listening), ADVERTISE)
    assert (None if value is None else tuple(msgspec.json.decode(value)["addresses"])) == published


def test_entry_holds_nothing_secret():
    check = HttpCheck(path="/up?key=secret", headers={"Authorization": "secret"})
    value = encode_lease(lease(check=check, token_hash=b"secret", health_note="secret"), ADVERTISE)
    assert b"secret" not in value


def test_entry_survives_the_round_trip():
    one = lease(tags=("blue",), metadata={"v": "1"}, weight=3, drain=True, check=HttpCheck(), health="critical")
    back = decode_lease(EndpointKey("orders", "a", "orders-1", "main"), encode_lease(one, ADVERTISE))
    for field in ("id", "host", "port", "tags", "metadata", "weight", "drain", "check", "health", "state"):
        assert getattr(back, field) == getattr(one, field)


@pytest.mark.parametrize("value", [b"", b"{}", b"[", b'{"id":"x","addresses":["127.0.0.1"],"port":1}', b"\xff" * 9])
def test_malformed_entry_is_ignored(value):
    assert decode_lease(EndpointKey("orders", "a", "orders-1", "main"), value) is None


def test_batch_stays_within_the_bounds_of_a_transaction():
    publisher = claimed(*(lease(n, metadata={"k": "x" * 16_000}) for n in range(300)))
    written = {}
    while batch := publisher.next_batch(1.0):
        assert len(batch.changes) <= BATCH_MAX + 1
        assert sum(len(value or b"") for _, value in batch.changes) < 2 * BATCH_BYTES
        written.update(batch.changes)
        publisher.committed(batch, batch.fence + 1)
    assert len([key for key in written if key.startswith("portd/v1/s/")]) == 300


def test_change_waits_for_others_before_it_is_written():
    publisher = claimed(lease())
    while batch := publisher.next_batch(1.0):
        publisher.committed(batch, 6)
    publisher.observe(lease(drain=True), 2.0)
    assert publisher.next_batch(2.0) is None
    assert publisher.next_batch(2.0 + DEBOUNCE_S) is not None


def test_failed_batch_is_written_again_once_the_fence_is_known():
    publisher = claimed(lease())
    batch = publisher.next_batch(1.0)
    publisher.failed(batch, 1.0)
    assert publisher.next_batch(9.0) is None
    publisher.verified(6)
    assert publisher.next_batch(9.0).fence == 6


def test_change_and_change_back_writes_nothing():
    publisher = claimed(lease())
    while batch := publisher.next_batch(1.0):
        publisher.committed(batch, 6)
    publisher.observe(lease(drain=True), 2.0)
    publisher.observe(lease(), 2.01)
    assert publisher.due_at() is None


def test_another_machines_name_is_left_alone():
    publisher = claimed(lease())
    other = encode_host(HostEntry(machine="other", address="10.1.0.9"))
    assert not publisher.may_adopt(other)
    publisher.refused(other)
    assert publisher.due_at() is None
    assert publisher.name_holder.address == "10.1.0.9"


def test_keys_of_a_run_before_are_withdrawn_or_written_again():
    old = endpoint_key(lease(9), "a")
    publisher = Publisher("a", HostEntry(machine="m"), ADVERTISE)
    publisher.observe(lease(), 0.0)
    publisher.claimed(7, 5, [old, endpoint_key(lease(), "a")], 0.0)
    changes = dict(publisher.next_batch(0.0).changes)
    assert changes[old] is None
    assert changes[endpoint_key(lease(), "a")] is not None
