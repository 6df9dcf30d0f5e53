"""Followers and long polls: no event is missed, none is sent twice, nobody is woken for nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import Daemon, Reply, Stream, owner, wait_for

MANY = 40


def churn(daemon: Daemon, service: str, count: int) -> int:
    """Lease and release; returns the newest revision."""
    for _ in range(count):
        lease = daemon.lease(service, ttl=60)
        daemon.call("DELETE", f"/v1/leases/{lease['id']}")
    return daemon.call("GET", "/v1/leases?limit=1").revision


def test_every_change_is_an_event_with_its_lease(daemon: Daemon) -> None:
    with Stream(daemon, "?service=changes") as stream, owner() as process:
        lease = daemon.lease("changes", pid=process.pid, check={"kind": "report"})
        path = f"/v1/leases/{lease['id']}"
        daemon.call("POST", f"{path}/drain")
        daemon.call("POST", f"{path}/drain", {"drain": False})
        daemon.call("PATCH", path, {"tags": ["new"]})
        daemon.call("PUT", f"{path}/health", {"status": "passing", "note": "fine"})
        moved = daemon.call("POST", f"{path}/decline").body
        daemon.call("DELETE", path)
        events = stream.until(lambda event: event.type == "ended")
    assert [event.type for event in events] == [
        "granted",
        "draining",
        "undrained",
        "updated",
        "health",
        "declined",
        "ended",
    ]
    assert [event.id for event in events] == sorted({event.id for event in events})
    assert all(event.data["revision"] == event.id == event.data["lease"]["revision"] for event in events)
    assert [event.data["lease"]["port"] for event in events][-2:] == [moved["port"]] * 2
    assert events[4].data["note"] == "fine"
    assert all("token" not in event.data["lease"] for event in events)


def test_stream_begins_now_unless_a_position_is_given(daemon: Daemon) -> None:
    churn(daemon, "now", 2)
    with Stream(daemon, "?service=now") as stream:
        lease = daemon.lease("now", ttl=60)
        event = next(iter(stream))
    assert (event.type, event.data["lease"]["id"]) == ("granted", lease["id"])


@pytest.mark.parametrize("by", ["after", "Last-Event-ID"])
def test_whoever_resumes_misses_nothing_and_sees_nothing_twice(daemon: Daemon, by: str) -> None:
    """While somebody churns, a follower breaks off after a few events and resumes from the last id, again and again."""
    service = f"resumed-{by.lower()}"
    start = daemon.call("GET", "/v1/leases?limit=1").revision
    thread = threading.Thread(target=churn, args=(daemon, service, MANY))
    thread.start()
    seen: list[int] = []
    kinds: list[str] = []
    last = start
    while len(seen) < 2 * MANY:
        stream = (
            Stream(daemon, f"?after={last}&service={service}")
            if by == "after"
            else Stream(daemon, f"?service={service}", Last_Event_ID=str(last))
        )
        with stream:
            for event, _ in zip(stream, range(7), strict=False):
                seen.append(event.id)
                kinds.append(event.type)
                if len(seen) == 2 * MANY:
                    break
        last = seen[-1]
    thread.join()
    assert kinds == ["granted", "ended"] * MANY
    assert seen == sorted(set(seen))


def test_a_filtered_stream_carries_its_service_alone(daemon: Daemon) -> None:
    with Stream(daemon, "?service=wanted") as stream:
        churn(daemon, "unwanted", 3)
        churn(daemon, "wanted", 1)
        events = stream.until(lambda event: event.type == "ended")
    assert {event.data["service"] for event in events} == {"wanted"}


def test_revision_that_is_not_kept_or_from_future_is_gone(make_daemon: MakeDaemon) -> None:
    short = "import portd.leasing.feed as feed, portd.pruning as pruning; feed.EVENTS_KEPT = pruning.EVENTS_KEPT = 10"
    daemon = make_daemon(prelude=short).start()
    now = churn(daemon, "old", 10)
    for after in (0, now - 15, now + 10, 2**53):
        reply = daemon.call("GET", f"/v1/events?after={after}")
        assert (reply.status, reply.code) == (410, "revision_gone"), after
        assert "list again" in reply.body["detail"]
    with Stream(daemon, f"?after={now - 8}") as stream:
        assert next(iter(stream)).id > now - 8


def test_a_follower_resumes_across_a_crash(own_daemon: Daemon) -> None:
    churn(own_daemon, "crash", 2)
    with Stream(own_daemon, "?after=0") as stream:
        seen = [next(iter(stream)).id for _ in range(3)]
        own_daemon.kill()
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            assert len(list(stream)) <= 1  # it is cut off, and knows
    own_daemon.start()
    later = own_daemon.lease("crash", ttl=60)
    with Stream(own_daemon, f"?after={seen[-1]}") as stream:
        events = stream.until(lambda event: event.data["lease"]["id"] == later["id"])
    assert [event.type for event in events] == ["ended", "granted"]


def test_a_quiet_stream_has_a_heartbeat(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(prelude="import portd.adapters.http.events as e; e.HEARTBEAT_S = 0.2").start()
    with Stream(daemon) as stream:
        beats = [line for line, _ in zip(stream.lines(), range(7), strict=False)]
    assert beats.count(": alive") >= 2, beats


# --- long polls ---


class Poll(threading.Thread):
    """A long poll; `reply` is there when it has been answered."""

    def __init__(self, daemon: Daemon, service: str, after: int, wait_s: float) -> None:
        super().__init__()
        self._daemon = daemon
        self._path = f"/v1/services/{service}?held=true&after={after}&wait={wait_s}"
        self.reply: Reply | None = None
        self.start()

    def run(self) -> None:
        """Wait."""
        self.reply = self._daemon.call("GET", self._path)

    def answer(self) -> Any:
        """Return the body of the answer, when it comes."""
        self.join(20)
        assert self.reply is not None, "the poll was not answered"
        assert self.reply.status == 200
        return self.reply.body


@pytest.fixture
def quiet() -> Iterator[int]:
    """The pid of a process that listens nowhere: what this one listens on "elsewhere" changes its leases, and wakes."""
    with owner() as process:
        yield process.pid


def polls_wait(daemon: Daemon, count: int) -> None:
    """Wait until so many connections are open beside the one that asks."""
    with daemon.connect() as asking:  # one for all: the daemon counts a closed one until it has noticed

        def connections() -> int:
            found: int = asking.call("GET", "/v1/status").body["counts"]["connections"]
            return found

        wait_for(lambda: connections() == count + 1, "the polls wait")


def test_a_poll_is_woken_by_its_own_service_alone(own_daemon: Daemon, quiet: int) -> None:
    first = own_daemon.lease("mine", pid=quiet)
    poll = Poll(own_daemon, "mine", first["revision"], 60)
    polls_wait(own_daemon, 1)
    churn(own_daemon, "other", 5)
    assert poll.is_alive()
    second = own_daemon.lease("mine", ttl=60)
    answer = poll.answer()
    assert poll.reply is not None
    assert poll.reply.revision == answer["revision"] >= second["revision"]
    assert {instance["id"] for instance in answer["instances"]} == {first["id"], second["id"]}


def test_poll_that_is_behind_or_ahead_is_answered_at_once(daemon: Daemon) -> None:
    lease = daemon.lease("behind", ttl=60)
    began = time.monotonic()
    for after in (0, lease["revision"] - 1, 2**53):
        reply = daemon.call("GET", f"/v1/services/behind?held=true&after={after}&wait=600")
        assert (reply.status, len(reply.body["instances"])) == (200, 1)
        assert reply.revision < 2**53
    assert time.monotonic() - began < 60, "none of them waited"


def test_poll_in_vain_is_answered_when_its_time_is_over(daemon: Daemon) -> None:
    reply = daemon.call("GET", f"/v1/services/nothing?after={daemon.call('GET', '/v1/leases').revision}&wait=0.2")
    assert (reply.status, reply.body["instances"]) == (200, [])


def test_a_poll_across_a_restart_sees_what_happened_meanwhile(own_daemon: Daemon) -> None:
    with owner() as process:
        lease = own_daemon.lease("restarted", pid=process.pid)
        own_daemon.kill()
    own_daemon.start()
    answer = own_daemon.get(f"/v1/services/restarted?held=true&after={lease['revision']}&wait=60")
    assert answer["instances"] == []


def test_many_polls_for_one_service_are_all_answered(own_daemon: Daemon, quiet: int) -> None:
    revision = own_daemon.lease("many", pid=quiet)["revision"]
    polls = [Poll(own_daemon, "many", revision, 60) for _ in range(50)]
    polls_wait(own_daemon, 50)
    own_daemon.lease("many", ttl=60)
    assert all(len(poll.answer()["instances"]) == 2 for poll in polls)


# --- the end ---


def test_stop_ends_polls_and_streams_within_two_seconds(own_daemon: Daemon, quiet: int) -> None:
    lease = own_daemon.lease("stopping", pid=quiet)
    with Stream(own_daemon) as stream, own_daemon.connect() as idle:
        idle.call("GET", "/healthz")
        poll = Poll(own_daemon, "stopping", lease["revision"], 600)
        polls_wait(own_daemon, 3)
        began = time.monotonic()
        assert own_daemon.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 2.0, "two seconds are promised"
        assert poll.answer()["instances"][0]["id"] == lease["id"]
        assert [event for event in stream if event.type != "updated"] == []
    assert own_daemon.start().show(lease["id"])["state"] == "held"


def test_follower_that_disconnects_during_replay_is_no_fault(own_daemon: Daemon) -> None:
    churn(own_daemon, "past", 30)
    for _ in range(20):
        with Stream(own_daemon, "?after=0") as stream:
            assert next(iter(stream)).type == "granted"
    wait_for(lambda: own_daemon.get("/v1/status")["counts"]["followers"] == 0, "nobody follows any more")


def test_a_revision_of_another_store_is_gone_at_once(daemon: Daemon) -> None:
    headers = daemon.call("GET", "/v1/leases").headers
    store, revision = headers["x-portd-store"], headers["x-portd-revision"]
    for path in ("/v1/events?after=", "/v1/services/orders?wait=60&after="):
        reply = daemon.call("GET", f"{path}0123456789abcdef:{revision}")
        assert (reply.status, reply.code) == (410, "revision_gone"), path
    with Stream(daemon, f"?after={store}:{revision}&service=followed") as stream:
        lease = daemon.lease("followed", ttl=60)
        assert next(iter(stream)).type == "granted"
    daemon.call("DELETE", f"/v1/leases/{lease['id']}")


def test_a_browsers_event_source_gets_its_refusal_as_an_event(daemon: Daemon) -> None:
    browser = {"Accept": "text/event-stream", "Sec-Fetch-Mode": "cors", "Last-Event-ID": str(2**50)}
    reply = daemon.call("GET", "/v1/events", **browser)
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    event, data = reply.body.strip().split("\n")
    assert event == "event: gone"
    assert json.loads(data.removeprefix("data: "))["code"] == "revision_gone"
    del browser["Sec-Fetch-Mode"]
    assert daemon.call("GET", "/v1/events", **browser).status == 410
