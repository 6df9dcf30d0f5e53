"""The state table of a connection, driven without a socket."""

from __future__ import annotations

import asyncio
import socket
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.adapters.http import front as module
from portd.adapters.http.authenticator import Authenticator
from portd.adapters.http.fast_path import Head, PlainGrant
from portd.adapters.http.front import FRONT, TRANSITIONS, Connections, Front, State
from portd.core.rights import Caller
from portd.leasing.seams import Peer
from tests.adapters.http.fakes import FakeLoop, FakePeers, FakeSocket, FakeTransport

MINE = Peer(1000, 41, frozenset(), "peercred")
BY_TCP = Peer(1000, None, frozenset(), "socket", inode=5)


class FakeFastPath:
    """Accepts `grant` and no other bytes; each grant is answered when the test settles it, or at once."""

    def __init__(self, *, at_once=False):
        self.pending = []
        self.at_once = at_once
        self.count = 0

    def accept(self, end, data, last):
        return PlainGrant(None, Head(data, 0, Caller())) if data == b"grant" else None

    def grant(self, plain, send):
        self.count += 1
        number = self.count
        if self.at_once:
            send(b"answer%d;" % number)
            return None
        self.pending.append(lambda: send(b"answer%d;" % number))
        return FakeEntry()

    def settle(self):
        """Answer the oldest grant."""
        self.pending.pop(0)()


class FakeEntry:
    async def wait(self):
        """Wait for nothing."""


class Inner(asyncio.Protocol):
    """Stands for aiohttp: echoes each piece of data."""

    def __init__(self):
        self.received = b""
        self.is_lost = False
        self.is_paused = False

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.received += data
        self.transport.write(b"echo:" + data + b";")

    def pause_writing(self):
        self.is_paused = True

    def resume_writing(self):
        self.is_paused = False

    def connection_lost(self, exc):
        self.is_lost = True


class Bed:
    """One connection, its client's end, and all that it touches."""

    def __init__(self, peer=MINE, *, pid=7, at_once=False, half_close=True, connections=None):
        self.loop = FakeLoop()
        self.fast_path = FakeFastPath(at_once=at_once)
        self.connections = Connections() if connections is None else connections
        self.peers = FakePeers(peer, pid)
        self.inner = None
        connection = FakeSocket(socket.AF_UNIX if peer is MINE else socket.AF_INET)
        self.transport = FakeTransport(connection, half_close=half_close)
        authenticator = Authenticator(self.peers, "", {}, [], lambda token: token.encode())
        self.front = Front(
            self.connections, authenticator, self.fast_path, self._make_inner, lambda refusal: b"busy;", self.loop
        )
        self.transport.connect(self.front)

    def _make_inner(self):
        assert self.inner is None, "a connection is handed over once"
        self.inner = Inner()
        return self.inner

    def send(self, data):
        """Send as the client, where the daemon reads."""
        if self.transport.is_open and self.transport.reads:
            self.front.data_received(data)

    @property
    def state(self):
        """Return the state of the connection."""
        return self.front.state


def test_every_state_is_reached_and_left_by_a_lost_connection():
    states = set(get_args(State))
    assert {state for state, event in TRANSITIONS if event == "lost"} == states - {"closed"}
    assert set(TRANSITIONS.values()) | {"fast_idle"} == states


def test_aiohttp_is_terminal():
    assert {TRANSITIONS[key] for key in TRANSITIONS if key[0] == "aiohttp"} == {"aiohttp", "closing", "closed"}


def test_grants_are_answered_one_after_other_on_fast_path():
    bed = Bed()
    for number in range(1, 4):
        bed.send(b"grant")
        assert bed.state == "fast_busy"
        bed.fast_path.settle()
        assert bed.state == "fast_idle"
        assert bed.transport.written.endswith(b"answer%d;" % number)
    assert bed.inner is None


def test_grant_that_is_answered_at_once_leaves_the_connection_idle():
    bed = Bed(at_once=True)
    bed.send(b"grant")
    assert (bed.state, bed.transport.written) == ("fast_idle", b"answer1;")


