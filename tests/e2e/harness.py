"""A real daemon on a directory of its own, and the means to be an unkind user of it: raw sockets, processes, signals.

Nothing here waits by sleeping for a fixed time: a condition is asked for until it is true, or a deadline fails the
test. Only what was started here is ended, by its pid.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.support.ports import claim_ports, free_tcp_port

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
DEADLINE_S = 20.0
NOBODY = 65534
CONFIG = """\
{pools}
[listen]
socket = "{directory}/portd.sock"
handoff = "{directory}/handoff.sock"
http = "127.0.0.1:{http_port}"
[store]
path = "{store}"
[mdns]
enabled = false
[dns]
listen = ""
"""


def wait_for(condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Ask until the answer is true, and return it; fails at the deadline, and says what was waited for."""
    end = time.monotonic() + deadline_s
    while not (answer := condition()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {what} (last: {answer!r})"
        time.sleep(0.005)
    return answer


class Reply(NamedTuple):
    """An answer of the daemon; `body` is decoded JSON, or the text where it is none."""

    status: int
    headers: dict[str, str]
    body: Any

    @property
    def code(self) -> str | None:
        """Return the code of a problem document; None when it is none."""
        is_problem = self.headers.get("content-type") == "application/problem+json"
        return self.body["code"] if is_problem else None

    @property
    def revision(self) -> int:
        """Return X-Portd-Revision."""
        return int(self.headers["x-portd-revision"])


class Connection(http.client.HTTPConnection):
    """A keep-alive connection over a unix socket (`path`) or TCP (`address`)."""

    def __init__(self, place: Path | tuple[str, int], timeout_s: float = DEADLINE_S) -> None:
        self._place = place
        host, port = ("localhost", 80) if isinstance(place, Path) else place
        super().__init__(host, port, timeout=timeout_s)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connect."""
        self.sock = dial(self._place, self.timeout)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Send one request and read its answer; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            named.setdefault("Content-Type", "application/json")
        self.request(method, path, data, named)
        return read_reply(self.getresponse())


def dial(place: Path | tuple[str, int], timeout_s: float | None = DEADLINE_S) -> socket.socket:
    """Open a stream to a unix socket or a TCP address."""
    if not isinstance(place, Path):
        connection = socket.create_connection(place, timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return connection
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    try:
        connection.connect(str(place))
    except OSError:
        connection.close()
        raise
    return connection


def read_reply(response: http.client.HTTPResponse) -> Reply:
    """Read an answer to its end."""
    data = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    is_json = headers.get("content-type", "").endswith("json") and data
    return Reply(response.status, headers, json.loads(data) if is_json else data.decode())


class Daemon:
    """One portd, started and ended as often as a test wants; what it remembers stays in `directory`.

    `extra` is more configuration (TOML, a section that is not in CONFIG); `prelude` is Python that runs before the
    daemon, for limits that no user can wait for; `failpoints` is its PORTD_FAILPOINTS. `errors` are lines of the log
    that the test expects.
    As a context it is stopped at the end.
    """

    def __init__(self, directory: Path, *, port_count: int = 100, extra: str = "", prelude: str = "") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.first_port, self._claims = claim_ports(port_count)
        self.last_port = self.first_port + port_count - 1
        self.socket = directory / "portd.sock"
        self.handoff = directory / "handoff.sock"
        self.store = directory / "portd.db"
        self.tcp = ("127.0.0.1", free_tcp_port())
        self.prelude = prelude
        self.failpoints = ""
        self.errors: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.configure(extra)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for claim in self._claims:
            claim.close()

    def configure(self, extra: str, **changes: str) -> None:
        """Write the configuration; `changes` replace whole lines by their key."""
        pools = f'[pools.default]\nranges = ["{self.first_port}-{self.last_port}"]'
        text = CONFIG.format(directory=self.directory, http_port=self.tcp[1], store=self.store, pools=pools)
        for key, value in changes.items():
            text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        (self.directory / "portd.toml").write_text(f"{extra}\n{text}")

    @property
    def environ(self) -> dict[str, str]:
        """Return an environment with the sources, and nothing of another portd."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PORT", "LISTEN_", "XDG_", "NOTIFY_", "JOURNAL_"))
        }
        if self.failpoints:
            kept["PORTD_FAILPOINTS"] = self.failpoints
        return {**kept, "PYTHONPATH": f"{ROOT}:{ROOT}/clients/python", "PORTD_URL": f"unix://{self.socket}"}

    @property
    def command(self) -> list[str]:
        """Return the command line that serves."""
        words = ["serve", "--config", str(self.directory / "portd.toml")]
        if not self.prelude:
            return [sys.executable, "-m", "portd", *words]
        program = f"import sys\nfrom portd.__main__ import main\n{self.prelude}\nsys.exit(main(sys.argv[1:]))"
        return [sys.executable, "-c", program, *words]

    # --- start and stop ---

    def launch(self, *wrapper: str) -> subprocess.Popen[bytes]:
        """Start the daemon and don't wait; `wrapper` is a command in front of it."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen([*wrapper, *self.command], env=self.environ, stdout=log, stderr=log)
        return self.process

    def start(self, *wrapper: str) -> Daemon:
        """Start the daemon and wait until it answers."""
        process = self.launch(*wrapper)
        wait_for(lambda: self.answers(process), "the daemon answers")
        return self

    def answers(self, process: subprocess.Popen[bytes]) -> bool:
        """Return whether the daemon answers; one that has exited fails the test."""
        assert process.poll() is None, f"portd exited with {process.returncode}: {self.log()}"
        try:
            with self.connect() as connection:
                return connection.call("GET", "/healthz").status in (200, 503)
        except OSError:
            return False

    def kill(self) -> None:
        """End the daemon as a crash does (SIGKILL)."""
        self.stop(signal.SIGKILL)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the daemon; returns its exit status. Does nothing when it is not running."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        try:
            return process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the daemon did not stop; its log: {self.log()}") from None

    def restart(self, number: int = signal.SIGTERM) -> None:
        """Stop the daemon (or kill it) and start it again."""
        self.stop(number)
        self.start()

    @property
    def pid(self) -> int:
        """Return the pid of the running daemon."""
        assert self.process is not None
        return self.process.pid

    # --- the log ---

    @property
    def log_path(self) -> Path:
        """Return where the daemon's output goes."""
        return self.directory / "log"

    def log(self) -> str:
        """Return what the daemon wrote."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def check_log(self) -> None:
        """Fail when the log shows a fault of portd's that the test did not expect."""
        log = self.log()
        assert "Traceback" not in log, log
        faults = [
            line
            for line in log.splitlines()
            if re.search(r" (ERROR|CRITICAL) |[A-Za-z]+Warning\b", line)
            and not any(expected in line for expected in self.errors)
        ]
        assert not faults, "\n".join(faults)

    # --- calls ---

    def connect(self, over: str = "unix") -> Connection:
        """Make a keep-alive connection over "unix" or "tcp"; close it."""
        return Connection(self.socket if over == "unix" else self.tcp)

    def call(self, method: str, path: str, body: Any = None, *, over: str = "unix", **headers: str) -> Reply:
        """Send one request on a connection of its own."""
        with self.connect(over) as connection:
            return connection.call(method, path, body, **headers)

    def get(self, path: str) -> Any:
        """GET, and return the body of a 200."""
        reply = self.call("GET", path)
        assert reply.status == 200, reply
        return reply.body

    def lease(self, service: str, **fields: Any) -> Any:
        """Lease, and return the lease with its token."""
        reply = self.call("POST", "/v1/leases", {"service": service, **fields})
        assert reply.status == 201, reply
        return reply.body

    def leases(self) -> dict[str, Any]:
        """Return all live leases by id."""
        found: dict[str, Any] = {}
        page = self.get("/v1/leases?limit=10000")
        while True:
            found.update((lease["id"], lease) for lease in page["leases"])
            if page["next"] is None:
                return found
            page = self.get(f"/v1/leases?limit=10000&cursor={page['next']}")

    def show(self, lease_id: str) -> Any:
        """Return one lease."""
        return self.get(f"/v1/leases/{lease_id}")

    def wait_state(self, lease_id: str, state: str) -> Any:
        """Wait until a lease is in a state, and return it."""
        return wait_for(
            lambda: (lease := self.show(lease_id))["state"] == state and lease,
            f"lease {lease_id} is {state}: {self.show(lease_id)}",
        )

    def verdict(self, port: int, protocol: str = "tcp") -> str:
        """Return what portd says of a port."""
        verdict: str = self.get(f"/v1/ports/{port}?protocol={protocol}")["verdict"]
        return verdict


