"""Lease states, made true by real processes that listen on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from portd.adapters.kernel import attribution, procfs
from portd.adapters.kernel.listeners import KernelSocketTable
from portd.adapters.kernel.netlink import SocketDiag
from portd.adapters.kernel.states import StateWatch
from portd.core.model import Lease, Listener, Owner, ProcessId
from portd.core.ownership import Seen

DEADLINE_S = 20.0
NEVER = 1e12
"""A grant that no process was started after: the uid alone makes nobody its owner."""
NOBODY = 65534

SERVER = """
import socket, sys
address, port, kind = sys.argv[1], int(sys.argv[2]), getattr(socket, sys.argv[3])
server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
if server.family == socket.AF_INET6:
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::")
server.bind((address, port))
if kind == socket.SOCK_STREAM:
    server.listen()
print(server.getsockname()[1], flush=True)
sys.stdin.readline()
server.close()
print(flush=True)
sys.stdin.read()
"""
"""Listens until it reads a line, and then goes on living."""
LAUNCHER = """
import os, subprocess, sys
middle = os.fork()
if not middle:
    server = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdin=0)
    sys.stdin.close()
    os.read(int(os.environ["LEAVE"]), 1)
    os._exit(0)
os.waitpid(middle, 0)
print("middle is gone", flush=True)
sys.stdin.read()
"""
"""Starts the server through a process in the middle, which exits on request."""

RECEIVER = """
import socket, sys
_, descriptors, _, _ = socket.recv_fds(socket.socket(fileno=int(sys.argv[1])), 1, 1)
print(flush=True)
sys.stdin.read()
"""
"""Gets its socket over a unix socket, as in a handoff."""


class Leases:
    """A lease table of a few leases, which take a report at once as the service does."""

    def __init__(self) -> None:
        self.live: dict[str, Lease] = {}
        self.reports: list[tuple[str, str, Owner | None]] = []

    def grant(
        self,
        port: int,
        owner: int | None,
        *,
        address: str = "127.0.0.1",
        protocol: str = "tcp",
        uid: int | None = 0,
        **fields,
    ) -> str:
        lease_id = f"lease-{len(self.live)}"
        process = None if owner is None else ProcessId(owner, procfs.start_ticks(owner) or 0, procfs.boot_id())
        self.live[lease_id] = Lease(
            id=lease_id,
            service="web",
            instance=f"web-{len(self.live)}",
            endpoint="main",
            protocol=protocol,
            address=address,
            port=port,
            pool="default",
            hold="shared",
            lifetime=fields.pop("lifetime", "process"),
            owner=Owner(pid=owner, uid=uid, known_by="peercred"),
            uid=uid,
            host="here",
            created_at=fields.pop("created_at", NEVER),
            process=process,
            **fields,
        )
        return lease_id

    def on_port(self, port: int) -> list[Lease]:
        return [lease for lease in self.live.values() if lease.port == port]

    def report(self, lease_id: str, state: str, owner: Owner | None, seen: Seen) -> None:
        self.reports.append((lease_id, state, owner))
        foreign = owner if state == "conflict" else None
        self.live[lease_id] = replace(self.live[lease_id], state=state, foreign=foreign, **seen._asdict())

    def reported(self) -> list[tuple[str, int | None]]:
        """Return what was reported since the last time: state, and the pid of who listens."""
        reports, self.reports = self.reports, []
        return [(state, owner and owner.pid) for _, state, owner in reports]


class CountingTable(KernelSocketTable):
    """The kernel's table, which counts what it is asked and can be made to fail."""

    def __init__(self, diag: SocketDiag) -> None:
        super().__init__(diag)
        self.reads = 0
        self.attributed: list[int] = []
        self.failure: OSError | None = None
        self.while_attributing: Callable[[], object] = lambda: None

    def listeners(self, port: int | None = None) -> list[Listener]:
        self.reads += 1
        if self.failure is not None:
            raise self.failure
        return super().listeners(port)

    async def holders(self, inodes, likely_pids=()):
        self.attributed += inodes
        found = await super().holders(inodes, likely_pids)
        self.while_attributing()
        return found


def scenario(body) -> None:
    """Run `body(leases, watch, table)` on a loop of its own."""

    async def run():
        with contextlib.closing(SocketDiag()) as diag:
            leases, table = Leases(), CountingTable(diag)
            await body(leases, StateWatch(table, leases.on_port, lambda: len(leases.live), leases.report), table)

    asyncio.run(run())


