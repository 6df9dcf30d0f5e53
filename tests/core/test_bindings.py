"""The overlap rules, compared with what the kernel does."""

from __future__ import annotations

import errno
import itertools
import socket

import pytest

from portd.core.bindings import overlaps

ADDRESSES = ["0.0.0.0", "::", "127.0.0.1", "127.0.0.2", "::1"]


def bind(address: str, port: int, kind: socket.SocketKind, *, v6only: bool = False) -> socket.socket:
    """Bind as a server does: `::` for both families unless v6only."""
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    try:
        if bound.family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only or address != "::")
        bound.bind((address, port))
    except BaseException:
        bound.close()
        raise
    return bound


def kernel_overlaps(a: str, b: str, kind: socket.SocketKind, *, v6only: bool = False) -> bool:
    """Bind the one, then try the other."""
    for _ in range(20):
        with bind(a, 0, kind, v6only=v6only) as first:
            port = first.getsockname()[1]
            if can_bind(b, port, kind):
                return False
        # The kernel chose the number for `a` alone: perhaps it was somebody else who had it on `b`.
        if can_bind(b, port, kind):
            return True
    raise AssertionError("no number that is free on both addresses")


def can_bind(address: str, port: int, kind: socket.SocketKind) -> bool:
    """Return whether the kernel allows it; only EADDRINUSE is an answer."""
    try:
        bind(address, port, kind).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize(("a", "b"), list(itertools.product(ADDRESSES, repeat=2)))
def test_two_addresses_overlap_exactly_where_the_kernel_refuses_the_second(a, b, kind):
    assert overlaps(a, b) == kernel_overlaps(a, b, kind)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_v6only_wildcard_leaves_ipv4_alone_as_the_kernel_does(address):
    assert overlaps("::", address, v6only=True) == kernel_overlaps("::", address, socket.SOCK_STREAM, v6only=True)


@pytest.mark.parametrize(("a", "b"), list(itertools.product(ADDRESSES, repeat=2)))
def test_the_order_of_two_addresses_does_not_matter(a, b):
    assert overlaps(a, b) == overlaps(b, a)


def test_a_wildcard_overlaps_addresses_that_this_host_may_not_have():
    assert overlaps("0.0.0.0", "192.0.2.1")
    assert overlaps("::", "192.0.2.1")
    assert overlaps("::", "2001:db8::1", v6only=True)
    assert not overlaps("0.0.0.0", "2001:db8::1")
    assert not overlaps("192.0.2.1", "2001:db8::1")
