"""Something that stands where a daemon should: it passes calls on to the real one, or fails as no real one would on
command. It speaks as little HTTP as that takes."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from pathlib import Path

from tests.cli.bed import wait_for

BUSY = b'{"type":"urn:portd:problem:busy","title":"Too much at once","status":503,"detail":"later","code":"busy"}'
ANSWERS = {
    "busy": b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(BUSY), BUSY),
    "cut": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{",
    "noise": b"220 mail.example ESMTP ready\r\n",
}
"""What is answered before the connection is closed. `silent` answers nothing and keeps it, `daemon` passes it on."""
TURN_S = 0.05
"""Seconds between two checks whether a connection is still wanted."""


class StandIn:
    """A unix socket beside the daemon's; `does` says how calls are met from now on."""

    def __init__(self, daemon_socket: Path, place: Path) -> None:
        self.url = f"unix://{place}"
        self._daemon_socket = daemon_socket
        self._does = "daemon"
        self._heard = b""
        self._turn = 0  # connections of an earlier turn are closed
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(place))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, name="stand-in")]
        self._threads[0].start()

    def do(self, what: str) -> None:
        """Meet calls in another way, and hang up on whoever is connected."""
        assert what in {"daemon", "silent", *ANSWERS}, what
        self._does = what
        self._heard = b""
        self._turn += 1

    def wait_to_hear(self, text: str) -> None:
        """Wait until something with that text in it has been said since the last `do`; case does not count."""
        wait_for(lambda: text.lower().encode() in self._heard.lower(), f"{text} is heard, not {self._heard!r}")

    def close(self) -> None:
        """Stop listening, hang up, and end every thread."""
        self._turn += 1
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                made = threading.Thread(target=self._meet, args=[caller, self._does, self._turn], name="stand-in")
                self._threads.append(made)
                made.start()

    def _meet(self, caller: socket.socket, does: str, turn: int) -> None:
        with caller, socket.socket(socket.AF_UNIX) as daemon, suppress(OSError):
            ends = {caller: daemon}
            if does == "daemon":
                daemon.connect(str(self._daemon_socket))
                ends[daemon] = caller
            while turn == self._turn:
                for source in select.select(list(ends), [], [], TURN_S)[0]:
                    if not (data := source.recv(65536)):
                        return
                    self._heard += data if source is caller else b""
                    if does == "daemon":
                        ends[source].sendall(data)
                    elif does in ANSWERS and b"\r\n\r\n" in self._heard:
                        caller.sendall(ANSWERS[does])
                        return
