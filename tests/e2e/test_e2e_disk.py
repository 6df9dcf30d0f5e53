"""A disk that is full or read-only: grants are refused, nothing changes, reads go on, and it recovers by itself."""

from __future__ import annotations

import contextlib
import resource
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import Daemon, Stream, is_bindable, owner, wait_for

STORE_BYTES = 2 << 20


@pytest.fixture
def disk(place: Path) -> Iterator[Path]:
    """A file system of its own, 2 MB large."""
    made = place / "disk"
    made.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={STORE_BYTES}", "portd-e2e", str(made)], check=True)
    try:
        yield made
    finally:
        subprocess.run(["umount", str(made)], check=True)


@pytest.fixture
def on_disk(make_daemon: MakeDaemon, disk: Path) -> Iterator[Daemon]:
    """A running daemon whose store is on the small disk, and which may complain of it."""
    made = make_daemon()
    made.store = disk / "portd.db"
    made.errors += ["the store does not take writes", "the store"]
    made.configure("")
    yield made.start()
    made.stop()  # before the disk goes


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leave no byte free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 4096):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Make the file system read-only; only while no daemon has a file open there."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def until_refused(daemon: Daemon) -> None:
    """Lease until the store takes nothing more: what fits into the log that is there still goes."""

    def refused() -> bool:
        reply = daemon.call("POST", "/v1/leases", {"service": "filler", "ttl": 3600, "metadata": {"x": "y" * 500}})
        assert reply.status == 201 or (reply.status, reply.code) == (503, "store_unavailable"), reply
        return reply.status == 503 and daemon.call("GET", "/healthz").status == 503

    wait_for(refused, "the store takes no more")


def test_full_disk_refuses_grants_changes_nothing_and_recovers_by_itself(on_disk: Daemon, disk: Path) -> None:
    with owner() as process, owner() as mortal:
        lease = on_disk.lease("before", pid=process.pid)
        doomed = on_disk.lease("doomed", pid=mortal.pid)
        with full(disk):
            until_refused(on_disk)
            known = on_disk.leases()
            free = on_disk.get("/v1/status")["pools"]["default"]["free"]
            for method, path, body in (
                ("POST", "/v1/leases", {"service": "more", "ttl": 60}),
                ("POST", "/v1/leases", [{"service": "more", "ttl": 60}] * 5),
                ("POST", f"/v1/leases/{lease['id']}/decline", None),
                ("PATCH", f"/v1/leases/{lease['id']}", {"metadata": {"x": "y" * 500}}),
                ("POST", f"/v1/leases/{lease['id']}/drain", None),
                ("DELETE", f"/v1/leases/{lease['id']}", None),
            ):
                reply = on_disk.call(method, path, body)
                assert (reply.status, reply.code) == (503, "store_unavailable"), (method, path, reply)
            assert on_disk.leases() == known
            assert not is_bindable(lease["port"])
            assert on_disk.get("/v1/status")["pools"]["default"]["free"] == free
            health = on_disk.call("GET", "/healthz")
            assert (health.status, health.body["status"]) == (503, "unhealthy")
            assert on_disk.get("/v1/status")["store"]["problem"]
            mortal.kill()
            wait_for(lambda: doomed["id"] not in on_disk.leases(), "a dead owner's lease ends although it is full")
            assert is_bindable(doomed["port"])
        wait_for(lambda: on_disk.call("GET", "/healthz").status == 200, "it recovers by itself")
        on_disk.lease("after", ttl=60)
        assert "the store works again" in on_disk.log()
        before = on_disk.leases()
        on_disk.restart(signal.SIGKILL)
        assert on_disk.leases().keys() == before.keys()
        assert on_disk.show(doomed["id"])["ended_because"] == "owner_exited"


def test_a_followers_stream_goes_on_while_the_disk_is_full(on_disk: Daemon, disk: Path) -> None:
    with Stream(on_disk) as stream, owner() as mortal:
        lease = on_disk.lease("followed", pid=mortal.pid)
        with full(disk):
            until_refused(on_disk)
            mortal.kill()
            event = stream.until(lambda event: event.type == "ended")[-1]
            assert event.data["lease"]["id"] == lease["id"]


def test_store_that_becomes_read_only_refuses_grants_and_recovers(make_daemon: MakeDaemon, place: Path) -> None:
    """A file that may not grow (RLIMIT_FSIZE, set from outside by prlimit(2)) takes no writes, not even root's."""
    daemon = make_daemon(prelude="import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)")
    daemon.errors.append("the store")
    daemon.start()
    lease = daemon.lease("before", ttl=3600)
    limit_file_size(daemon, daemon.store.stat().st_size)
    until_refused(daemon)
    assert daemon.show(lease["id"])["state"] == "held"
    known = daemon.leases().keys()
    limit_file_size(daemon, None)
    wait_for(lambda: daemon.call("GET", "/healthz").status == 200, "it recovers by itself")
    later = daemon.lease("after", ttl=60)
    daemon.restart(signal.SIGKILL)
    assert daemon.leases().keys() == known | {later["id"]}


def limit_file_size(daemon: Daemon, size: int | None) -> None:
    """Let the daemon write no file beyond `size` bytes."""
    limit = resource.RLIM_INFINITY if size is None else size
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_read_only_store_is_reported_at_start_and_recovers(on_disk: Daemon, disk: Path) -> None:
    lease = on_disk.lease("before", ttl=3600)
    on_disk.stop()
    with read_only(disk):
        assert on_disk.launch().wait(20) != 0
        on_disk.errors.append("CRITICAL")
        last = on_disk.log().splitlines()[-1]
        assert "CRITICAL" in last
        assert str(on_disk.store) in last or str(disk) in last
    on_disk.start()
    assert lease["id"] in on_disk.leases()


def test_many_events_are_pruned_before_the_disk_fills(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(
        prelude="import portd.pruning as p; p.EVENTS_KEPT = 20; p.PRUNE_EVENTS = 100; p.POLL_S = 0.02"
    ).start()

    def events() -> int:
        with contextlib.closing(sqlite3.connect(f"file:{daemon.store}?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT count(*) FROM events").fetchone()[0])

    for _ in range(150):
        daemon.call("DELETE", f"/v1/leases/{daemon.lease('busy', ttl=60)['id']}")
    wait_for(lambda: events() < 150, "what is older than the newest events is forgotten")
    assert events() >= 20