def test_bytes_during_grant_are_kept_and_examined_after_its_answer():
    bed = Bed()
    bed.send(b"grant")
    bed.send(b"gra")
    bed.send(b"nt")
    bed.fast_path.settle()
    bed.loop.advance()
    assert bed.state == "fast_busy"
    bed.fast_path.settle()
    assert bed.transport.written == b"answer1;answer2;"


def test_any_other_byte_hands_the_connection_over_for_good():
    bed = Bed()
    bed.send(b"grant")
    bed.fast_path.settle()
    bed.send(b"GET")
    assert (bed.state, bed.inner.received) == ("aiohttp", b"GET")
    bed.send(b"grant")
    assert bed.inner.received == b"GETgrant"
    assert bed.fast_path.count == 1


def test_handover_waits_for_the_answer_of_a_grant_under_way():
    bed = Bed()
    bed.send(b"grant")
    bed.send(b"GET")
    assert bed.inner is None
    bed.fast_path.settle()
    bed.loop.advance()
    assert bed.transport.written == b"answer1;echo:GET;"


def test_process_of_tcp_caller_is_found_before_its_first_grant():
    bed = Bed(BY_TCP)
    bed.send(b"grant")
    assert bed.front.end.peer.pid == 7
    bed.fast_path.settle()
    bed.send(b"grant")
    assert (bed.peers.search_count, bed.state) == (1, "fast_busy")


def test_process_is_not_searched_for_caller_who_does_not_grant():
    bed = Bed(BY_TCP)
    bed.send(b"GET")
    assert bed.peers.search_count == 0


def test_client_that_has_gone_does_not_disturb_its_grant():
    bed = Bed()
    bed.send(b"grant")
    bed.transport.hang_up()
    bed.fast_path.settle()
    assert (bed.state, bed.transport.written, len(bed.connections)) == ("closed", b"", 0)


def test_idle_connection_is_closed_after_the_keepalive_time():
    bed = Bed()
    bed.loop.advance(module.KEEPALIVE_S - 1)
    bed.send(b"grant")
    bed.fast_path.settle()
    bed.loop.advance(module.KEEPALIVE_S - 1)
    assert bed.transport.is_open
    bed.loop.advance(2)
    assert not bed.transport.is_open


def test_head_that_does_not_arrive_in_time_ends_the_connection():
    bed = Bed()
    bed.send(b"POST /v1")
    bed.loop.advance(module.REQUEST_TIMEOUT_S - 1)
    bed.send(b"/leases")
    assert bed.transport.is_open
    bed.loop.advance(2)
    assert not bed.transport.is_open


def test_request_under_way_has_no_head_timer():
    bed = Bed()
    bed.send(b"GET")
    bed.front.request_began()
    bed.send(b"body")
    bed.loop.advance(module.REQUEST_TIMEOUT_S * 2)
    assert bed.transport.is_open


def test_client_that_reads_no_answer_is_cut_off():
    bed = Bed()
    bed.send(b"GET")
    bed.front.request_began()
    bed.transport.unread = 100_000
    bed.front.pause_writing()
    assert bed.inner.is_paused
    bed.loop.advance(module.ANSWER_TIMEOUT_S + 1)
    assert not bed.transport.is_open


def test_slow_reader_that_goes_on_is_not_cut_off():
    bed = Bed()
    bed.send(b"GET")
    bed.front.request_began()
    bed.front.pause_writing()
    bed.loop.advance(module.ANSWER_TIMEOUT_S - 1)
    bed.front.resume_writing()
    bed.loop.advance(2)
    assert bed.transport.is_open
    assert not bed.inner.is_paused


def test_client_that_grants_without_reading_is_not_read_any_more():
    bed = Bed()
    bed.front.pause_writing()
    assert not bed.transport.reads
    bed.front.resume_writing()
    assert bed.transport.reads


def test_closing_lets_a_client_that_still_sends_read_its_answer():
    bed = Bed()
    bed.send(b"POST")
    bed.inner.transport.close()
    assert bed.transport.is_half_closed
    assert bed.transport.is_open
    for _ in range(100):
        bed.send(b"more")
    assert bed.inner.received == b"POST"
    bed.transport.hang_up()
    assert (bed.state, bed.inner.is_lost) == ("closed", True)


