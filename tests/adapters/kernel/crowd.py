"""A busy host: `python crowd.py PROCESSES LISTENERS` forks that many processes, which listen in every way in turn.

It prints "ready", and ends with everybody in it when its standard input does. Cheap: nothing is imported but socket.
"""

from __future__ import annotations

import os
import socket
import sys

WAYS = (
    ("127.0.0.1", socket.SOCK_STREAM, True),
    ("::", socket.SOCK_STREAM, False),
    ("::1", socket.SOCK_DGRAM, True),
    ("0.0.0.0", socket.SOCK_STREAM, True),
    ("::", socket.SOCK_STREAM, True),
    ("127.0.0.1", socket.SOCK_DGRAM, True),
    ("::ffff:127.0.0.1", socket.SOCK_STREAM, False),
)


def listen(number: int) -> socket.socket:
    """Bind to an ephemeral port; `number` selects the kind of socket."""
    address, kind, v6only = WAYS[number % len(WAYS)]
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    if one.family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    one.bind((address, 0))
    if kind == socket.SOCK_STREAM:
        one.listen()
    return one


def main(process_count: int, listener_count: int) -> None:
    """Fork, wait for the end of the input, and take everybody along."""
    stay, leave = os.pipe()
    listening, listens = os.pipe()
    children = []
    for number in range(process_count):
        pid = os.fork()
        if pid == 0:
            os.close(leave)
            kept = [listen(turn) for turn in range(number, listener_count, process_count)]
            os.write(listens, b".")
            os.read(stay, 1)  # until the parent is gone, however it goes
            os._exit(0 if kept else 1)
        children.append(pid)
    left = process_count
    while left:
        left -= len(os.read(listening, left))
    print("ready", flush=True)
    sys.stdin.read()
    os.close(leave)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
