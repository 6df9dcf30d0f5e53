"""The event stream in a world of its own: a real server on a socket, a service that a test drives."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager

import aiohttp

from portd.adapters.http import events as module
from portd.adapters.http.authenticator import Authenticator
from portd.adapters.http.events import EventCalls
from portd.adapters.http.revisions import Revisions
from portd.adapters.http.server import HttpServer
from portd.leasing.seams import Peer
from portd.testing.world import in_world
from tests.adapters.http.fakes import FakePeers

DEADLINE_S = 20.0
STORE = "0123456789abcdef"


@asynccontextmanager
async def serving(world, name):
    """Serve the events of a world on an abstract unix socket; gives a client's session."""
    peers = FakePeers(Peer(1000, 41, frozenset(), "peercred"))
    authenticator = Authenticator(peers, "", {}, [], lambda token: token.encode())
    server = HttpServer(authenticator, lambda: world.feed.revision, STORE)
    calls = EventCalls(world.feed, Revisions(STORE))
    server.add(calls.routes())
    await server.start()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0portd-test-events-{name}")
    await server.serve(listener)
    connector = aiohttp.UnixConnector(path=f"\0portd-test-events-{name}")
    async with aiohttp.ClientSession("http://localhost", connector=connector) as session:
        try:
            yield session, calls
        finally:
            calls.close()
            await server.close()


async def read_events(response, count):
    """Read so many events; comments are left out."""
    found = []
    async with asyncio.timeout(DEADLINE_S):
        while len(found) < count:
            text = (await response.content.readuntil(b"\n\n")).decode()
            if not text.startswith(":"):
                fields = dict(line.split(": ", 1) for line in text.strip().split("\n"))
                found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


@in_world()
async def test_follower_gets_past_and_then_what_happens_each_event_once(world):
    for number in range(3):
        await world.grant(service="orders", instance=f"orders-{number}", ttl=60)
    async with serving(world, "past") as (session, _), session.get("/v1/events?after=0") as response:
        assert response.headers["X-Portd-Store"] == STORE
        assert response.headers["X-Accel-Buffering"] == "no"
        past = await read_events(response, 3)
        await world.grant(service="orders", instance="orders-3", ttl=60)
        found = past + await read_events(response, 1)
    assert [revision for revision, _, _ in found] == [1, 2, 3, 4]
    assert [data["lease"]["instance"] for _, _, data in found] == [f"orders-{number}" for number in range(4)]


@in_world()
async def test_a_follower_of_one_service_gets_no_other(world):
    async with serving(world, "filter") as (session, _), session.get("/v1/events?service=billing") as response:
        await world.grant(service="orders", ttl=60)
        await world.grant(service="billing", ttl=60)
        found = await read_events(response, 1)
    assert found[0][2]["service"] == "billing"


@in_world()
async def test_follower_resumes_after_its_last_event_with_or_without_store(world):
    for _ in range(3):
        await world.grant(service="orders", ttl=60)
    async with serving(world, "resume") as (session, _):
        for last in ("2", f"{STORE}:2"):
            async with session.get("/v1/events", headers={"Last-Event-ID": last}) as response:
                assert [revision for revision, _, _ in await read_events(response, 1)] == [3]


@in_world()
async def test_revision_of_another_store_or_of_future_is_gone(world):
    async with serving(world, "gone") as (session, _):
        for after in (f"{'f' * 16}:0", "1000"):
            async with session.get("/v1/events", params={"after": after}) as response:
                assert (response.status, (await response.json(content_type=None))["code"]) == (410, "revision_gone")
        browser = {"Accept": "text/event-stream", "Sec-Fetch-Mode": "cors"}
        async with session.get("/v1/events?after=1000", headers=browser) as response:
            assert response.status == 200
            assert (await response.text()).startswith("event: gone\ndata: {")


@in_world()
async def test_user_beyond_its_follower_share_is_refused_until_one_ends(world):
    original, module.USER_FOLLOWERS_MAX = module.USER_FOLLOWERS_MAX, 1
    try:
        async with serving(world, "share") as (session, calls):
            async with session.get("/v1/events") as first:
                assert first.status == 200
                async with session.get("/v1/events") as second:
                    assert (second.status, second.headers["Retry-After"]) == (503, "1")
            async with asyncio.timeout(DEADLINE_S):
                while calls.stream_count:
                    await asyncio.sleep(0.001)
            async with session.get("/v1/events") as third:
                assert third.status == 200
    finally:
        module.USER_FOLLOWERS_MAX = original


@in_world()
async def test_followers_are_ended_when_the_daemon_stops(world):
    async with serving(world, "stop") as (session, calls), session.get("/v1/events") as response:
        await read_until_following(response)
        calls.close()
        async with asyncio.timeout(DEADLINE_S):
            while calls.stream_count:
                await asyncio.sleep(0.001)


async def read_until_following(response):
    """Read the comment that follows the past."""
    async with asyncio.timeout(DEADLINE_S):
        assert (await response.content.readuntil(b"\n\n")).startswith(b": following")
