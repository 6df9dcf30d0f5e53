"""Whose a lease is, and when it ends, per the kernel, with real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.exits import exit_to_free
from tests.e2e.harness import Daemon, Stream, is_bindable, listen_on, owner, wait_for
from tests.e2e.puppet import Puppet


def ended(daemon: Daemon, lease_id: str) -> str:
    """Wait until a lease has ended, and return why."""
    because: str = wait_for(lambda: daemon.show(lease_id)["ended_because"], f"lease {lease_id} ends")
    return because


def test_killed_owner_ends_the_lease_and_frees_the_port(own_daemon: Daemon) -> None:
    with Stream(own_daemon) as stream, Puppet(own_daemon) as puppet:
        lease = puppet.lease("killed")
        puppet.end()
        event = stream.until(lambda event: event.type == "ended")[-1]
    assert (event.data["lease"]["id"], event.data["lease"]["ended_because"]) == (lease["id"], "owner_exited")
    assert is_bindable(lease["port"])
    assert own_daemon.leases() == {}
    assert own_daemon.verdict(lease["port"]) == "cooling"


def test_caller_is_owner_over_unix_and_over_loopback_tcp(daemon: Daemon) -> None:
    with Puppet(daemon) as puppet:
        for over, known_by in (("unix", "peercred"), ("tcp", "socket")):
            lease = puppet.lease("caller", over=over)
            owner = lease["owner"]
            assert (owner["pid"], owner["uid"], owner["user"], owner["known_by"]) == (puppet.pid, 0, "root", known_by)
            assert owner["exe"] == os.path.realpath(sys.executable)
            assert owner["cmdline"][-2:] == ["tests.e2e.puppet", "0"]
            assert owner["started_at"].endswith("Z")


def test_a_zombie_is_gone(daemon: Daemon) -> None:
    with owner() as process:
        lease = daemon.lease("zombie", pid=process.pid)
        os.kill(process.pid, signal.SIGKILL)  # and nobody waits for it: it stays a zombie
        assert ended(daemon, lease["id"]) == "owner_exited"
        reply = daemon.call("POST", "/v1/leases", {"service": "zombie", "pid": process.pid})
        assert (reply.status, reply.code, reply.body["pointer"]) == (400, "invalid_request", "/pid")


def test_pid_of_no_live_process_is_refused(daemon: Daemon) -> None:
    with owner() as process:
        pass  # it lived a moment ago
    for pid in (process.pid, 4_194_304):
        reply = daemon.call("POST", "/v1/leases", {"service": "dead", "pid": pid})
        assert (reply.status, reply.code, reply.body["pointer"]) == (400, "invalid_request", "/pid")
    assert daemon.get("/v1/leases?service=dead")["leases"] == []


def test_owners_that_exit_during_their_grant_leave_no_lease(daemon: Daemon) -> None:
    for _ in range(15):
        with owner() as process, daemon.connect() as connection:
            connection.connect()
            process.kill()
            reply = connection.call("POST", "/v1/leases", {"service": "dying", "pid": process.pid})
            assert reply.status == 201 or (reply.status, reply.code) == (400, "invalid_request"), reply
    wait_for(lambda: daemon.get("/v1/leases?service=dying")["leases"] == [], "the leases of the dead end")


def test_reused_pid_does_not_inherit_a_lease(daemon: Daemon) -> None:
    """The owner dies while the daemon does, and its pid is given again (by ns_last_pid, proc(5))."""
    pid = None
    for _ in range(50):
        with owner() as first:
            pid = first.pid
            lease = daemon.lease("reused", pid=pid)
            daemon.kill()
        if (second := _with_pid(pid)) is not None:
            break
        daemon.start()
    else:
        pytest.fail(f"pid {pid} could not be made again")
    with second:
        try:
            daemon.start()
            assert daemon.show(lease["id"])["ended_because"] == "owner_exited"
            fresh = daemon.lease("reused", pid=second.pid)
            assert fresh["id"] != lease["id"]
        finally:
            second.kill()


def _with_pid(pid: int) -> subprocess.Popen[bytes] | None:
    """Start a process that has this pid; None when somebody else's was faster."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    process = subprocess.Popen(["sleep", "1000"])
    if process.pid == pid:
        return process
    process.kill()
    process.wait()
    return None


def test_exec_keeps_the_lease_and_shows_the_new_program(daemon: Daemon) -> None:
    with Puppet(daemon) as puppet:
        lease = puppet.lease("exec")
        puppet.become(sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(lease["port"]))
        bound = daemon.wait_state(lease["id"], "bound")
    assert bound["owner"]["pid"] == puppet.pid
    assert bound["owner"]["cmdline"][1:3] == ["-m", "http.server"]
    assert ended(daemon, lease["id"]) == "owner_exited"


