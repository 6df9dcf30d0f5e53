"""The guardian: a small process that says the daemon's goodbyes when the daemon can't.

It is given ready-made packets over a socket and sends them when that socket closes without a farewell: the daemon was
killed. Run as a program of its own (`guardian.py CONTROL_FD FAMILY=FD…`), so that it shares nothing with the daemon but
the multicast sockets; it imports little, because it stays in memory for as long as the daemon does.

A message is a kind (one byte), a number (two) and a body's length (four), then the body:
`P` packet NUMBER is the body, or none when it is empty · `R` the same, for what is said in the second round alone ·
`T` packets go to these: JSON [[family, interface], …] · `D` farewell: the daemon stops in order, or its successor takes
over, and nothing is to be said.
"""

import json
import select
import signal
import socket
import struct
import sys
import time

HEADER = struct.Struct(">cHI")
GROUP = {int(socket.AF_INET): "224.0.0.251", int(socket.AF_INET6): "ff02::fb"}
PORT = 5353
BURST, PAUSE_S = 8, 0.020
"""As in `sockets`: what receivers' buffers take."""
AGAIN_S = 0.25
"""Until the second round, for what was lost in the first: nobody is left to repair it."""


def main(arguments: list[str]) -> int:
    """Listen until the daemon is gone; returns 0."""
    for deadly in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(deadly, signal.SIG_IGN)  # a service manager ends the daemon and us at once: outlive it
    control = socket.socket(fileno=int(arguments[0]))
    sockets = {
        int(family): socket.socket(fileno=int(number))
        for family, number in (argument.split("=") for argument in arguments[1:])
    }
    rounds, targets = listen(control)
    for number, packets in enumerate(rounds):
        if number:
            time.sleep(AGAIN_S)
        say(packets, targets, sockets)
    return 0


def listen(control: socket.socket) -> tuple[list[list[bytes]], list[tuple[int, int]]]:
    """Take messages in until the end; returns what to say, round by round (nothing after a farewell), and to whom."""
    packets: dict[bytes, dict[int, bytes]] = {b"P": {}, b"R": {}}
    targets: list[tuple[int, int]] = []
    waiting = bytearray()
    while True:
        try:
            data = control.recv(65536)
        except OSError:
            data = b""
        if not data:
            first = list(packets[b"P"].values())
            return [first, [*reversed(first), *packets[b"R"].values()]], targets  # what was lost is the end of a burst
        waiting += data
        while len(waiting) >= HEADER.size:
            kind, number, length = HEADER.unpack_from(waiting)
            if len(waiting) < HEADER.size + length:
                break
            body = bytes(waiting[HEADER.size : HEADER.size + length])
            del waiting[: HEADER.size + length]
            if kind == b"D":
                return [], []
            if kind == b"T":
                targets = [(int(family), int(link)) for family, link in json.loads(body)]
            elif body:
                packets[kind][number] = body
            else:
                packets[kind].pop(number, None)


def say(packets: list[bytes], targets: list[tuple[int, int]], sockets: dict[int, socket.socket]) -> None:
    """Send every packet to every target, paced."""
    for sent, packet in enumerate(packets, 1):
        for family, link in targets:
            _send(sockets[family], packet, family, link)
        if sent % BURST == 0:
            time.sleep(PAUSE_S)


def _send(opened: socket.socket, packet: bytes, family: int, link: int) -> None:
    select.select([], [opened], [], 1.0)
    try:
        if family == socket.AF_INET:
            info = struct.pack("=i4s4s", link, bytes(4), bytes(4))
            opened.sendmsg([packet], [(socket.IPPROTO_IP, 8, info)], 0, (GROUP[family], PORT))
        else:
            info = struct.pack("=16si", bytes(16), link)
            opened.sendmsg(
                [packet], [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)], 0, (GROUP[family], PORT, 0, link)
            )
    except OSError:
        pass  # an interface that is down: nobody there to hear


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
