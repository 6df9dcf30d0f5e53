"""Whose sockets those are: real processes, and `ss` as the yardstick."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from portd.adapters.kernel.listeners import KernelSocketTable
from portd.adapters.kernel.netlink import SocketDiag
from portd.core.model import Owner

HOLD = "import sys; print(flush=True); sys.stdin.read()"
"""Keeps what it was given, until its input ends."""
HANDS_ON = """
import os, sys
child = os.fork()
if child:
    os.close(int(sys.argv[1]))
    print(child, flush=True)
sys.stdin.read()
"""
"""Keeps it in a child alone."""


def owners(inodes, likely=(), *, again: int = 1) -> dict[int, Owner]:
    async def ask():
        with contextlib.closing(SocketDiag()) as diag:
            table = KernelSocketTable(diag)
            for _ in range(again):
                found = await table.owners(inodes, likely)
            return found

    return asyncio.run(ask())


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def inode(one: socket.socket) -> int:
    return os.fstat(one.fileno()).st_ino


def share(spawn, server: socket.socket, code: str = HOLD):
    """Start a process that has the socket open; returns it and what it says first."""
    child = spawn(str(server.fileno()), python=code, pass_fds=[server.fileno()])
    return child, child.stdout.readline().strip()


def test_socket_is_attributed_with_every_fact_the_kernel_shows(spawn, server):
    child, _ = share(spawn, server)
    owner = owners([inode(server)])[inode(server)]
    assert (owner.pid, owner.uid, owner.known_by) == (child.pid, os.geteuid(), "socket")
    assert owner.exe == os.path.realpath(f"/proc/{child.pid}/exe")
    assert owner.cmdline == (sys.executable, "-c", HOLD, str(server.fileno()))


def test_shared_socket_belongs_to_its_eldest_live_process(spawn, server):
    children = sorted((share(spawn, server)[0] for _ in range(3)), key=lambda child: child.pid)

    async def scenario():
        with contextlib.closing(SocketDiag()) as diag:
            table = KernelSocketTable(diag)
            for child in children:
                assert (await table.owners([inode(server)]))[inode(server)].pid == child.pid
                child.kill()
                child.wait()

    asyncio.run(scenario())


def test_a_likely_process_is_named_before_the_eldest(spawn, server):
    pids = sorted(share(spawn, server)[0].pid for _ in range(2))
    assert owners([inode(server)], [pids[1]])[inode(server)].pid == pids[1]


def test_a_child_of_a_likely_process_is_named_before_others(spawn, server):
    foreign, _ = share(spawn, server)
    parent, child = share(spawn, server, HANDS_ON)
    assert owners([inode(server)], [parent.pid], again=2)[inode(server)].pid == int(child) != foreign.pid


def test_portd_itself_is_named_only_where_nobody_else_has_socket(spawn, server):
    assert owners([inode(server)])[inode(server)].pid == os.getpid()
    child, _ = share(spawn, server)
    assert owners([inode(server)])[inode(server)].pid == child.pid


def test_unowned_and_unrequested_sockets_are_left_out():
    assert owners([2**32 - 1], [os.getpid()]) == {}
    assert owners([]) == {}


def test_process_of_another_user_is_known_by_uid_alone(spawn, server, as_nobody):
    share(spawn, server)
    port, hidden = server.getsockname()[1], inode(server)
    server.close()
    with as_nobody():
        found = owners([hidden])
        with contextlib.closing(SocketDiag()) as diag:
            [listener] = diag.listeners(port)
    assert found == {}
    assert (listener.uid, listener.inode) == (0, hidden)


def parse_ss(line: str) -> tuple[tuple[str, str, int, bool], frozenset[int]]:
    """Return what portd calls the same listener: (protocol, address, port, dual-stack), and the pids that ss names."""
    protocol, _, _, _, local, *rest = line.split(None, 6)
    address, _, port = local.rpartition(":")
    is_dual = address == "*"  # how ss writes :: with both families
    address = "::" if is_dual else re.sub(r"%[^]]+$", "", address).strip("[]").removeprefix("::ffff:")
    return (protocol, address, int(port), is_dual), frozenset(map(int, re.findall(r"pid=(\d+)", rest[-1])))


def test_listing_agrees_with_ss_line_by_line_on_busy_host(spawn):
    crowd = spawn(sys.executable, str(Path(__file__).with_name("crowd.py")), "500", "2000")
    assert crowd.stdout.readline() == "ready\n"

    async def compare():
        with contextlib.closing(SocketDiag()) as diag:
            table = KernelSocketTable(diag)
            for _ in range(20):  # others on this host come and go: take a moment in which nobody did
                before = table.listeners()
                shown = subprocess.run(["ss", "-H", "-tulnp"], capture_output=True, text=True, check=True).stdout
                found = await table.owners([one.inode for one in before])
                if {one.inode for one in before} == {one.inode for one in table.listeners()}:
                    return before, found, shown
        raise AssertionError("this host never stands still")

    listeners, found, shown = asyncio.run(compare())
    theirs = [parse_ss(line) for line in shown.splitlines()]
    ours = [(one.protocol, one.address, one.port, not one.v6only) for one in listeners]
    assert len(ours) >= 2000
    assert Counter(ours) == Counter(line for line, _ in theirs)
    pids: dict[tuple, set[int]] = {}
    for line, named in theirs:
        pids.setdefault(line, set()).update(named)
    for one, line in zip(listeners, ours, strict=True):
        owner = found.get(one.inode)
        assert (owner.pid in pids[line]) if owner else not pids[line], (line, owner)
    crowd.communicate(timeout=20)
    assert crowd.returncode == 0
