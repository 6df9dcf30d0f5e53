"""The guardian: a small process that sends the daemon's goodbyes when the daemon was killed.

It receives encoded packets over a socket, and sends them when that socket closes and it was not dismissed before. It
runs as a program of its own (`guardian.py CONTROL_FD FAMILY=FD…`), so that it shares nothing with the daemon but the
multicast sockets; it imports little, because it stays in memory for as long as the daemon does.

A message is a kind (one byte), a number (two) and a body's length (four), then the body:
`P` packet NUMBER is the body, or none if it is empty · `R` the same, for the second round alone · `T` packets go to
these: JSON [[family, interface], …] · `D` dismissed: the daemon stops in order, or a successor takes over.
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
"""As in `sockets`: the pace that receivers' buffers can take."""
AGAIN_S = 0.25
"""Until the second round, for packets lost in the first: nobody is left to repair that."""


def main(arguments: list[str]) -> int:
    """Read messages until the daemon is gone, then send the packets; returns 0."""
    for deadly in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(deadly, signal.SIG_IGN)  # a service manager signals the whole group: outlive the daemon
    control = socket.socket(fileno=int(arguments[0]))
    sockets = {
        int(family): socket.socket(fileno=int(number))
        for family, number in (argument.split("=") for argument in arguments[1:])
    }
    rounds, targets = receive(control)
    for number, packets in enumerate(rounds):
        if number:
            time.sleep(AGAIN_S)
        send(packets, targets, sockets)
    return 0


def receive(control: socket.socket) -> tuple[list[list[bytes]], list[tuple[int, int]]]:
    """Read messages until the end; returns the packets to send, round by round (none if dismissed), and the targets."""
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
            return [first, [*reversed(first), *packets[b"R"].values()]], targets  # receivers lose the end of a burst
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


def send(packets: list[bytes], targets: list[tuple[int, int]], sockets: dict[int, socket.socket]) -> None:
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
        pass  # an interface that is down


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