# --- processes ---


@contextlib.contextmanager
def program(*words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program with pipes; it is killed at the end if it still runs."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **options}
    with subprocess.Popen(words, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def python(source: str, *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a Python program."""
    with program(sys.executable, "-u", "-c", source, *words, **options) as process:
        yield process


def owner(**options: Any) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Run a process that does nothing, to be given leases."""
    return program("sleep", "1000", **options)


def read_line(process: subprocess.Popen[str]) -> str:
    """Read a line that a program prints; fails when it ends instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the program ended: {process.wait()}"
    return line.strip()


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    """Write a line to a program."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


# --- sockets ---


def listen_on(port: int, address: str = "127.0.0.1") -> socket.socket:
    """Listen as servers do, with SO_REUSEADDR."""
    return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)


def is_bindable(port: int, address: str = "127.0.0.1", *, reuse: bool = False) -> bool:
    """Return whether a foreign process could bind a TCP port."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            one.bind((address, port))
        except OSError:
            return False
        return True


# --- events ---


class Event(NamedTuple):
    """A server-sent event."""

    id: int
    type: str
    data: Any


class Stream:
    """A follower of /v1/events; iterate over it."""

    def __init__(self, daemon: Daemon, query: str = "", timeout_s: float = DEADLINE_S, **headers: str) -> None:
        self._connection = Connection(daemon.socket, timeout_s)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request("GET", f"/v1/events{query}", headers=named)
        self.response = self._connection.getresponse()
        self.status = self.response.status
        self.revision = int(self.response.headers.get("X-Portd-Revision", -1))
        self.comments: list[str] = []
        self._deadline = float("inf")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()
        self._connection.close()

    def lines(self) -> Iterator[str]:
        """Yield lines as they come; ends with the stream."""
        while line := self.response.readline():
            assert time.monotonic() < self._deadline, "what was waited for did not come, heartbeats did"
            yield line.decode().rstrip("\n")

    def __iter__(self) -> Iterator[Event]:
        fields: dict[str, str] = {}
        for line in self.lines():
            if line.startswith(":"):
                self.comments.append(line[1:].strip())
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                yield Event(int(fields["id"]), fields["event"], json.loads(fields["data"]))
                fields = {}

    def until(self, wanted: Callable[[Event], bool]) -> list[Event]:
        """Read up to and with the first event that is wanted; fails at the deadline."""
        self._deadline = time.monotonic() + DEADLINE_S
        seen = []
        for event in self:
            seen.append(event)
            if wanted(event):
                return seen
        raise AssertionError(f"the stream ended after {seen}")


def unique(values: Iterable[T]) -> bool:
    """Return whether no value is there twice."""
    values = list(values)
    return len(values) == len(set(values))
