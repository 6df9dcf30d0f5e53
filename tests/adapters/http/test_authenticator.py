"""Who a caller is, and which browser pages may call."""

from __future__ import annotations

import asyncio
import grp
import hashlib
import os
import pwd
import socket

import pytest

from portd.adapters.http.authenticator import Authenticator, Token
from portd.core.errors import ForbiddenOrigin, Unauthenticated
from portd.leasing.seams import Peer
from tests.adapters.http.fakes import FakePeers, FakeSocket, FakeTransport

MINE = Peer(1000, 41, frozenset({1000}), "peercred")
REMOTE = FakeSocket(socket.AF_INET, ("192.0.2.1", 7783), ("192.0.2.9", 50000))
LOOPBACK = FakeSocket(socket.AF_INET)


def hash_token(token):
    return hashlib.sha256(token.encode()).digest()


def authenticator(peer=MINE, *, pid=None, group="", tokens=()):
    known = {hash_token(name): Token(admin, name) for name, admin in tokens}
    return Authenticator(FakePeers(peer, pid), group, known, ["testhost", "Testhost.Example"], hash_token)


def end_of(made, connection=None):
    return made.identify(FakeTransport(connection))


def test_unix_caller_is_the_kernels_peer():
    made = authenticator()
    caller = made.caller(end_of(made), {})
    assert (caller.uid, caller.pid, caller.known_by, caller.admin, caller.is_known) == (
        1000,
        41,
        "peercred",
        False,
        True,
    )


def test_root_is_an_admin_but_not_of_another_user_namespace():
    made = authenticator(Peer(0, 1, frozenset(), "peercred"))
    assert made.caller(end_of(made), {}).admin
    made = authenticator(Peer(0, 1, frozenset(), "peercred", other_users=True))
    assert not made.caller(end_of(made), {}).admin


def test_root_over_tcp_is_admin_once_its_process_is_found():
    made = authenticator(Peer(0, None, frozenset(), "socket", inode=5, other_users=True), pid=7)
    end = end_of(made, LOOPBACK)
    assert not made.caller(end, {}).admin
    asyncio.run(made.find_process(end))
    assert made.caller(end, {}).admin
    assert made.caller(end, {}).pid == 7


def test_process_of_a_connection_is_searched_once():
    peers = FakePeers(Peer(1000, None, frozenset(), "socket", inode=5), None)
    made = Authenticator(peers, "", {}, [], hash_token)
    end = end_of(made, LOOPBACK)
    for _ in range(2):
        asyncio.run(made.find_process(end))
    assert peers.search_count == 1


def test_process_that_cannot_be_searched_stays_unknown():
    class Full(FakePeers):
        async def with_pid(self, peer):
            raise OSError(24, "too many open files")

    made = Authenticator(Full(Peer(1000, None, frozenset(), "socket", inode=5)), "", {}, [], hash_token)
    end = end_of(made, LOOPBACK)
    asyncio.run(made.find_process(end))
    assert (end.peer.pid, end.needs_process) == (None, False)


def test_loopback_caller_without_a_peer_is_not_known():
    made = authenticator(None)
    caller = made.caller(end_of(made, LOOPBACK), {})
    assert (caller.uid, caller.is_known) == (None, False)


def test_remote_caller_is_known_by_a_configured_token_alone():
    made = authenticator(None, tokens=[("plain", False), ("chief", True)])
    end = end_of(made, REMOTE)
    assert not made.caller(end, {}).is_known
    assert not made.caller(end, {"Authorization": "Bearer wrong"}).is_known
    plain = made.caller(end, {"Authorization": "Bearer plain"})
    assert (plain.is_known, plain.admin, plain.user) == (True, False, "token:plain")
    assert made.caller(end, {"Authorization": "bearer  chief "}).admin


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic abc", "wrong"])
def test_malformed_authorization_header_is_refused(header):
    made = authenticator()
    with pytest.raises(Unauthenticated):
        made.caller(end_of(made), {"Authorization": header})