async def poll_until(watch: StateWatch, condition: Callable[[], object]) -> None:
    """Look until something is true; fails at the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)
            await watch.poll()


@pytest.fixture
def serve(spawn):
    """Start a process that listens; returns it and its port."""

    def start(address: str = "127.0.0.1", port: int = 0, kind: str = "SOCK_STREAM", **options):
        server = spawn(address, str(port), kind, python=SERVER, **options)
        return server, int(server.stdout.readline())

    return start


def stop(server) -> None:
    """Let it close its socket, and live."""
    server.stdin.write("\n")
    server.stdin.flush()
    server.stdout.readline()


def test_lease_is_bound_exactly_while_its_owner_listens(serve):
    async def body(leases, watch, table):
        server, port = serve()
        leases.grant(port, server.pid)
        await watch.poll()
        [(_, state, owner)] = leases.reports
        assert (state, owner.pid, owner.exe) == ("bound", server.pid, os.path.realpath(f"/proc/{server.pid}/exe"))
        await watch.poll()
        assert leases.reported() == [("bound", server.pid)]
        stop(server)
        await watch.poll()
        await watch.poll()
        assert leases.reported() == [("held", None)]

    scenario(body)


def test_foreign_listener_is_a_named_conflict_until_it_exits(serve, spawn):
    async def body(leases, watch, table):
        foreign, port = serve()
        owner = spawn(python="import sys; sys.stdin.read()")
        leases.grant(port, owner.pid)
        await watch.poll()
        assert leases.reported() == [("conflict", foreign.pid)]
        foreign.kill()
        foreign.wait()
        await watch.poll()
        assert leases.reported() == [("held", None)]
        heir, _ = serve(port=port)
        leases.live["lease-0"] = replace(
            leases.live["lease-0"], process=ProcessId(heir.pid, procfs.start_ticks(heir.pid), procfs.boot_id())
        )
        await watch.poll()
        assert leases.reported() == [("bound", heir.pid)]

    scenario(body)


def test_descendant_stays_the_owners_without_its_parent(spawn):
    async def body(leases, watch, table):
        stays, leave = os.pipe()
        launcher = spawn(
            SERVER,
            "127.0.0.1",
            "0",
            "SOCK_STREAM",
            python=LAUNCHER,
            pass_fds=[stays],
            env={**os.environ, "LEAVE": str(stays)},
        )
        leases.grant(int(launcher.stdout.readline()), launcher.pid)
        await watch.poll()
        [(_, state, owner)] = leases.reports
        assert (state, owner.pid != launcher.pid) == ("bound", True)
        os.close(leave)
        os.close(stays)
        assert launcher.stdout.readline() == "middle is gone\n"
        leases.live["lease-0"] = replace(leases.live["lease-0"], state="conflict")  # so that it must be judged anew
        await watch.poll()
        assert leases.reported() == [("bound", owner.pid)] * 2

    scenario(body)


@pytest.mark.parametrize(
    ("listens", "kind", "leased", "protocol", "state"),
    [
        ("127.0.0.1", "SOCK_STREAM", "0.0.0.0", "tcp", "bound"),
        ("0.0.0.0", "SOCK_STREAM", "127.0.0.1", "tcp", "bound"),
        ("::", "SOCK_STREAM", "127.0.0.1", "tcp", "bound"),
        ("::1", "SOCK_STREAM", "::", "tcp", "bound"),
        ("127.0.0.2", "SOCK_STREAM", "127.0.0.1", "tcp", "bound"),
        ("::1", "SOCK_STREAM", "127.0.0.1", "tcp", "bound"),
        ("127.0.0.1", "SOCK_STREAM", "::1", "tcp", "bound"),
        ("::1", "SOCK_STREAM", "localhost", "tcp", "bound"),
        ("127.0.0.1", "SOCK_STREAM", "localhost", "tcp", "bound"),
        ("127.0.0.1", "SOCK_STREAM", "192.0.2.1", "tcp", "held"),
        ("127.0.0.1", "SOCK_DGRAM", "127.0.0.1", "udp", "bound"),
        ("127.0.0.1", "SOCK_DGRAM", "127.0.0.1", "tcp", "held"),
        ("127.0.0.1", "SOCK_STREAM", "127.0.0.1", "udp", "held"),
        ("127.0.0.1", "SOCK_STREAM", "127.0.0.1", "both", "bound"),
        ("127.0.0.1", "SOCK_DGRAM", "127.0.0.1", "both", "bound"),
    ],
)
def test_owner_is_bound_where_callers_of_lease_reach_it(serve, listens, kind, leased, protocol, state):
    async def body(leases, watch, table):
        server, port = serve(listens, kind=kind)
        leases.grant(port, server.pid, address=leased, protocol=protocol)
        await watch.poll()
        assert leases.live["lease-0"].state == state

    scenario(body)


@pytest.mark.parametrize(("uid", "state"), [(0, "bound"), (NOBODY, "conflict"), (None, "conflict")])
def test_a_lease_without_a_process_is_its_users(serve, as_root, uid, state):
    async def body(leases, watch, table):
        server, port = serve()
        exited = serve()[0]
        exited.kill()
        exited.wait()
        leases.grant(port, None, uid=uid, lifetime="ttl", created_at=0.0)
        leases.grant(port, exited.pid, uid=uid, lifetime="ttl", created_at=0.0)
        await watch.poll()
        assert leases.reported() == [(state, server.pid)] * 2

    scenario(body)


@pytest.mark.parametrize(("uid", "state"), [(0, "bound"), (NOBODY, "conflict")])
def test_where_the_process_is_hidden_its_uid_decides(serve, as_nobody, uid, state):
    async def body(leases, watch, table):
        server, port = serve()
        leases.grant(port, server.pid, uid=uid)
        with as_nobody():
            await watch.poll()
        assert [(reported, owner and (owner.pid, owner.uid)) for _, reported, owner in leases.reports] == [
            (state, None if state == "bound" else (None, 0))
        ]

    scenario(body)


def test_bound_lease_without_listener_is_held_after_a_restart(serve):
    async def body(leases, watch, table):
        server, port = serve()
        leases.grant(port, server.pid, state="bound", listening=("127.0.0.1",), vouched_by="owner")
        leases.grant(port + 1 if port < 65535 else 1024, None, address="127.9.9.9", state="conflict", lifetime="ttl")
        watch.restore(leases.live.values())
        await watch.poll()
        assert [report[:2] for report in leases.reports] == [("lease-1", "held")]
        stop(server)
        await watch.poll()
        assert [report[:2] for report in leases.reports] == [("lease-1", "held"), ("lease-0", "held")]

    scenario(body)


def test_a_report_that_did_not_come_true_is_made_again(serve):
    async def body(leases, watch, table):
        server, port = serve()
        leases.grant(port, server.pid, state="bound")
        watch.restore(leases.live.values())
        stop(server)
        for _ in range(3):
            leases.live["lease-0"] = replace(leases.live["lease-0"], state="bound")
            await watch.poll()
        assert leases.reported() == [("held", None)] * 3

    scenario(body)


def test_socket_is_attributed_once_and_never_where_no_lease_is(serve):
    async def body(leases, watch, table):
        server, port = serve()
        serve()
        leases.grant(port, server.pid)
        for _ in range(5):
            await watch.poll()
        assert len(table.attributed) == 1

    scenario(body)


def test_however_many_sockets_are_new_look_attributes_bounded_number(serve, monkeypatch):
    monkeypatch.setattr(attribution, "BATCH_MAX", 2)

    async def body(leases, watch, table):
        for _ in range(5):
            server, port = serve()
            leases.grant(port, server.pid)
        await watch.poll()
        assert len(leases.reports) < len(leases.live)
        await poll_until(watch, lambda: len(leases.reports) == len(leases.live))
        assert {state for _, state, _ in leases.reports} == {"bound"}

    scenario(body)


def test_socket_in_handoff_belongs_to_no_process(spawn):
    async def body(leases, watch, table):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, socket.create_server(("127.0.0.1", 0)) as handed:
            owner = spawn(str(theirs.fileno()), python=RECEIVER, pass_fds=[theirs.fileno()])
            port = handed.getsockname()[1]
            leases.grant(port, owner.pid)
            leases.grant(
                port, None, lifetime="ttl", created_at=0.0
            )  # by uid alone portd itself would pass for its owner
            await watch.poll()
            assert table.attributed
            assert leases.reports == []
            socket.send_fds(ours, [b"."], [handed.fileno()])
            owner.stdout.readline()
            await poll_until(watch, lambda: len(leases.reports) == 2)
            assert leases.reported() == [("bound", owner.pid)] * 2

    scenario(body)


def test_foreign_process_passing_its_socket_ends_the_conflict(spawn, serve):
    async def body(leases, watch, table):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, socket.create_server(("127.0.0.1", 0)) as passed:
            foreign = spawn(python="import sys; sys.stdin.read()", pass_fds=[passed.fileno()])
            owner = spawn(str(theirs.fileno()), python=RECEIVER, pass_fds=[theirs.fileno()])
            leases.grant(passed.getsockname()[1], owner.pid)
            await watch.poll()
            assert leases.reported() == [("conflict", foreign.pid)]
            socket.send_fds(ours, [b"."], [passed.fileno()])
            owner.stdout.readline()
            await poll_until(watch, lambda: leases.reports)
            assert leases.reported() == [("bound", owner.pid)]

    scenario(body)


def test_socket_closed_meanwhile_is_no_conflict(serve, spawn):
    async def body(leases, watch, table):
        server, port = serve()
        leases.grant(port, spawn("sleep", "60").pid)
        table.while_attributing = lambda: stop(server)
        await watch.poll()
        assert table.attributed
        assert leases.reports == []

    scenario(body)


def test_unreadable_socket_table_is_logged_once_and_retried(serve, caplog):
    async def body(leases, watch, table):
        server, port = serve()
        leases.grant(port, server.pid)
        table.failure = PermissionError(1, "not permitted")
        for _ in range(3):
            await watch.poll()
        assert "not permitted" in watch.problem
        table.failure = None
        await watch.poll()
        assert watch.problem is None
        assert leases.reported() == [("bound", server.pid)]

    with caplog.at_level(logging.ERROR):
        scenario(body)
    assert len(caplog.records) == 1


def test_file_limit_causes_no_false_report(serve, no_descriptor_left):
    async def body(leases, watch, table):
        server, port = serve()
        leases.grant(port, server.pid)
        await watch.poll()
        leases.reported()
        with no_descriptor_left():
            for _ in range(3):
                await watch.poll()
        assert leases.reported() == []
        stop(server)
        await watch.poll()
        assert leases.reported() == [("held", None)]

    scenario(body)


def test_watch_sleeps_without_leases_until_woken(serve, run):
    async def main():
        with contextlib.closing(SocketDiag()) as diag:
            leases, table, reported = Leases(), CountingTable(diag), asyncio.Event()

            def report(lease_id, state, owner, seen):
                leases.report(lease_id, state, owner, seen)
                reported.set()

            watch = StateWatch(table, leases.on_port, lambda: len(leases.live), report, interval_s=0.001)
            async with asyncio.timeout(DEADLINE_S):
                running = asyncio.create_task(watch.run())
                while not table.reads:
                    await asyncio.sleep(0)
                for _ in range(200):  # many intervals' worth of turns of the loop
                    await asyncio.sleep(0.0005)
                assert table.reads == 1
                server, port = serve()
                leases.grant(port, server.pid)
                for _ in range(100):  # however often it is called, it does not delay the poll
                    watch.wake()
                await reported.wait()
                running.cancel()
            assert leases.reported() == [("bound", server.pid)]

    run(main())


def test_wake_does_not_wait_for_the_interval(serve, run):
    async def main():
        with contextlib.closing(SocketDiag()) as diag:
            leases, table, reported = Leases(), CountingTable(diag), asyncio.Event()
            leases.grant(9, None, lifetime="ttl")  # discard: nobody listens there on this host

            def report(lease_id, state, owner, seen):
                leases.report(lease_id, state, owner, seen)
                reported.set()

            watch = StateWatch(table, leases.on_port, lambda: len(leases.live), report, interval_s=3600)
            async with asyncio.timeout(DEADLINE_S):
                running = asyncio.create_task(watch.run())
                while not table.reads:
                    await asyncio.sleep(0)
                server, port = serve()
                leases.grant(port, server.pid)
                watch.wake()
                await reported.wait()
                running.cancel()

    run(main())
