"""LeaseTable: never two leases in conflict, and indexes that agree with the leases."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from portd.core.bindings import Binding, binding_of, conflicts
from portd.core.model import Event, Lease, Owner, ProcessId
from portd.core.table import LeaseTable

ADDRESSES = ["127.0.0.1", "127.0.0.2", "0.0.0.0", "::", "::1"]


def lease(lease_id="a", instance="orders-1", port=20000, address="127.0.0.1", protocol="tcp", pid=1, endpoint="main"):
    return Lease(
        id=lease_id,
        service="orders",
        instance=instance,
        endpoint=endpoint,
        protocol=protocol,
        address=address,
        port=port,
        pool="default",
        hold="shared",
        lifetime="process",
        owner=Owner(pid=pid, uid=pid % 3, known_by="peercred"),
        uid=pid % 3,
        host="h",
        created_at=0.0,
        process=ProcessId(pid, 1, "boot"),
    )


def granted(table, made):
    table.reserve(made, None)
    table.apply(Event(table.revision + 1, "granted", 0.0, made))
    return made


@pytest.mark.parametrize(
    ("reserved", "wanted", "collide"),
    [
        (("tcp", "127.0.0.1"), ("tcp", "0.0.0.0"), True),
        (("tcp", "0.0.0.0"), ("tcp", "127.0.0.1"), True),
        (("tcp", "127.0.0.1"), ("tcp", "::"), True),
        (("tcp", "127.0.0.1"), ("udp", "127.0.0.1"), False),
        (("both", "127.0.0.1"), ("udp", "127.0.0.1"), True),
        (("tcp", "127.0.0.1"), ("tcp", "127.0.0.2"), False),
        (("tcp", "::1"), ("tcp", "127.0.0.1"), False),
        (("tcp", "::1"), ("tcp", "::"), True),
    ],
)
def test_bindings_conflict_by_the_kernels_rules(reserved, wanted, collide):
    table = LeaseTable()
    table.reserve(lease(protocol=reserved[0], address=reserved[1]), None)
    assert (table.conflicting(Binding(wanted[0], wanted[1], 20000)) is not None) == collide


def test_a_name_or_binding_is_reserved_once():
    table = LeaseTable()
    table.reserve(lease(), None)
    with pytest.raises(AssertionError):
        table.reserve(lease("b", instance="orders-2"), None)
    with pytest.raises(AssertionError):
        table.reserve(lease("b", port=20001), None)


def test_the_lowest_free_instance_number_is_chosen():
    table = LeaseTable()
    for number in (1, 2, 4):
        granted(table, lease(str(number), instance=f"orders-{number}", port=20000 + number))
    assert table.free_instance("orders", "main") == "orders-3"
    table.apply(Event(table.revision + 1, "ended", 0.0, msgspec.structs.replace(table.get("1"), state="ended")))
    assert table.free_instance("orders", "main") == "orders-1"
    assert table.free_instance("billing", "main") == "billing-1"
    long = "x" * 63
    assert table.free_instance(long, "main") == "x" * 61 + "-1"


def test_endpoints_of_one_call_share_an_instance():
    table = LeaseTable()
    table.reserve(lease(instance="orders-1"), None)
    assert table.free_instance("orders", "metrics", ["orders-1"]) == "orders-1"
    assert table.free_instance("orders", "main", ["orders-1"]) == "orders-2"


def test_revisions_only_grow():
    table = LeaseTable()
    made = granted(table, lease())
    with pytest.raises(AssertionError):
        table.apply(Event(table.revision, "updated", 0.0, made))


class TableMachine(RuleBasedStateMachine):
    """Reservations, grants, moves and ends in any order, against a plain list of leases."""

    def __init__(self):
        super().__init__()
        self.table = LeaseTable()
        self.live: dict[str, Lease] = {}
        self.count = 0

    @rule(
        instance=st.integers(1, 4),
        port=st.integers(1, 3),
        address=st.sampled_from(ADDRESSES),
        protocol=st.sampled_from(["tcp", "udp", "both"]),
        pid=st.integers(1, 3),
    )
    def grant(self, instance, port, address, protocol, pid):
        self.count += 1
        wanted = lease(str(self.count), f"orders-{instance}", port, address, protocol, pid)
        free = all(not conflicts(binding_of(wanted), binding_of(other)) for other in self.live.values())
        assert (self.table.conflicting(binding_of(wanted)) is None) == free
        if free and self.table.named(*wanted.name) is None:
            self.live[wanted.id] = granted(self.table, wanted)

    @rule(data=st.data(), port=st.integers(4, 6))
    def move(self, data, port):
        if not self.live:
            return
        old = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        new = msgspec.structs.replace(old, port=port)
        if self.table.conflicting(binding_of(new)) is None:
            self.table.reserve_move(new, None)
            self.table.apply(Event(self.table.revision + 1, "declined", 0.0, new))
            self.live[new.id] = new

    @rule(data=st.data())
    def end(self, data):
        if self.live:
            gone = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
            ended = msgspec.structs.replace(gone, state="ended")
            self.table.apply(Event(self.table.revision + 1, "ended", 0.0, ended))

    @invariant()
    def indexes_agree_with_the_leases(self):
        assert {made.id for made in self.table} == set(self.live)
        for port in range(1, 7):
            expected = {made.id for made in self.live.values() if made.port == port}
            assert {made.id for made in self.table.on_port(port)} == expected
        for pid in range(1, 4):
            expected = {made.id for made in self.live.values() if made.process.pid == pid}
            assert {made.id for made in self.table.of_process(ProcessId(pid, 1, "boot"))} == expected
        assert set(self.table.of_service("orders")) == set(self.live)
        assert sum(self.table.count_of_user(uid) for uid in range(3)) == len(self.live)


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
