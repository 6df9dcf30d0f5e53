"""Run in the box, with the standard library only. All commands print what came of them as JSON.

`load.py grants COUNT PER_SECOND` asks for leases, each on a connection of its own; `load.py handoffs …` asks for them
together with their sockets; `load.py grab SECONDS PORT…` tries to bind ports that are held.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable

SOCKET = "/run/portd/portd.sock"
HANDOFF = "/run/portd/handoff.sock"
REQUEST = (
    b"POST /v1/leases HTTP/1.1\r\nHost: portd\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Connection: close\r\n\r\n%s"
)


def request_body(index: int) -> bytes:
    """Make a request for a lease that nobody else has asked for."""
    return json.dumps({"service": "load", "instance": f"load-{os.getpid()}-{index}", "ttl": 600}).encode()


async def ask(index: int, answers: list[tuple[int, str]]) -> None:
    """Ask for one lease; whatever goes wrong is an answer too."""
    body = request_body(index)
    try:
        async with asyncio.timeout(20):
            reader, writer = await asyncio.open_unix_connection(SOCKET)
            writer.write(REQUEST % (len(body), body))
            answer = await reader.read()
            writer.close()
        answers.append((int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2].decode()))
    except (OSError, IndexError, ValueError, TimeoutError) as error:
        answers.append((0, repr(error)))


async def ask_for_socket(index: int, answers: list[tuple[int, str]]) -> None:
    """Ask for one lease and its socket: 201 is a lease whose socket came with it."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as asking:
        try:
            asking.connect(HANDOFF)
            asking.send(b'{"request": %s}' % request_body(index))
            loop.add_reader(asking, readable.set)
            async with asyncio.timeout(20):
                await readable.wait()
            message, descriptors, _, _ = socket.recv_fds(asking, 65536, 4)
            for descriptor in descriptors:
                socket.close(descriptor)
            answers.append((201, json.dumps(json.loads(message)["lease"])) if descriptors else (0, message.decode()))
        except (OSError, ValueError, KeyError, TimeoutError) as error:
            answers.append((0, repr(error)))
        finally:
            loop.remove_reader(asking)


async def steady(
    asking: Callable[[int, list[tuple[int, str]]], Awaitable[None]], count: int, per_second: float
) -> None:
    """Ask at a steady rate, however long answers take."""
    answers: list[tuple[int, str]] = []
    start = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for index in range(count):
            await asyncio.sleep(max(0.0, start + index / per_second - time.monotonic()))
            tasks.create_task(asking(index, answers))
            if index == 20:
                print("under way", flush=True)
    print(
        json.dumps(
            {
                "granted": [json.loads(text)["port"] for status, text in answers if status == 201],
                "lost": [(status, text) for status, text in answers if status != 201],
                "seconds": time.monotonic() - start,
            }
        )
    )


def grab(seconds: float, ports: list[int]) -> None:
    """Try to bind each port as a plain program does, over and over."""
    end = time.monotonic() + seconds
    tries, grabbed = 0, []
    print("under way", flush=True)
    while time.monotonic() < end:
        for port in ports:
            tries += 1
            with socket.socket() as foreign:
                try:
                    foreign.bind(("127.0.0.1", port))
                    grabbed.append(port)
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
        time.sleep(0.001)
    print(json.dumps({"tries": tries, "grabbed": grabbed}))


if __name__ == "__main__":
    if sys.argv[1] == "grab":
        grab(float(sys.argv[2]), [int(word) for word in sys.argv[3:]])
    else:
        ways = {"grants": ask, "handoffs": ask_for_socket}
        asyncio.run(steady(ways[sys.argv[1]], int(sys.argv[2]), float(sys.argv[3])))
