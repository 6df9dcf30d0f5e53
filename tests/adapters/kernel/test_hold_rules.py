"""What the kernel promises of a held port: whom it keeps off, and whom it lets in. Real sockets, real servers."""

from __future__ import annotations

import asyncio
import errno
import http.server
import itertools
import socket
import socketserver
import struct
import sys

import pytest
from aiohttp import web

from portd.core.bindings import overlaps
from tests.adapters.kernel.foreign import can_bind, foreign

IP_LOCAL_PORT_RANGE = 51  # Linux 6.3: the kernel's choice for this socket

# --- sockets ---


def test_over_shared_hold_server_listens_and_bare_bind_does_not(holds, port):
    assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "taken"
    assert not can_bind("127.0.0.1", port)
    with foreign("127.0.0.1", port, reuse=True, listen=True) as server:
        with socket.create_connection(("127.0.0.1", port)) as client:
            connection, _ = server.accept()
            connection.close()
            assert client.recv(1) == b""
        assert not can_bind("127.0.0.1", port, reuse=True)


def test_java_listens_over_a_shared_hold_with_an_ipv6_socket(holds, port):
    assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "taken"
    assert not can_bind("::ffff:127.0.0.1", port, v6only=False)
    assert can_bind("::ffff:127.0.0.1", port, v6only=False, reuse=True, listen=True)


def test_over_roots_shared_hold_any_user_listens(holds, port, as_nobody):
    assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "taken"
    with as_nobody():
        assert can_bind("127.0.0.1", port, reuse=True, listen=True)
        assert not can_bind("127.0.0.1", port)


@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
def test_an_exclusive_hold_keeps_everybody_off(holds, port, udp, reuse):
    assert holds.take("a", "udp" if udp else "tcp", "127.0.0.1", port, "exclusive") == "taken"
    assert not can_bind("127.0.0.1", port, reuse=reuse, udp=udp)


def test_hold_opens_and_closes_at_once_while_its_owner_listens(holds, port):
    assert holds.take("a", "tcp", "127.0.0.1", port, "exclusive") == "taken"
    holds.set_open("a", is_open=True)
    owner = foreign("127.0.0.1", port, reuse=True, listen=True)
    holds.set_open("a", is_open=False)
    with socket.create_connection(("127.0.0.1", port)):
        owner.accept()[0].close()
    owner.close()
    assert not can_bind("127.0.0.1", port, reuse=True)
    holds.set_open("a", is_open=True)
    assert can_bind("127.0.0.1", port, reuse=True)
    holds.set_open("nobody's lease", is_open=True)


def test_socket_bound_over_an_open_hold_cannot_listen_after_close(holds, port):
    assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "taken"
    with foreign("127.0.0.1", port, reuse=True) as late:
        holds.set_open("a", is_open=False)
        with pytest.raises(OSError, match="Address already in use"):
            late.listen()


@pytest.mark.parametrize(
    ("held", "asked"), list(itertools.product(["0.0.0.0", "127.0.0.1", "127.0.0.2", "::", "::1"], repeat=2))
)
def test_a_hold_excludes_the_addresses_that_its_own_includes(holds, port, held, asked):
    """`::` is dual-stack, as servers bind it."""
    assert holds.take("a", "tcp", held, port, "exclusive") == "taken"
    assert can_bind(asked, port, reuse=True) is not overlaps(held, asked)
    assert holds.is_free("tcp", asked, port) is not overlaps(held, asked)
    assert (holds.take("b", "tcp", asked, port, "none") == "busy") is overlaps(held, asked)


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
@pytest.mark.parametrize("connect", [False, True], ids=["bind to 0", "connect"])
def test_the_kernels_own_choice_is_never_a_held_port(holds, kind, connect):
    low = 50_000

    def choose() -> int:
        """Let the kernel choose out of two ports."""
        with socket.socket() as one:
            try:
                one.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=I", (low + 1) << 16 | low))
            except OSError:
                pytest.skip("the kernel does not let a socket say its range of ports (before Linux 6.3)")
            if connect:
                # A TIME_WAIT of ours would have the number, and not for the hold's sake.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.connect(server.getsockname())
            else:
                one.bind(("127.0.0.1", 0))
            return one.getsockname()[1]

    with socket.create_server(("127.0.0.1", 0)) as server:
        while not all(holds.is_free("tcp", "127.0.0.1", one) for one in (low, low + 1)):
            low += 2
        assert holds.take("a", "tcp", "127.0.0.1", low, kind) == "taken"
        assert {choose() for _ in range(20)} == {low + 1}
        assert holds.take("b", "tcp", "127.0.0.1", low + 1, kind) == "taken"
        with pytest.raises(OSError) as raised:  # noqa: PT011 - the number is looked at
            choose()
        assert raised.value.errno == (errno.EADDRNOTAVAIL if connect else errno.EADDRINUSE)


def test_first_listener_over_a_hold_gets_the_port(holds, port):
    assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "taken"
    with foreign("127.0.0.1", port, reuse=True) as first, foreign("127.0.0.1", port, reuse=True) as second:
        first.listen()
        with pytest.raises(OSError, match="Address already in use"):
            second.listen()
    with foreign("127.0.0.1", port, reuse=True, listen=True):
        assert not can_bind("127.0.0.1", port, reuse=True)


def test_later_of_two_reuseaddr_udp_sockets_gets_every_datagram(port):
    """Why no UDP hold is ever open."""
    with (
        foreign("127.0.0.1", port, reuse=True, udp=True) as first,
        foreign("127.0.0.1", port, reuse=True, udp=True) as second,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        for _ in range(5):
            sender.sendto(b"x", ("127.0.0.1", port))
        first.setblocking(False)
        second.setblocking(False)
        assert [second.recv(9) for _ in range(5)] == [b"x"] * 5
        with pytest.raises(BlockingIOError):
            first.recv(9)


# --- servers that bind over a shared hold ---


async def serve_asyncio(port: int) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", port)
    server.close()
    await server.wait_closed()


async def serve_aiohttp(port: int) -> None:
    runner = web.AppRunner(web.Application())
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("serve", [serve_asyncio, serve_aiohttp])
def test_asyncio_uvloop_and_aiohttp_listen_over_a_shared_hold(holds, port, run, serve):
    assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "taken"
    run(serve(port))


NODE = "require('http').createServer().listen({port}, '127.0.0.1', () => console.log('listens'))"


@pytest.mark.parametrize("program", ["node", "http.server"])
def test_node_and_http_server_listen_over_a_shared_hold(holds, port, spawn, wait_until, diag, program):
    assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "taken"
    if program == "node":
        child = spawn("node", "-e", NODE.replace("{port}", str(port)))
    else:
        child = spawn(sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port))
    wait_until(lambda: diag.listeners(port) or child.poll() is not None)
    assert child.poll() is None
    with socket.create_connection(("127.0.0.1", port)):
        pass


def test_socketserver_without_reuse_and_a_bare_bind_do_not(holds, port):
    assert holds.take("a", "tcp", "127.0.0.1", port, "shared") == "taken"
    with pytest.raises(OSError, match="Address already in use"):
        socketserver.TCPServer(("127.0.0.1", port), socketserver.BaseRequestHandler)
    assert not can_bind("127.0.0.1", port)
    http.server.HTTPServer(("127.0.0.1", port), http.server.BaseHTTPRequestHandler).server_close()
