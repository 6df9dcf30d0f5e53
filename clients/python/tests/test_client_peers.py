"""Whom the client believes, and how it reads that from the kernel."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from portd_client import peers
from portd_client.endpoints import Endpoint

ANOTHER = 4242


def test_root_and_the_own_user_are_trusted_and_others_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert [uid for uid in (0, 1000, 1001, 65534, 2**32 - 1) if peers.is_trusted(uid)] == [0, 1000]


def test_the_user_named_portd_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwd.getpwnam", lambda name: SimpleNamespace(pw_uid=ANOTHER))
    assert peers.is_trusted(ANOTHER)


@pytest.mark.parametrize(
    ("family", "bound", "asked"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "::1"),
        (socket.AF_INET6, "::", "127.0.0.1"),
        (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_every_listener_that_can_accept_is_found(family: socket.AddressFamily, bound: str, asked: str) -> None:
    with socket.socket(family) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((bound, 0))
        listener.listen()
        inode = str(os.fstat(listener.fileno()).st_ino)
        assert peers.listeners(asked, listener.getsockname()[1]) == {inode: os.geteuid()}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket away")
def test_loopback_listener_of_another_user_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.fchown(listener.fileno(), ANOTHER, ANOTHER)
        with pytest.raises(peers.UntrustedPeer, match=str(ANOTHER)):
            peers.LoopbackCheck("127.0.0.1", listener.getsockname()[1])


def test_listener_that_changes_while_connecting_is_refused() -> None:
    first = socket.create_server(("127.0.0.1", 0))
    port = first.getsockname()[1]
    check = peers.LoopbackCheck("127.0.0.1", port)
    check.check()
    first.close()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(peers.UntrustedPeer, match="changed"):
        check.check()


def test_listener_that_appears_while_connecting_is_refused() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        check = peers.LoopbackCheck("127.0.0.1", bound.getsockname()[1])
        bound.listen()
        with pytest.raises(peers.UntrustedPeer):
            check.check()


@pytest.mark.parametrize(("mode", "is_private"), [(0o700, True), (0o755, True), (0o770, False), (0o707, False)])
def test_runtime_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int, is_private: bool) -> None:
    directory = tmp_path / "runtime"
    directory.mkdir()
    directory.chmod(mode)
    assert peers.is_private(str(directory), os.geteuid()) is is_private
    assert not peers.is_private(str(directory), os.geteuid() + 1)


def test_link_in_place_of_the_runtime_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runtime").symlink_to(tmp_path)
    with pytest.raises(peers.UntrustedPeer):
        peers.check_directory(Endpoint("unused", runtime_directory=str(tmp_path / "runtime")))