def test_admin_group_is_read_for_each_connection(monkeypatch):
    members = ["somebody"]
    monkeypatch.setattr(grp, "getgrnam", lambda name: grp.struct_group(("admins", "x", 4711, members)))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(("somebody", "x", uid, uid, "", "/", "/bin/sh")))
    made = authenticator(group="admins")
    before = end_of(made)
    assert made.caller(before, {}).admin
    members.clear()
    assert not made.caller(end_of(made), {}).admin
    assert made.caller(before, {}).admin, "a connection keeps the rights that it was made with"


def test_admin_group_that_does_not_exist_has_no_members():
    made = authenticator(group="no-such-group-of-portd")
    assert not made.caller(end_of(made), {}).admin


def test_user_of_a_connection_is_its_uid_or_its_address():
    made = authenticator(None)
    assert end_of(made, REMOTE).user == "192.0.2.9"
    made = authenticator()
    assert end_of(made).user == 1000


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:7783",
        "LOCALHOST",
        "localhost.",
        "127.0.0.1",
        "127.9.9.9:1",
        "[::1]",
        "[::1]:7783",
        "testhost",
        "testhost.example:80",
        "ip6-localhost",
    ],
)
def test_own_names_pass(host):
    made = authenticator()
    made.check_origin(end_of(made, LOOPBACK), {"Host": host})


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "localhost.evil.example",
        "[localhost]evil.example",
        "[localhost]",
        "[127.0.0.1]",
        "[::1]evil.example",
        "[::1]:",
        "[::1",
        "[::1]x",
        "::1",
        "localhost:x",
        "localhost:7783:1",
        "127.0.0.1.evil.example",
        "127.1",
        "2130706433",
        "0x7f.1",
        "192.0.2.1",
        "user@localhost",
        "localhost/",
        "localhost:123456",
    ],
)
def test_foreign_hosts_are_refused(host):
    made = authenticator()
    with pytest.raises(ForbiddenOrigin):
        made.check_origin(end_of(made, LOOPBACK), {"Host": host})


def test_address_that_the_client_connected_to_is_an_own_name():
    made = authenticator(None)
    end = end_of(made, REMOTE)
    made.check_origin(end, {"Host": "192.0.2.1:7783"})
    with pytest.raises(ForbiddenOrigin):
        made.check_origin(end, {"Host": "192.0.2.2:7783"})


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8000"},
        {"Origin": "http://user@127.0.0.1:7783"},
        {"Origin": "http://[::1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_origins_are_refused(headers):
    made = authenticator()
    with pytest.raises(ForbiddenOrigin):
        made.check_origin(end_of(made, LOOPBACK), {"Host": "127.0.0.1:7783", **headers})


def test_page_of_the_daemons_own_origin_passes():
    made = authenticator()
    headers = {"Host": "127.0.0.1:7783", "Origin": "http://127.0.0.1:7783", "Sec-Fetch-Site": "same-origin"}
    made.check_origin(end_of(made, LOOPBACK), headers)


def test_host_means_nothing_over_unix_socket_and_origin_is_refused():
    made = authenticator()
    made.check_origin(end_of(made), {"Host": "whatever"})
    with pytest.raises(ForbiddenOrigin):
        made.check_origin(end_of(made), {"Host": "localhost", "Origin": "http://localhost"})


def test_wrong_tokens_are_counted_and_logged_rarely(caplog):
    now = [0.0]
    made = Authenticator(FakePeers(MINE), "", {}, [], hash_token, lambda: now[0])
    end = end_of(made)
    for _ in range(100):
        made.report_wrong_token(end)
    now[0] += 60
    made.report_wrong_token(end)
    assert made.wrong_token_count == 101
    assert [record.getMessage().split()[1] for record in caplog.records] == ["1", "100"]
    assert "uid 1000" in caplog.text


def test_connection_that_has_gone_raises_oserror():
    class Gone(FakePeers):
        def of_unix(self, connection):
            raise OSError(os.strerror(107))

    made = Authenticator(Gone(), "", {}, [], hash_token)
    with pytest.raises(OSError, match="not connected"):
        end_of(made)
