"""The socket table, asked for real sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from portd.adapters.kernel import netlink
from portd.adapters.kernel.netlink import SocketDiag


def bound(
    address: str, kind: socket.SocketKind = socket.SOCK_STREAM, *, listen: bool = False, v6only: bool = True
) -> socket.socket:
    """Bind to a port of the kernel's choice."""
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    if one.family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    one.bind((address, 0))
    if listen:
        one.listen()
    return one


def inode(one: socket.socket) -> int:
    return os.fstat(one.fileno()).st_ino


def port(one: socket.socket) -> int:
    return one.getsockname()[1]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("address", "v6only"), [("127.0.0.1", True), ("0.0.0.0", True), ("::1", True), ("::", True), ("::", False)]
)
def test_a_listener_is_listed_with_its_address_user_and_socket(diag, address, v6only, everything):
    with bound(address, listen=True, v6only=v6only) as server:
        number = port(server)
        found = [one for one in diag.listeners(None if everything else number) if one.inode == inode(server)]
    assert [(one.protocol, one.address, one.port, one.uid, one.v6only) for one in found] == [
        ("tcp", address, number, os.getuid(), v6only)
    ]


def test_only_the_asked_port_is_listed(diag):
    with bound("127.0.0.1", listen=True) as one, bound("127.0.0.1", listen=True) as other:
        assert [found.inode for found in diag.listeners(port(one))] == [inode(one)]
        assert {inode(one), inode(other)} <= {found.inode for found in diag.listeners()}


def test_udp_socket_counts_while_it_is_bound_and_not_connected(diag):
    with bound("127.0.0.1", socket.SOCK_DGRAM) as server:
        assert [(one.protocol, one.inode) for one in diag.listeners(port(server))] == [("udp", inode(server))]
        server.connect(("127.0.0.1", 9))
        assert diag.listeners(port(server)) == []


def test_socket_that_never_listens_is_bound_but_no_listener(diag):
    with bound("127.0.0.1") as hold:
        assert diag.listeners(port(hold)) == []
        assert [one.inode for one in diag.bound("tcp", port(hold))] == [inode(hold)]


def test_only_portds_own_udp_holds_are_left_out():
    with (
        bound("127.0.0.1", socket.SOCK_DGRAM) as hold,
        bound("127.0.0.1", listen=True) as handed,
        contextlib.closing(SocketDiag(lambda: {inode(hold), inode(handed)})) as diag,
    ):
        assert diag.listeners(port(hold)) == []
        assert [one.inode for one in diag.listeners(port(handed))] == [inode(handed)]


def test_ipv4_mapped_listener_is_listed_by_its_ipv4_address(diag):
    with bound("::ffff:127.0.0.1", listen=True, v6only=False) as server:
        assert [one.address for one in diag.listeners(port(server))] == ["127.0.0.1"]


@contextlib.contextmanager
def connection(server_address: str, client_address: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Connect, perhaps between sockets of two families; yields (accepted, client)."""
    with (
        bound(server_address, listen=True, v6only=False) as server,
        socket.socket(socket.AF_INET6 if ":" in client_address else socket.AF_INET) as client,
    ):
        client.connect((client_address, port(server)))
        accepted, _ = server.accept()
        with accepted:
            yield accepted, client


@pytest.mark.parametrize(
    ("server", "client"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1"), ("127.0.0.1", "::ffff:127.0.0.1")],
)
def test_other_end_of_connection_is_found_whatever_its_family(diag, server, client):
    with connection(server, client) as (accepted, caller):
        found = diag.exact(accepted.getsockname()[:2], accepted.getpeername()[:2])
        assert found == (os.getuid(), inode(caller))


def test_an_orphan_of_a_closed_connection_has_no_owner(diag):
    with connection("127.0.0.1", "127.0.0.1") as (accepted, caller):
        ends = accepted.getsockname(), accepted.getpeername()
        caller.close()  # it answers uid 0 and inode 0 from now on
        assert diag.exact(*ends) is None


def test_listener_on_a_closed_connections_port_is_not_the_caller(diag):
    with bound("127.0.0.1") as server:
        server.listen()
        caller = socket.socket()
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        caller.bind(("127.0.0.1", 0))
        caller.connect(server.getsockname())
        accepted, ends = server.accept()[0], (server.getsockname(), caller.getsockname())
        with accepted, socket.socket() as victim:
            victim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
            victim.bind(("0.0.0.0", ends[1][1]))
            victim.listen()
            assert diag.exact(*ends) == (os.getuid(), inode(caller))
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.close()  # with a reset: nothing is left of it
            assert diag.exact(*ends) is None


def test_unknown_connection_is_not_found(diag):
    assert diag.exact(("127.0.0.1", 1), ("127.0.0.1", 2)) is None
    assert diag.exact(("::1", 1), ("::1", 2)) is None


def test_many_listeners_are_listed_whole(diag):
    with contextlib.ExitStack() as stack:
        servers = {inode(stack.enter_context(bound("127.0.0.1", listen=True))) for _ in range(800)}
        assert servers <= {one.inode for one in diag.listeners()}


class Interrupted:
    """A netlink socket whose first dumps say that the table changed under them."""

    def __init__(self, real: socket.socket, times: int) -> None:
        self.real = real
        self.times = times

    def send(self, data: bytes) -> int:
        return self.real.send(data)

    def close(self) -> None:
        self.real.close()

    def recv(self, size: int) -> bytes:
        data = bytearray(self.real.recv(size))
        if self.times:
            self.times -= 1
            struct.pack_into("=H", data, 6, struct.unpack_from("=H", data, 6)[0] | netlink.NLM_F_DUMP_INTR)
        return bytes(data)


@pytest.mark.parametrize("times", [1, netlink.DUMP_TRIES - 1])
def test_a_dump_that_changed_under_the_reader_is_taken_again(monkeypatch, times):
    connect = SocketDiag._connect
    interrupted = Interrupted(None, times)

    def connected(diag):
        interrupted.real = connect(diag)
        return interrupted

    monkeypatch.setattr(SocketDiag, "_connect", connected)
    with bound("127.0.0.1", listen=True) as server, contextlib.closing(SocketDiag()) as diag:
        assert [one.inode for one in diag.listeners(port(server))] == [inode(server)]


def test_table_that_never_stands_still_is_error_not_loop(monkeypatch):
    connect = SocketDiag._connect
    monkeypatch.setattr(SocketDiag, "_connect", lambda diag: Interrupted(connect(diag), 1_000))
    with contextlib.closing(SocketDiag()) as diag, pytest.raises(OSError, match="changed"):
        diag.listeners()


def test_error_in_a_dump_does_not_spoil_the_next(diag, monkeypatch):
    with bound("127.0.0.1", listen=True) as server:
        monkeypatch.setattr(netlink, "messages", lambda data: (_ for _ in ()).throw(OSError("cut off")))
        with pytest.raises(OSError, match="cut off"):
            diag.listeners()
        monkeypatch.undo()
        assert [one.inode for one in diag.listeners(port(server))] == [inode(server)]


def test_a_closed_table_opens_again_and_closes_twice(diag):
    diag.close()
    assert isinstance(diag.listeners(), list)
    diag.close()
    diag.close()
