"""What was answered is there after a crash; a store that is not ours, damaged or in use is left as it is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import DEADLINE_S, NOBODY, Daemon, Stream, free_tcp_port, is_bindable, owner, wait_for
from tests.e2e.puppet import Puppet
from tests.e2e.torture import PowerCuts, power_cuts, torture

FAULTS = ("lost", "doubled", "risen", "rewound", "misled")


@pytest.fixture
def cuts(place: Path) -> Iterator[PowerCuts]:
    """A disk whose power can be cut."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists():
        pytest.skip("needs root, loop devices and mkfs.ext4 (e2fsprogs)")
    with power_cuts(place) as disk:
        yield disk


def test_acknowledged_grants_survive_kill_9_exactly_once(place: Path) -> None:
    counts = torture(15, place / "daemon")
    assert {name: counts[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert counts["granted"] > 150, "the load was too light to prove anything"
    assert counts["released"] > 50


def test_what_was_acknowledged_survives_power_cuts(place: Path, cuts: PowerCuts) -> None:
    counts = torture(10, place / "daemon", cuts=cuts)
    assert {name: counts[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert counts["power_cuts"] == 5


def test_power_cuts_show_what_an_unsynced_store_loses(place: Path, cuts: PowerCuts) -> None:
    counts = torture(6, place / "daemon", cuts=cuts, durability="fast")
    assert counts["lost"] + counts["risen"] > 0, "else the power cuts prove nothing"


def test_after_a_crash_everything_is_as_it_was(own_daemon: Daemon) -> None:
    with owner() as survivor, owner() as victim:
        lease = own_daemon.lease(
            "survivor",
            pid=survivor.pid,
            tags=["a"],
            metadata={"b": "c"},
            hold="exclusive",
            check={"kind": "tcp", "interval": 60},
            protocol="both",
        )
        udp = own_daemon.lease("survivor", pid=survivor.pid, protocol="udp", address="::1")
        own = own_daemon.lease("survivor", pid=survivor.pid, address="own", port=80)
        clocked = own_daemon.lease("clocked", ttl=3600)
        released = own_daemon.lease("released", pid=survivor.pid)
        doomed = own_daemon.lease("doomed", pid=victim.pid)
        assert own_daemon.call("DELETE", f"/v1/leases/{released['id']}").status == 204
        assert own_daemon.call("POST", f"/v1/leases/{lease['id']}/drain").status == 200
        before = own_daemon.leases()
        own_daemon.kill()
        assert is_bindable(lease["port"]), "the hold dies with the daemon"
        victim.kill()
        victim.wait()
        own_daemon.start()
        after = own_daemon.leases()
        assert after.keys() == {lease["id"], udp["id"], own["id"], clocked["id"]}
        steady = {"expires_at", "renewed_at"}
        for lease_id, then in after.items():
            assert {name: value for name, value in then.items() if name not in steady} == {
                name: value for name, value in before[lease_id].items() if name not in steady
            }
        assert own_daemon.show(doomed["id"])["ended_because"] == "owner_exited"
        assert own_daemon.show(released["id"])["ended_because"] == "released"
        assert own_daemon.verdict(doomed["port"]) == "cooling"
        assert not is_bindable(lease["port"], reuse=True), "the exclusive hold is taken back"
        assert not is_bindable(own["port"], own["address"])
        with Puppet(own_daemon, uid=NOBODY) as nobody:
            wrong = nobody.call("POST", f"/v1/leases/{lease['id']}/drain", Authorization=f"Bearer {udp['token']}")
            assert (wrong.status, wrong.code) == (403, "not_owner")
            assert (
                nobody.call("DELETE", f"/v1/leases/{lease['id']}", Authorization=f"Bearer {lease['token']}").status
                == 204
            )
        with Stream(own_daemon) as stream:
            survivor.kill()
            ended = stream.until(lambda event: event.data["lease"]["id"] == own["id"])[-1]
        assert ended.type == "ended", "the exit of an owner from before the crash is noticed"


def test_lease_stays_bound_through_a_crash_and_is_held_later(
    own_daemon: Daemon,
) -> None:
    with Puppet(own_daemon) as puppet:
        lease = puppet.lease("listening")
        puppet.listen(lease["port"])
        own_daemon.wait_state(lease["id"], "bound")
        own_daemon.restart(signal.SIGKILL)
        own_daemon.wait_state(lease["id"], "bound")  # what was seen is written behind: the crash may have taken it
        puppet.do("unlisten")
        own_daemon.wait_state(lease["id"], "held")
        wait_for(lambda: not is_bindable(lease["port"]), "the hold is taken again")
        assert not any("have no hold" in warning for warning in own_daemon.get("/v1/status")["warnings"])


def test_revisions_and_the_stream_go_on_across_a_crash(own_daemon: Daemon) -> None:
    first = own_daemon.lease("before", ttl=3600)
    own_daemon.restart(signal.SIGKILL)
    second = own_daemon.lease("after", ttl=3600)
    assert second["revision"] > first["revision"]
    with Stream(own_daemon, f"?after={first['revision'] - 1}") as stream:
        events = stream.until(lambda event: event.data["lease"]["id"] == second["id"])
    assert [event.data["lease"]["id"] for event in events] == [first["id"], second["id"]]
    assert events[0].id < events[1].id


def test_a_ttl_lease_has_a_full_period_after_a_crash(own_daemon: Daemon) -> None:
    lease = own_daemon.lease("clock", ttl=3600)
    own_daemon.restart(signal.SIGKILL)
    after = own_daemon.show(lease["id"])
    assert after["expires_at"] > lease["expires_at"]
    assert after["state"] == "held"


def test_fast_durability_survives_the_daemons_death_too(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.configure("", path=f'"{daemon.store}"\ndurability = "fast"')
    daemon.start()
    leases = {daemon.lease("fast", ttl=3600)["id"] for _ in range(20)}
    daemon.restart(signal.SIGKILL)
    assert daemon.leases().keys() == leases


# --- stores that must not be touched ---


def refuses_to_start(daemon: Daemon, *words: str) -> None:
    """Assert that the daemon does not start, says why and exits with EX_DATAERR, and that no file changes."""
    before = fingerprint(daemon.directory)
    process = daemon.launch()
    assert process.wait(DEADLINE_S) == os.EX_DATAERR, daemon.log()
    daemon.process = None
    last = daemon.log().splitlines()[-1]
    daemon.errors.append(last)
    for word in ("CRITICAL", *words):
        assert word in last, last
    assert fingerprint(daemon.directory) == before


def fingerprint(directory: Path) -> dict[str, str]:
    """Return the contents of all state files, hashed."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.glob("portd.db*"))
        if not path.name.endswith(("-shm", ".lock"))
    }


def test_a_damaged_database_is_refused_and_left_as_it_is(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    for _ in range(50):
        daemon.lease("some", ttl=3600)
    daemon.stop()
    whole = daemon.store.read_bytes()
    for damaged in (whole[:4096] + b"\xff" * (len(whole) - 4096), b"\0" * len(whole), b"this is no database" * 300):
        daemon.store.write_bytes(damaged)
        refuses_to_start(daemon, str(daemon.store))
    daemon.store.write_bytes(whole)
    daemon.start()
    assert len(daemon.leases()) == 50


def test_newer_database_is_refused_and_unchanged(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.store)) as database:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        database.execute(f"PRAGMA user_version = {version + 1}")
    refuses_to_start(daemon, str(daemon.store), "newer")


def test_foreign_database_is_refused_and_unchanged(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    with contextlib.closing(sqlite3.connect(daemon.store)) as database:
        database.execute("CREATE TABLE poems (line TEXT)")
        database.commit()
    refuses_to_start(daemon, str(daemon.store))


def test_a_second_daemon_on_the_same_state_is_refused(make_daemon: MakeDaemon, own_daemon: Daemon) -> None:
    second = make_daemon()
    second.store = own_daemon.store
    second.configure("")
    process = second.launch()
    assert process.wait(DEADLINE_S) == os.EX_UNAVAILABLE
    second.errors.append(second.log().splitlines()[-1])
    assert str(own_daemon.store.parent) in second.log()
    assert own_daemon.lease("goes-on", ttl=3600)


def test_a_second_daemon_on_the_same_sockets_is_refused(make_daemon: MakeDaemon, own_daemon: Daemon) -> None:
    for socket_path, http in ((own_daemon.socket, free_tcp_port()), (None, own_daemon.tcp[1])):
        second = make_daemon()
        second.configure("", socket=f'"{socket_path or second.socket}"', http=f'"127.0.0.1:{http}"')
        process = second.launch()
        assert process.wait(DEADLINE_S) == os.EX_UNAVAILABLE, second.log()
        second.errors.append(second.log().splitlines()[-1])
        assert "can't be served" in second.log() or "another daemon answers" in second.log()
    assert own_daemon.lease("goes-on", ttl=3600)


def test_sockets_that_a_dead_daemon_left_are_taken_over(own_daemon: Daemon) -> None:
    own_daemon.kill()
    assert own_daemon.socket.exists()
    assert own_daemon.handoff.exists()
    own_daemon.start()
    assert own_daemon.socket.stat().st_mode & 0o777 == 0o666
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as handoff:
        handoff.connect(str(own_daemon.handoff))


def test_stopped_daemons_state_can_be_copied_and_goes_on_elsewhere(make_daemon: MakeDaemon, own_daemon: Daemon) -> None:
    leases = {own_daemon.lease("moved", ttl=3600)["id"] for _ in range(10)}
    own_daemon.stop()
    other = make_daemon()
    for path in own_daemon.directory.glob("portd.db*"):
        shutil.copy(path, other.directory)
    other.start()
    assert other.leases().keys() == leases