def test_client_that_never_stops_sending_is_cut_off_while_closing():
    bed = Bed()
    bed.send(b"POST")
    bed.inner.transport.close()
    bed.loop.advance(module.CLOSING_S + 0.1)
    assert not bed.transport.is_open


def test_tls_connection_closes_at_once():
    bed = Bed(half_close=False)
    bed.send(b"POST")
    bed.inner.transport.close()
    assert not bed.transport.is_open


def test_stop_closes_an_idle_connection_and_finishes_a_grant():
    bed = Bed()
    asyncio.run(bed.front.stop(1.0))
    assert not bed.transport.is_open


def test_only_a_user_beyond_its_share_gets_busy(monkeypatch):
    monkeypatch.setattr(module, "USER_CONNECTIONS_MAX", 3)
    connections = Connections()
    beds = [Bed(connections=connections) for _ in range(3)]
    late = Bed(connections=connections)
    late.send(b"grant")
    assert (late.state, late.transport.written) == ("closing", b"busy;")
    other = Bed(MINE._replace(uid=1001), connections=connections)
    other.send(b"grant")
    assert other.state == "fast_busy"
    beds[0].transport.hang_up()
    again = Bed(connections=connections)
    again.send(b"grant")
    assert again.state == "fast_busy"


def test_connections_beyond_a_bound_are_bounded_themselves(monkeypatch):
    monkeypatch.setattr(module, "CONNECTIONS_MAX", 0)
    monkeypatch.setattr(module, "REFUSING_MAX", 2)
    connections = Connections()
    beds = [Bed(connections=connections) for _ in range(5)]
    assert [bed.transport.is_open for bed in beds] == [True, True, False, False, False]
    beds[0].loop.advance(module.CLOSING_S + 0.1)
    assert not beds[0].transport.is_open


def test_unread_answers_are_counted_by_user():
    connections = Connections()
    for unread in (100, 200):
        bed = Bed(connections=connections)
        bed.transport.unread = unread
        bed.front.pause_writing()
    Bed(connections=connections).transport.unread = 5  # below the mark at which writing pauses
    assert connections.unread_bytes() == {1000: 300}


def test_aiohttp_finds_the_front_of_a_connection():
    bed = Bed()
    bed.send(b"GET")
    assert bed.inner.transport.get_extra_info(FRONT) is bed.front
    assert bed.inner.transport.get_extra_info("socket") is bed.transport.connection


STEPS = st.sampled_from(
    ["grant", "GET", "gr", "settle", "turn", "wait", "pause", "close", "hang up", "began", "ended", "abort"]
)


@given(st.lists(STEPS, max_size=40), st.sampled_from([MINE, BY_TCP]), st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_no_sequence_of_events_leaves_the_table_or_mixes_answers(steps, peer, at_once):
    bed = Bed(peer, at_once=at_once)
    is_paused = False
    for step in steps:
        if step in ("grant", "GET", "gr"):
            bed.send(step.encode())
        elif step == "settle" and bed.fast_path.pending:
            bed.fast_path.settle()
        elif step == "turn":
            bed.loop.advance()
        elif step == "wait":
            bed.loop.advance(4)
        elif step == "pause" and bed.transport.is_open:
            (bed.front.resume_writing if is_paused else bed.front.pause_writing)()
            is_paused = not is_paused
        elif step == "close" and bed.inner is not None and bed.transport.is_open:
            bed.inner.transport.close()
        elif step == "hang up" and bed.transport.is_open:
            bed.transport.hang_up()
        elif step == "began":
            bed.front.request_began()
        elif step == "ended":
            bed.front.request_ended()
        elif step == "abort":
            bed.transport.abort()
    answers = [part for part in bed.transport.written.split(b";") if part.startswith(b"answer")]
    assert answers == [b"answer%d" % number for number in range(1, len(answers) + 1)]
    assert bed.transport.written.rfind(b"answer") <= (bed.transport.written + b"echo").find(b"echo")
    bed.transport.abort()
    assert (bed.state, len(bed.connections)) == ("closed", 0)
