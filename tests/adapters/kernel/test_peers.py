"""Who calls: real connections of real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from portd.adapters.kernel.netlink import SocketDiag
from portd.adapters.kernel.peers import KernelPeers

REPOSITORY = str(Path(__file__).parents[3])

# It becomes somebody, connects, says that it has, and waits; `then` runs in between.
CALLER = """
import os, socket, sys
family, where, become, then = sys.argv[1:]
exec(become)
caller = socket.socket(getattr(socket, family))
if family == "AF_INET6":
    caller.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
caller.connect(eval(where))
exec(then)
print(os.getpid(), flush=True)
sys.stdin.read()
"""

ENTER_NETWORK = "import ctypes; ctypes.CDLL(None).unshare(1 << 30)"  # CLONE_NEWNET


@pytest.fixture
def peers() -> Iterator[KernelPeers]:
    with contextlib.closing(SocketDiag()) as diag:
        yield KernelPeers(diag.exact)


@pytest.fixture
def call(spawn):
    """Let a process connect; returns this side of the connection, and the process."""
    with contextlib.ExitStack() as opened:

        def connect(
            family: str,
            address: str = "127.0.0.1",
            *,
            become: str = "",
            then: str = "",
            to: str = "",
            path: object = "",
        ):
            server = opened.enter_context(listening(str(path) if family == "AF_UNIX" else address))
            where = (to, server.getsockname()[1]) if to else server.getsockname()
            child = spawn(family, repr(where), become, then, python=CALLER)
            server.settimeout(20)
            return opened.enter_context(server.accept()[0]), child

        yield connect


def listening(address: str) -> socket.socket:
    """Listen on an IP address, or on an abstract unix address of the kernel's choice, which anybody may reach."""
    if address and not address.startswith("/"):
        return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    return server


def of_tcp(peers, connection):
    return peers.of_tcp(connection.getsockname()[:2], connection.getpeername()[:2])


# --- over a unix socket ---


def test_unix_caller_is_known_by_what_it_was_at_connect(peers, call, as_root):
    connection, child = call("AF_UNIX", become="os.setgroups([4711, 4712]); os.setgid(4710); os.setuid(65534)")
    peer = peers.of_unix(connection)
    assert peer == (65534, child.pid, frozenset({4710, 4711, 4712}), "peercred", 0, False, False)


def test_a_unix_peer_of_another_network_namespace_is_marked(peers, call, tmp_path, as_root):
    connection, _ = call("AF_UNIX", path=tmp_path / "socket", become=ENTER_NETWORK)
    assert peers.of_unix(connection).other_network
    assert not peers.of_unix(call("AF_UNIX")[0]).other_network


def test_a_peer_that_entered_another_network_after_connecting_is_marked(peers, call, as_root):
    connection, child = call("AF_UNIX", then=ENTER_NETWORK)
    child.stdout.readline()
    assert peers.of_unix(connection).other_network


def test_socket_of_another_network_is_marked_after_its_opener_exited(peers, call, tmp_path, as_root):
    connection, child = call("AF_UNIX", path=tmp_path / "socket", become=ENTER_NETWORK)
    child.kill()
    child.wait()
    assert peers.of_unix(connection).other_network


@pytest.mark.parametrize("family", ["AF_UNIX", "AF_INET"])
def test_uid_0_of_another_user_namespace_is_marked(run, peers, call, family, as_root):
    async def main(connection):
        peer = peers.of_unix(connection) if family == "AF_UNIX" else of_tcp(peers, connection)
        return await peers.with_pid(peer)

    enter = "import ctypes; ctypes.CDLL(None).unshare(1 << 28); open('/proc/self/uid_map', 'w').write('0 0 1')"
    inside, outside = call(family, become=enter)[0], call(family)[0]
    contained, root = run(main(inside)), run(main(outside))
    assert (contained.uid, contained.other_users) == (0, True)
    assert (root.uid, root.other_users) == (0, False)


def test_peer_has_all_groups_of_an_ordinary_caller(peers, call):
    connection, child = call("AF_UNIX")
    peer = peers.of_unix(connection)
    assert (peer.uid, peer.pid) == (os.geteuid(), child.pid)
    assert peer.groups == {os.getegid(), *os.getgroups()}


def test_caller_of_very_many_groups_has_those_of_group_database(peers, call, as_root):
    connection, child = call("AF_UNIX", become="os.setgroups(range(2000, 2400)); os.setgid(4710); os.setuid(65534)")
    peer = peers.of_unix(connection)
    nobody = pwd.getpwuid(65534)
    assert (peer.uid, peer.pid) == (65534, child.pid)
    assert peer.groups == {4710, *os.getgrouplist(nobody.pw_name, nobody.pw_gid)}


def test_a_connection_that_asyncio_or_uvloop_accepted_tells_its_caller(run, peers, spawn, tmp_path):
    async def main():
        met = asyncio.get_running_loop().create_future()

        async def accept(reader, writer):
            met.set_result(peers.of_unix(writer.get_extra_info("socket")))
            writer.close()

        server = await asyncio.start_unix_server(accept, tmp_path / "s")
        child = spawn("AF_UNIX", repr(str(tmp_path / "s")), "", "", python=CALLER)
        assert (await asyncio.wait_for(met, 20)).pid == child.pid
        server.close()
        await server.wait_closed()

    run(main())