def test_lease_passes_to_a_listening_child_until_it_exits(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(port_count=2)
    daemon.configure("[leases]\ncooldown = 0")
    daemon.start()
    with Stream(daemon) as stream, Puppet(daemon) as parent:
        lease = parent.lease("parent")
        parent.listen(lease["port"])
        child = parent.fork()
        daemon.wait_state(lease["id"], "bound")
        parent.end()
        passed = stream.until(lambda event: event.type == "passed")[-1].data
        assert (passed["lease"]["owner"]["pid"], passed["lease"]["vouched_by"]) == (child, "descendant")
        assert daemon.show(lease["id"])["state"] == "bound"
        os.kill(child, signal.SIGKILL)
        assert ended(daemon, lease["id"]) == "owner_exited"
        both = [{"service": "x", "ttl": 60}] * 2
        wait_for(lambda: daemon.call("POST", "/v1/leases", both).status == 201, "both ports are granted")


def test_the_child_that_listens_is_its_parents(daemon: Daemon) -> None:
    with Puppet(daemon) as parent:
        lease = parent.lease("child")
        parent.listen(lease["port"])
        parent.fork()
        parent.do("unlisten")  # from here on the child alone has the socket
        assert daemon.wait_state(lease["id"], "bound")["owner"]["pid"] == parent.pid


def test_foreign_process_on_leased_port_is_named_until_it_exits(daemon: Daemon) -> None:
    with owner() as process, Stream(daemon, "?service=visited") as stream, Puppet(daemon) as foreign:
        lease = daemon.lease("visited", pid=process.pid)
        assert foreign.listen(lease["port"]) is None
        event = stream.until(lambda event: event.type == "conflict")[-1]
        assert event.data["foreign"]["pid"] == foreign.pid
        assert event.data["lease"]["state"] == "conflict"
        view = daemon.get(f"/v1/ports/{lease['port']}")
        assert (view["verdict"], view["lease"]["id"]) == ("conflict", lease["id"])
        assert [listener["pid"] for listener in view["listeners"]] == [foreign.pid]
        foreign.end()
        stream.until(lambda event: event.type == "unbound")
    assert re.search(rf"{lease['instance']} .*{lease['port']}: .*foreign process, pid {foreign.pid}", daemon.log())


def test_a_lease_is_held_then_bound_then_held(daemon: Daemon) -> None:
    with Puppet(daemon) as puppet, Stream(daemon, "?service=rhythm") as stream:
        lease = puppet.lease("rhythm")
        assert lease["state"] == "held"
        for _ in range(2):
            assert puppet.listen(lease["port"]) is None
            stream.until(lambda event: event.type == "bound")
            assert daemon.verdict(lease["port"]) == "bound"
            puppet.do("unlisten")
            stream.until(lambda event: event.type == "unbound")
            assert daemon.verdict(lease["port"]) == "held"


def test_held_port_is_refused_to_bind_without_reuseaddr(daemon: Daemon) -> None:
    with owner() as process:
        shared = daemon.lease("kept", pid=process.pid)
        exclusive = daemon.lease("kept", pid=process.pid, hold="exclusive")
        free = daemon.lease("kept", pid=process.pid, hold="none")
        ports = [lease["port"] for lease in (shared, exclusive, free)]
        assert [is_bindable(port) for port in ports] == [False, False, True]
        assert [is_bindable(port, reuse=True) for port in ports] == [True, False, True]


def test_a_port_that_somebody_listens_on_is_never_granted(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(port_count=5).start()
    first = daemon.first_port
    with (
        listen_on(first),
        listen_on(first + 1, "0.0.0.0"),
        listen_on(first + 2, "::1"),
        listen_on(first + 3, "127.0.0.9"),
    ):
        requested = daemon.lease("requested", port=first)
        assert requested["port"] == first + 4
        refused = daemon.call("POST", "/v1/leases", {"service": "more"})
        assert (refused.status, refused.code) == (503, "pool_exhausted")
        assert daemon.verdict(daemon.first_port) in ("unmanaged", "declined")


def test_a_thousand_simultaneous_exits_free_every_lease_and_port() -> None:
    print(f"exit to free, 1000 owners: {exit_to_free(1000):.1f} ms")


def test_second_request_of_an_owner_gets_the_same_lease(daemon: Daemon) -> None:
    with Puppet(daemon) as puppet, Puppet(daemon) as other:
        first = puppet.lease("twice", instance="twice-a")
        again = puppet.call("POST", "/v1/leases", {"service": "twice", "instance": "twice-a"})
        assert (again.status, again.body["id"]) == (200, first["id"])
        assert "token" not in again.body
        refused = other.call("POST", "/v1/leases", {"service": "twice", "instance": "twice-a"})
        assert (refused.status, refused.code, refused.body["pointer"]) == (409, "port_taken", "/instance")
        assert str(puppet.pid) in refused.body["detail"]


def test_instance_keeps_its_port_across_all_restarts(own_daemon: Daemon) -> None:
    with Puppet(own_daemon) as puppet:
        port = puppet.lease("sticky", instance="sticky-a")["port"]
    for number in (signal.SIGTERM, signal.SIGKILL):
        wait_for(lambda: not own_daemon.leases(), "the lease ends")
        own_daemon.lease("filler", ttl=3600)
        own_daemon.restart(number)
        with Puppet(own_daemon) as puppet:
            assert puppet.lease("sticky", instance="sticky-a")["port"] == port
        for lease in own_daemon.leases().values():
            own_daemon.call("DELETE", f"/v1/leases/{lease['id']}")
