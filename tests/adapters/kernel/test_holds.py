"""Holds: what portd promises with them, whoever else is at the port. Real sockets, real processes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portd.adapters.kernel.holds import KernelHolds
from portd.adapters.kernel.netlink import SocketDiag
from portd.core.bindings import overlaps
from tests.adapters.kernel.foreign import can_bind, foreign, leave_behind

TEST_NET = "192.0.2.1"  # RFC 5737: nobody's address
RESTRICTED = 88  # a port below 1024 that nothing here uses

# --- who has the port already ---


@pytest.mark.parametrize("kind", ["shared", "exclusive", "none"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::", "0.0.0.0"])
@pytest.mark.parametrize(
    "options",
    [{"listen": True}, {"listen": True, "reuse": True}, {}, {"reuse": True}],
    ids=["listens", "listens, reuse", "bound", "bound, reuse"],
)
def test_tcp_port_of_a_foreign_process_is_busy(holds, port, descriptors, kind, address, options):
    with foreign(address, port, **options):
        before = descriptors()
        assert holds.take("a", "tcp", address, port, kind) == "busy"
        assert holds.take("a", "both", address, port, kind) == "busy"
        assert not holds.is_free("tcp", address, port)
        assert (holds.count, descriptors()) == (0, before)
    assert holds.take("a", "both", address, port, kind) == "taken"


@pytest.mark.parametrize("options", [{"listen": True, "reuse": True}, {"reuse": True}, {"udp": True}])
@pytest.mark.parametrize("address", ["127.0.0.2", "::1", "0.0.0.0", "::"])
def test_number_that_is_taken_at_any_address_is_not_whole(holds, port, descriptors, address, options):
    protocol = "udp" if options.get("udp") else "tcp"
    with foreign(address, port, **options):
        before = descriptors()
        assert holds.take("a", protocol, "127.0.0.1", port, "none", whole=True) == "busy"
        assert not holds.is_free(protocol, "127.0.0.1", port, whole=True)
        assert descriptors() == before
    assert holds.take("a", protocol, "127.0.0.1", port, "none", whole=True) == "taken"


@pytest.mark.parametrize("address", ["127.0.0.2", "::1", "0.0.0.0", "::"])
@pytest.mark.parametrize("options", [{"listen": True, "reuse": True}, {"reuse": True}])
def test_wildcard_hold_needs_the_number_at_every_address(holds, port, address, options):
    with foreign(address, port, **options):
        assert holds.take("a", "tcp", "::", port, "shared", whole=True) == "busy"
        assert not holds.is_free("tcp", "::", port, whole=True)
    assert holds.take("a", "tcp", "::", port, "shared", whole=True) == "taken"
    assert not can_bind(address, port)


@pytest.mark.parametrize("leave", ["TIME_WAIT", "an open connection"])
def test_connections_that_dead_server_left_do_not_keep_its_number(holds, spawn, port, leave):
    with leave_behind(spawn, "127.0.0.1", port, leave, reuse="reuse"):
        assert holds.take("a", "tcp", "127.0.0.1", port, "shared", whole=True) == "taken"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_localhost_is_held_at_both_loopback_addresses(holds, port, address):
    with foreign(address, port):
        assert holds.take("a", "tcp", "localhost", port, "shared") == "busy"
    assert holds.take("a", "tcp", "localhost", port, "shared") == "taken"
    assert not can_bind(address, port)
    assert can_bind(address, port, reuse=True, listen=True)
    assert len(holds.pass_on("a", "tcp", "localhost", port)) == 2
    holds.drop("a")
    assert can_bind(address, port)


@pytest.mark.parametrize("kind", ["shared", "exclusive", "none"])
@pytest.mark.parametrize("reuse", [False, True])
def test_udp_port_of_a_foreign_process_makes_both_busy(holds, port, descriptors, kind, reuse):
    with foreign("127.0.0.1", port, udp=True, reuse=reuse):
        before = descriptors()
        assert holds.take("a", "both", "127.0.0.1", port, kind) == "busy"
        assert (holds.count, descriptors()) == (0, before)
        assert holds.take("a", "tcp", "127.0.0.1", port, kind) == "taken"


@pytest.mark.parametrize("kind", ["shared", "exclusive", "none"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("leave", ["TIME_WAIT", "an open connection"])
def test_connections_that_dead_server_left_do_not_keep_its_port(holds, spawn, port, kind, address, leave):
    with leave_behind(spawn, address, port, leave, reuse="reuse"):
        assert not can_bind(address, port)
        assert holds.is_free("tcp", address, port)
        assert holds.take("a", "tcp", address, port, kind) == "taken"
        assert can_bind(address, port, reuse=True, listen=True) is (kind != "exclusive")


@pytest.mark.parametrize("leave", ["TIME_WAIT", "an open connection"])
def test_connections_of_a_non_reusing_server_keep_its_port(holds, spawn, port, leave):
    with leave_behind(spawn, "127.0.0.1", port, leave, reuse="no"):
        assert not can_bind("127.0.0.1", port, reuse=True)  # nor would the owner get it
        assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "busy"
        assert not holds.is_free("tcp", "127.0.0.1", port)


@pytest.mark.parametrize("kind", ["shared", "exclusive", "none"])
@pytest.mark.parametrize(
    ("address", "v6only", "taken"),
    [
        ("127.0.0.1", None, "busy"),
        ("0.0.0.0", None, "busy"),
        ("::", False, "busy"),
        ("::ffff:127.0.0.1", False, "busy"),
        ("::", True, "taken"),
        ("127.0.0.2", None, "taken"),
        ("::1", None, "taken"),
    ],
)
def test_foreign_socket_behind_old_connections_is_seen_before_it_listens(
    holds, spawn, port, kind, address, v6only, taken
):
    with (
        leave_behind(spawn, "127.0.0.1", port, "an open connection", reuse="reuse"),
        foreign(address, port, reuse=True, v6only=v6only),
    ):
        assert holds.take("a", "tcp", "127.0.0.1", port, kind) == taken
        assert holds.is_free("tcp", "127.0.0.1", port) is (taken == "taken" and kind == "none")


def test_behind_old_connections_a_hold_is_never_taken_twice(holds, spawn, port):
    with leave_behind(spawn, "127.0.0.1", port, "an open connection", reuse="reuse"):
        assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "taken"
        assert holds.take("b", "tcp", "127.0.0.1", port, "shared") == "busy"


@pytest.mark.parametrize("blindness", ["sees nothing bound", "can't be read"])
def test_socket_table_that_does_not_show_hold_itself_proves_nothing(spawn, port, descriptors, blindness):
    """As before Linux 6.8, or where a sandbox forbids netlink."""

    def blind(protocol, port):
        if blindness == "can't be read":
            raise PermissionError(errno.EPERM, "no netlink here")
        return []

    holds = KernelHolds(blind)
    with leave_behind(spawn, "127.0.0.1", port, "an open connection", reuse="reuse"):
        before = descriptors()
        assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "busy"
        assert descriptors() == before


# --- UDP, and both ---


def test_both_is_one_lock_each_and_shared_keeps_only_tcp(holds, port):
    assert holds.take("a", "both", "127.0.0.1", port, "exclusive") == "taken"
    assert set(holds.sockets("a")) == {"tcp", "udp"}
    assert {one.getsockname() for one in holds.sockets("a").values()} == {("127.0.0.1", port)}
    holds.drop("a")
    assert holds.take("a", "both", "127.0.0.1", port, "shared") == "taken"
    assert set(holds.sockets("a")) == {"tcp"}
    assert can_bind("127.0.0.1", port, udp=True)
    assert holds.take("b", "udp", "127.0.0.1", port, "none") == "taken"
    assert set(holds.sockets("b")) == set()


def test_bound_udp_hold_is_left_out_of_the_listeners(diag, port):
    holds = KernelHolds(diag.bound)
    table = SocketDiag(holds.inodes)
    with contextlib.closing(table), contextlib.closing(holds):
        assert holds.take("a", "both", "127.0.0.1", port, "exclusive") == "taken"
        assert table.listeners(port) == []
        with contextlib.closing(socket.socket(fileno=os.dup(holds.sockets("a")["tcp"].fileno()))) as handed_over:
            handed_over.listen()
            assert [one.protocol for one in table.listeners(port)] == ["tcp"]
        holds.drop("a")
        assert list(holds.inodes()) == []


# --- what can't be taken ---


@pytest.mark.parametrize("address", [TEST_NET, "2001:db8::1", "fe80::1"])
def test_address_of_another_host_is_no_address(holds, port, address):
    assert holds.take("a", "both", address, port, "shared") == "no_address"
    assert holds.is_free("both", address, port)


def test_a_port_that_only_root_may_bind_is_forbidden(holds, as_nobody):
    with as_nobody():
        assert holds.take("a", "tcp", "127.0.0.9", RESTRICTED, "shared") == "forbidden"
        assert not holds.is_free("tcp", "127.0.0.9", RESTRICTED)
    assert holds.take("a", "tcp", "127.0.0.9", RESTRICTED, "shared") == "taken"


@pytest.mark.parametrize("left", [0, 1])
def test_at_the_file_limit_nothing_is_taken_not_even_half(holds, port, no_descriptor_left, descriptors, left):
    before = descriptors()
    with no_descriptor_left(left):
        assert holds.take("a", "both", "127.0.0.1", port, "exclusive") == "no_descriptors"
        assert not holds.is_free("both", "127.0.0.1", port)
        assert not holds.restore("a", "both", "127.0.0.1", port, "exclusive")
    assert (holds.count, descriptors()) == (0, before)
    assert can_bind("127.0.0.1", port)


# --- the life of a hold ---


def test_hold_is_not_passed_on_by_exec_and_never_waits(holds, port):
    assert holds.take("a", "both", "127.0.0.1", port, "exclusive") == "taken"
    for held in holds.sockets("a").values():
        assert not held.get_inheritable()
        assert not held.getblocking()


def test_what_is_dropped_is_free_and_may_be_dropped_again(holds, port, descriptors):
    before = descriptors()
    assert holds.take("a", "both", "127.0.0.1", port, "exclusive") == "taken"
    assert (holds.count, [lease for lease, _ in holds.held()]) == (1, ["a"])
    holds.drop("a")
    holds.drop("a")
    assert (holds.count, descriptors(), holds.is_free("both", "127.0.0.1", port)) == (0, before, True)


def test_a_hold_is_restored_once_its_owner_stops_listening(holds, port):
    with foreign("127.0.0.1", port, reuse=True, listen=True):
        assert not holds.restore("a", "tcp", "127.0.0.1", port, "shared")
    with foreign("127.0.0.1", port, reuse=True):
        assert not holds.restore("a", "tcp", "127.0.0.1", port, "shared")
    assert holds.restore("a", "tcp", "127.0.0.1", port, "shared")
    assert holds.restore("a", "tcp", "127.0.0.1", port, "shared")
    assert holds.count == 1
    assert can_bind("127.0.0.1", port, reuse=True)


def test_shared_hold_of_both_is_restored_beside_a_udp_socket(holds, port):
    with foreign("127.0.0.1", port, udp=True):
        assert holds.restore("a", "both", "127.0.0.1", port, "shared")
        assert not can_bind("127.0.0.1", port)
        assert holds.restore("b", "udp", "127.0.0.1", port, "none")
        assert not holds.restore("c", "udp", "127.0.0.1", port, "exclusive")


def test_sockets_that_outlived_another_daemon_are_holds_again(holds, port):
    assert holds.take("a", "both", "127.0.0.1", port, "exclusive") == "taken"
    passed = [socket.socket(fileno=os.dup(held.fileno())) for held in holds.sockets("a").values()]
    for one in passed:
        one.set_inheritable(True)  # as systemd passes them
    holds.drop("a")
    assert not can_bind("127.0.0.1", port)
    holds.adopt("b", passed)
    assert holds.restore("b", "both", "127.0.0.1", port, "exclusive")
    assert set(holds.sockets("b")) == {"tcp", "udp"}
    assert not any(one.get_inheritable() or one.getblocking() for one in holds.sockets("b").values())
    holds.drop("b")
    assert holds.is_free("both", "127.0.0.1", port)


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("take"),
            st.sampled_from("abcd"),
            st.sampled_from(["tcp", "udp", "both"]),
            st.sampled_from(["127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::", TEST_NET]),
            st.integers(0, 1),
            st.sampled_from(["shared", "exclusive", "none"]),
        ),
        st.tuples(st.just("drop"), st.sampled_from("abcd")),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_no_sequence_of_holds_binds_twice_or_leaks_descriptors(steps):
    low = 29_100  # two ports; a foreign process on one of them would only make more takes busy
    held: dict[str, list[tuple[str, str, int]]] = {}
    with contextlib.closing(SocketDiag()) as diag, contextlib.closing(KernelHolds(diag.bound)) as holds:
        diag.listeners(1)
        before = len(os.listdir("/proc/self/fd"))
        for step, lease, *rest in steps:
            if step == "drop":
                holds.drop(lease)
                held.pop(lease, None)
            elif lease not in held:
                protocol, address, offset, kind = rest
                places = [(part, address, low + offset) for part in ("tcp", "udp") if protocol in (part, "both")]
                conflicting = any(
                    part == its_part and port == its_port and overlaps(address, its_address)
                    for (part, _, port) in places
                    for (its_part, its_address, its_port) in itertools.chain(*held.values())
                )
                taken = holds.take(lease, protocol, address, low + offset, kind)
                assert not (taken == "taken" and conflicting)
                kept = [place for place in places if kind == "exclusive" or (kind == "shared" and place[0] == "tcp")]
                if taken == "taken" and kept:
                    held[lease] = kept
            assert holds.count == len(held)
            assert len(os.listdir("/proc/self/fd")) - before == sum(map(len, held.values()))
