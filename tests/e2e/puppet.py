"""A process of its own that does what a test tells it: calls, listens, receives sockets, forks, execs another program.

`Puppet` starts it (as another user or in another network namespace too) and tells it what to do, a line of JSON each.
It imports everything before it changes its user, who may not read the sources.
"""

from __future__ import annotations

import array
import contextlib
import encodings.idna  # noqa: F401  (host names go through it, and it is imported when the first one does)
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.e2e.harness import ROOT, Connection, Daemon, Reply, read_line, tell

MESSAGE_MAX_BYTES = 1 << 20
KEPT_S = 0.5
"""A refusal comes sooner than this; on a host that is slower, a refused connection counts as kept and fails a test."""


class Puppet:
    """A process in a test's hand. `wrapper` is a command that goes in front; its pid must stay the program's own."""

    def __init__(self, daemon: Daemon, *wrapper: str, uid: int = 0) -> None:
        self._daemon = daemon
        self.socket = daemon.socket
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-u", "-m", "tests.e2e.puppet", str(uid)],
            cwd=ROOT,
            env=daemon.environ,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = int(read_line(self.process))
        self.children: list[int] = []

    def __enter__(self) -> Puppet:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def end(self, number: int = signal.SIGKILL) -> None:
        """End it, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        with self.process:
            pass

    def do(self, what: str, **arguments: Any) -> Any:
        """Have it do something, and return the result."""
        tell(self.process, json.dumps({"do": what, **arguments}))
        return json.loads(read_line(self.process))

    def call(self, method: str, path: str, body: Any = None, *, over: str = "unix", **headers: str) -> Reply:
        """Have it send a request on a connection of its own."""
        place = str(self._daemon.socket) if over == "unix" else self._daemon.tcp
        return Reply(*self.do("call", place=place, method=method, path=path, body=body, headers=headers))

    def lease(self, service: str, *, over: str = "unix", **fields: Any) -> Any:
        """Have it lease for itself."""
        reply = self.call("POST", "/v1/leases", {"service": service, **fields}, over=over)
        assert reply.status == 201, reply
        return reply.body

    def listen(self, port: int, address: str = "127.0.0.1", *, reuse: bool = True) -> str | None:
        """Have it listen; returns the error's text, or None."""
        error: str | None = self.do("listen", port=port, address=address, reuse=reuse)
        return error

    def fork(self) -> int:
        """Have it fork a child that does nothing but keep what it inherits; returns the child's pid."""
        self.children.append(self.do("fork"))
        return self.children[-1]

    def hand_over(self, body: Any) -> tuple[Any, list[dict[str, Any]]]:
        """Have it ask for a handoff; returns the answer, and what the sockets are that came with it."""
        answer, sockets = self.do("hand_over", place=str(self._daemon.handoff), body=body)
        return answer, sockets

    def become(self, *words: str) -> None:
        """Have it exec another program."""
        tell(self.process, json.dumps({"do": "become", "words": words}))


class _Body:
    """What runs in the process."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def call(self, place: Any, method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        with Connection(Path(place) if isinstance(place, str) else tuple(place)) as connection:
            return connection.call(method, path, body, **headers)

    def listen(self, port: int, address: str, *, reuse: bool) -> str | None:
        one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            one.bind((address, port))
            one.listen()
        except OSError as error:
            one.close()
            return str(error)
        self._sockets.append(one)
        return None

    def unlisten(self) -> None:
        for one in self._sockets:
            one.close()
        self._sockets.clear()

    def fork(self) -> int:
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        return child

    def hand_over(self, place: str, body: Any) -> tuple[Any, list[dict[str, Any]]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(10)
            connection.connect(place)
            connection.send(json.dumps(body).encode())
            data, sockets = receive(connection)
        self._sockets += sockets
        return json.loads(data), [_describe(one) for one in sockets]

    def count_open(self, place: str, text: str, count: int) -> int:
        """Open connections to a unix socket and send a request on each; returns how many are kept open, not refused."""
        opened = []
        for _ in range(count):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(place)
            with contextlib.suppress(OSError):
                connection.sendall(text.encode())
            opened.append(connection)
        self._sockets += opened
        return sum(_is_kept(connection) for connection in opened)

    def become(self, words: Sequence[str]) -> None:
        os.execvp(words[0], words)


def receive(connection: socket.socket) -> tuple[bytes, list[socket.socket]]:
    """Receive one message and the sockets that came with it."""
    data, ancillary, _, _ = connection.recvmsg(MESSAGE_MAX_BYTES, socket.CMSG_SPACE(4 * 8))
    descriptors = array.array("i")
    for _, _, raw in ancillary:
        descriptors.frombytes(raw)
    return data, [socket.socket(fileno=one) for one in descriptors]


def _is_kept(connection: socket.socket) -> bool:
    """Return whether a connection is neither closed nor answered with a refusal within a moment."""
    connection.settimeout(KEPT_S)
    try:
        start = connection.recv(12)
    except TimeoutError:
        return True
    except OSError:
        return False
    return start.startswith(b"HTTP/1.1 200")


def _describe(one: socket.socket) -> dict[str, Any]:
    is_tcp = one.type == socket.SOCK_STREAM
    return {
        "kind": "tcp" if is_tcp else "udp",
        "address": one.getsockname()[0],
        "port": one.getsockname()[1],
        "listens": is_tcp and bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)),
    }


def _main() -> None:
    uid = int(sys.argv[1])
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    body = _Body()
    print(os.getpid())
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(body, command.pop("do"))(**command)))


if __name__ == "__main__":
    _main()
