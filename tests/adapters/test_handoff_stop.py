"""What a stop of the daemon does to those who are connected for a handoff."""

from __future__ import annotations

import asyncio
import json
import socket

from portd.adapters.handoff import HandoffServer
from portd.testing.world import in_world

REQUEST = json.dumps({"request": {"service": "orders"}}).encode()


class Door:
    """A handoff server on a socket of its own; what it passes is a bound socket, whatever the lease."""

    def __init__(self, world) -> None:
        self._path = "\0portd-test-handoff-stop"
        self.passed = socket.socket()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind(self._path)
        listener.listen()
        world.processes.start(41)
        self.server = HandoffServer(
            world.service, world.service, self, lambda connection: world.caller(41), lambda: None, str
        )
        self.server.serve(listener)

    def pass_on(self, lease_id, protocol, address, port):
        """Give what stands for the hold."""
        return {"tcp": self.passed}

    async def knock(self) -> socket.socket:
        """Connect, and return when it has been let in."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.setblocking(False)
        before = len(self.server._connections)
        client.connect(self._path)
        while len(self.server._connections) == before:
            await asyncio.sleep(0)
        return client


async def answer_to(client):
    """Return the message and how many descriptors came with it; an empty message is the end."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(client, readable.set)
    async with asyncio.timeout(10):
        await readable.wait()
    loop.remove_reader(client)
    message, descriptors, _, _ = socket.recv_fds(client, 65536, 4)
    for descriptor in descriptors:
        socket.close(descriptor)
    return message and json.loads(message), len(descriptors)


@in_world()
async def test_a_handoff_under_way_is_finished_by_a_stop(world):
    door = Door(world)
    world.store.gate.clear()
    with door.passed, await door.knock() as client:
        client.send(REQUEST)
        while not world.journal.waiting_count and not world.journal._is_committing:
            await asyncio.sleep(0)
        stopping = asyncio.create_task(door.server.close())
        await asyncio.sleep(0)
        world.store.gate.set()
        message, descriptors = await answer_to(client)
        assert (message["lease"]["service"], descriptors) == ("orders", 1)
        assert await answer_to(client) == (b"", 0)
        await stopping


@in_world()
async def test_who_is_connected_when_a_stop_begins_may_ask_yet(world):
    door = Door(world)
    with door.passed, await door.knock() as client:
        stopping = asyncio.create_task(door.server.close())
        await asyncio.sleep(0)
        client.send(REQUEST)
        message, descriptors = await answer_to(client)
        assert (message["lease"]["service"], descriptors) == ("orders", 1)
        await stopping


@in_world()
async def test_stop_waits_for_no_silent_client_or_hanging_disk(world):
    door = Door(world)
    world.store.gate.clear()
    with door.passed, await door.knock() as silent, await door.knock() as asking:
        asking.send(REQUEST)
        async with asyncio.timeout(10):
            await door.server.close()
        assert await answer_to(silent) == (b"", 0)
        assert await answer_to(asking) == (b"", 0)
    world.store.gate.set()
    await world.settle()