def test_a_caller_from_outside_our_pid_namespace_has_no_pid(spawn, tmp_path, as_root):
    server = spawn(
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        sys.executable,
        "-c",
        f"""
import socket, sys
sys.path.insert(0, {REPOSITORY!r})
from portd.adapters.kernel.peers import KernelPeers
server = socket.socket(socket.AF_UNIX); server.bind({str(tmp_path / "s")!r}); server.listen()
print(flush=True)
connection, _ = server.accept()
print(KernelPeers(None).of_unix(connection).pid, flush=True)
""",
    )
    server.stdout.readline()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(tmp_path / "s"))
        assert server.stdout.readline() == "None\n"


# --- over loopback TCP ---


@pytest.mark.parametrize(
    ("family", "address", "to"),
    [
        ("AF_INET", "127.0.0.1", ""),
        ("AF_INET", "127.0.0.1", "127.77.1.2"),
        ("AF_INET6", "::1", ""),
        ("AF_INET6", "127.0.0.1", "::ffff:127.0.0.1"),
    ],
    ids=["IPv4", "IPv4 to another address", "IPv6", "IPv4 from an IPv6 socket, as Java's"],
)
def test_tcp_caller_is_known_by_socket_at_other_end(run, peers, call, as_root, family, address, to):
    if to == "127.77.1.2":
        address = "0.0.0.0"
    connection, child = call(family, address, become="os.setgid(65534); os.setuid(65534)", to=to)
    peer = of_tcp(peers, connection)
    nobody = pwd.getpwuid(65534)
    assert (peer.uid, peer.pid, peer.known_by) == (65534, None, "socket")
    assert peer.groups == set(os.getgrouplist(nobody.pw_name, nobody.pw_gid))
    assert peer.inode != 0
    child.stdout.readline()
    found = run(peers.with_pid(peer))
    assert found == peer._replace(pid=child.pid)
    assert run(peers.with_pid(found)) == found  # it is among the recent ones now


def test_a_user_without_a_name_has_no_groups_over_tcp(peers, call, as_root):
    connection, _ = call("AF_INET", become="os.setuid(3999999)")
    assert of_tcp(peers, connection)[:3] == (3999999, None, frozenset())


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_other_end_of_dead_process_is_nobodys_and_never_roots(peers, call, wait_until, address):
    connection, child = call("AF_INET6" if ":" in address else "AF_INET", address)
    assert of_tcp(peers, connection) is not None
    child.kill()
    child.wait()
    assert connection.recv(1) == b""
    wait_until(lambda: of_tcp(peers, connection) is None)  # an orphan now, in FIN_WAIT2: it would answer uid 0
    connection.close()


def test_what_the_socket_table_calls_an_orphan_is_refused():
    """Should an answer with inode 0 ever reach it."""
    assert KernelPeers(lambda local, remote: (0, 0)).of_tcp(("127.0.0.1", 1), ("127.0.0.1", 2)) is None


def test_a_connection_that_is_not_there_is_nobodys(peers):
    assert peers.of_tcp(("127.0.0.1", 1), ("127.0.0.1", 2)) is None


def test_of_family_that_inherited_connection_eldest_has_called(run, peers, call):
    connection, child = call(
        "AF_INET",
        then="""
reading, writing = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(writing, b"there is a grandchild")
    sys.stdin.read()
    os._exit(0)
os.read(reading, 1)
""",
    )
    child.stdout.readline()
    assert run(peers.with_pid(of_tcp(peers, connection))).pid == child.pid


def test_caller_with_hidden_descriptors_has_a_uid_and_no_pid(run, peers, call, as_nobody):
    connection, child = call("AF_INET")
    child.stdout.readline()
    peer = of_tcp(peers, connection)
    with as_nobody():
        hidden = run(peers.with_pid(peer))
    assert (hidden.uid, hidden.pid) == (0, None)
    assert run(peers.with_pid(peer)).pid == child.pid


def test_our_own_connection_is_found_last_but_found(run, peers):
    with (
        listening("127.0.0.1") as server,
        socket.create_connection(server.getsockname()),
        server.accept()[0] as connection,
    ):
        assert run(peers.with_pid(of_tcp(peers, connection))).pid == os.getpid()


def test_many_callers_at_once_are_each_found(run, peers, call):
    calls = [call("AF_INET") for _ in range(5)]

    async def main():
        found = await asyncio.gather(*(peers.with_pid(of_tcp(peers, connection)) for connection, _ in calls))
        assert [peer.pid for peer in found] == [child.pid for _, child in calls]

    run(main())


def test_callers_are_identified_though_an_earlier_one_hangs_up(run, peers, call):
    calls = [call("AF_INET") for _ in range(5)]

    async def main():
        looks = []
        for connection, _ in calls:
            looks.append(asyncio.create_task(peers.with_pid(of_tcp(peers, connection))))
            await asyncio.sleep(0)
            looks[0].cancel()
        gone, *found = await asyncio.gather(*looks, return_exceptions=True)
        assert isinstance(gone, asyncio.CancelledError)
        assert [peer.pid for peer in found] == [child.pid for _, child in calls[1:]]

    run(main())
