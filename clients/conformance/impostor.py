"""Another user who poses as portd: sockets where clients look, that answer everything as a daemon would.

Run as a program, by its path, under the other user; it prints the port of its loopback listener, and writes what it
receives to the file `received`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

UID = 65534
"""`nobody`: the user that no daemon runs as."""
ANSWER = b'{"service":"orders","revision":1,"instances":[],"leases":[],"next":null}'
BUILD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"


class Impostor:
    """The other user's sockets: `url` over a unix socket, `http_url` over loopback TCP.

    `temporary` is a directory that everybody may write, as /tmp; `pose` makes this user's runtime directory there.
    """

    def __init__(self) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="portd-impostor-"))
        self.temporary.chmod(0o1777)
        self.url = f"unix://{self.temporary}/portd.sock"
        self._process = subprocess.Popen(
            [sys.executable, "-c", Path(__file__).read_text(), str(self.temporary), str(os.getuid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        assert self._process.stdout is not None
        self.http_url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def pose(self) -> None:
        """Make the runtime directory in which this user's client would look for a daemon, with a socket in it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("pose\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "posing\n"

    def has_received(self, text: str) -> bool:
        """Return whether the other user was sent that text."""
        received = self.temporary / "received"
        return received.exists() and text in received.read_text(errors="replace")

    def close(self) -> None:
        """End the other user's process, and remove what it made."""
        self._process.kill()
        self._process.communicate()
        subprocess.run(["rm", "-r", str(self.temporary)], check=True)


def _serve(listener: socket.socket, received: str) -> None:
    while True:
        caller, _ = listener.accept()
        with caller:
            with open(received, "ab") as file:
                file.write(caller.recv(65536))
            caller.sendall(BUILD % (len(ANSWER), ANSWER))


def _listen_unix(path: str, received: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o666)
    listener.listen()
    threading.Thread(target=_serve, args=[listener, received], daemon=True).start()


def _main(temporary: str, victim: str) -> None:
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)  # not at its start: the interpreter may be one that only its own user can read
    os.umask(0)
    received = f"{temporary}/received"
    _listen_unix(f"{temporary}/portd.sock", received)
    loopback = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=[loopback, received], daemon=True).start()
    print(loopback.getsockname()[1], flush=True)
    for _ in sys.stdin:
        os.makedirs(f"{temporary}/portd-runtime-{victim}/portd")
        _listen_unix(f"{temporary}/portd-runtime-{victim}/portd/portd.sock", received)
        print("posing", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
