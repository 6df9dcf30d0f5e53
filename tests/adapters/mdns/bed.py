"""A LAN to test on: network namespaces joined by a bridge, with real peers in them. Needs root.

A host is a namespace with one interface on the bridge. Code runs in it on a thread of its own (a thread may be in
another network namespace than its process) with an event loop; programs run in it as child processes.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

T = TypeVar("T")
DEADLINE_S = 20.0
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = iter(range(1, 1 << 30))


def run(*command: str, check: bool = True) -> str:
    """Run a program to its end and return what it printed."""
    return subprocess.run(
        command, check=check, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    ).stdout


def wait_for(condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S, pause_s: float = 0.02) -> T:
    """Ask until the answer is true, and return it; fails at the deadline, and says what was waited for."""
    end = time.monotonic() + deadline_s
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < end, f"not within {deadline_s} s: {what} (last: {answer!r})"
        time.sleep(pause_s)


class Lan:
    """A bridge in a namespace of its own, and hosts on it. Leaves nothing behind."""

    def __init__(self) -> None:
        self.name = f"pm{os.getpid() % 100000}x{next(_numbers)}"
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        run("ip", "netns", "add", self.name)
        self.ip("link", "add", "br0", "type", "bridge", "mcast_snooping", "0", "forward_delay", "0")
        self.ip("link", "set", "br0", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in reversed(self.hosts):
            host.close()
        run("ip", "netns", "del", self.name)

    def ip(self, *arguments: str) -> str:
        """Run ip(8) in the bridge's namespace."""
        return run("ip", "-n", self.name, *arguments)

    def host(self, *, ipv6: bool = False) -> Host:
        """Add a host: eth0 with 10.9.0.N/24 and no default route."""
        host = Host(self, len(self.hosts) + 1, ipv6=ipv6)
        self.hosts.append(host)
        return host


class Host:
    """One host of the LAN."""

    def __init__(self, lan: Lan, number: int, *, ipv6: bool) -> None:
        self.lan, self.number = lan, number
        self.name = f"{lan.name}h{number}"
        self.address = f"10.9.0.{number}"
        self.port = f"p{number}"
        self._programs: list[subprocess.Popen[bytes]] = []
        self._temporary: list[str] = []
        self._bus: str | None = None
        self._watches: dict[str, Watch] = {}
        self.at_close: list[Callable[[], None]] = []
        run("ip", "netns", "add", self.name)
        self.exec(
            "sysctl",
            "-qw",
            f"net.ipv6.conf.all.disable_ipv6={int(not ipv6)}",
            f"net.ipv6.conf.default.disable_ipv6={int(not ipv6)}",
            "net.ipv6.conf.default.accept_dad=0",
        )
        lan.ip("link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        lan.ip("link", "set", self.port, "master", "br0", "up")
        self.ip("link", "set", "lo", "up")
        self.ip("address", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "eth0", "up")
        self._wait_linked(lan, self.port, "eth0")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def attach(self, lan: Lan, address: str) -> None:
        """Give the host a second interface, eth1, on another LAN."""
        lan.ip("link", "add", f"{self.port}b", "type", "veth", "peer", "name", "eth1", "netns", self.name)
        lan.ip("link", "set", f"{self.port}b", "master", "br0", "up")
        self.ip("address", "add", address, "dev", "eth1")
        self.ip("link", "set", "eth1", "up")
        self._wait_linked(lan, f"{self.port}b", "eth1")

    def _wait_linked(self, lan: Lan, port: str, interface: str) -> None:
        """Wait until packets pass: the kernel notices a carrier later than `up`, and drops what is sent before."""
        wait_for(lambda: "state forwarding" in lan.ip("-d", "-o", "link", "show", port), f"{port} forwards")
        wait_for(lambda: "state UP" in self.ip("-o", "link", "show", interface), f"{interface} has a carrier")

    def ip(self, *arguments: str) -> str:
        """Run ip(8) in the host."""
        return run("ip", "-n", self.name, *arguments)

    def exec(self, *command: str, check: bool = True) -> str:
        """Run a program in the host to its end, with the host's D-Bus; returns what it printed."""
        return run(*self._inside(command), check=check)

    def start(
        self,
        *command: str,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int | None = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a program in the host; it ends with the LAN, if not before."""
        program = subprocess.Popen(self._inside(command), stdin=stdin, stdout=stdout, stderr=stderr)
        self._programs.append(program)
        return program

    def _inside(self, command: tuple[str, ...]) -> list[str]:
        bus = ["env", f"DBUS_SYSTEM_BUS_ADDRESS={self._bus}"] if self._bus else []
        return ["ip", "netns", "exec", self.name, *bus, *command]

    # --- code in the host ---

    def call(self, work: Coroutine[Any, Any, T], deadline_s: float = 60.0) -> T:
        """Run a coroutine in the host and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(deadline_s)

    def spawn(self, work: Coroutine[Any, Any, T]) -> Any:
        """Run a coroutine in the host meanwhile; `.result(seconds)` of what is returned waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the host's event loop: uvloop's, as in the daemon."""
        if self._loop is None:
            import uvloop

            self._loop = uvloop.new_event_loop()
            entered = threading.Event()
            self._thread = threading.Thread(target=self._serve, args=(self._loop, entered), daemon=True)
            self._thread.start()
            assert entered.wait(DEADLINE_S)
        return self._loop

    def _serve(self, loop: asyncio.AbstractEventLoop, entered: threading.Event) -> None:
        with open(f"/run/netns/{self.name}") as namespace:
            if _libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"can't enter {self.name}")
        asyncio.set_event_loop(loop)
        loop.call_soon(entered.set)
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    # --- peers ---

    def start_avahi(self, **server: str) -> None:
        """Run avahi-daemon in the host, with a D-Bus of its own; `server` are keys of its [server] section."""
        directory = Path(tempfile.mkdtemp(prefix="portd-avahi-"))
        self._temporary.append(str(directory))
        self._start_bus(directory)
        keys = {
            "host-name": f"h{self.number}",
            "use-ipv6": "no",
            "allow-interfaces": "eth0",
            "enable-wide-area": "no",
            "ratelimit-burst": "100000",
            "ratelimit-interval-usec": "1000000",
            "cache-entries-max": "20000",
        }
        keys |= {key.replace("_", "-"): value for key, value in server.items()}
        wide = keys.pop("enable-wide-area")
        (directory / "avahi.conf").write_text(
            "[server]\n"
            + "".join(f"{key}={value}\n" for key, value in keys.items())
            + f"[wide-area]\nenable-wide-area={wide}\n[publish]\npublish-hinfo=no\npublish-workstation=no\n[rlimits]\n"
        )
        self.avahi = self.start(
            "unshare",
            "-m",
            "sh",
            "-c",
            'mkdir -p /run/avahi-daemon; mount -t tmpfs none /run/avahi-daemon; exec avahi-daemon -f "$0" '
            "--no-drop-root --no-chroot --no-rlimits",
            str(directory / "avahi.conf"),
        )
        wait_for(lambda: "(2)" in f"({self._avahi_state()})", f"avahi-daemon of {self.name} runs")

    def _start_bus(self, directory: Path) -> None:
        if self._bus is not None:
            return
        (directory / "bus.conf").write_text(
            "<busconfig><type>system</type><auth>EXTERNAL</auth>"
            f"<listen>unix:path={directory}/bus</listen><policy context='default'><allow user='*'/><allow own='*'/>"
            "<allow send_type='method_call'/><allow send_type='signal'/><allow send_requested_reply='true' "
            "send_type='method_return'/><allow send_requested_reply='true' send_type='error'/>"
            "<allow receive_type='method_call'/><allow receive_type='method_return'/><allow receive_type='error'/>"
            "<allow receive_type='signal'/></policy></busconfig>"
        )
        self.start("dbus-daemon", f"--config-file={directory}/bus.conf", "--nofork", "--nopidfile")
        wait_for((directory / "bus").exists, "the private bus listens")
        self._bus = f"unix:path={directory}/bus"

    @property
    def bus(self) -> str | None:
        """Return the address of the host's D-Bus, None before there is one."""
        return self._bus

    def _avahi_state(self) -> str:
        answer = self.exec(
            "dbus-send",
            "--system",
            "--print-reply=literal",
            "--dest=org.freedesktop.Avahi",
            "/",
            "org.freedesktop.Avahi.Server.GetState",
            check=False,
        )
        return answer.split()[-1] if "int32" in answer else answer.strip()

    def publish_by_avahi(self, name: str, type_: str, port: int, *txt: str) -> None:
        """Publish with avahi-publish, until the LAN goes; waits until the name is won."""
        program = self.start("avahi-publish", "-s", name, type_, str(port), *txt, stderr=subprocess.PIPE)
        assert program.stderr is not None
        assert b"Established" in program.stderr.readline()

    def stop_avahi(self) -> None:
        """End avahi-daemon in order."""
        self.avahi.send_signal(signal.SIGTERM)
        self.avahi.wait(DEADLINE_S)

    def resolve(self, name: str) -> str:
        """Look a host name up as programs do, by getent(1) and libnss-mdns; returns the address or nothing."""
        inside = ["nsenter", "-t", str(self.avahi.pid), "-m", "-n", "getent", "ahostsv4", name]
        return run(*inside, check=False).partition(" ")[0].strip()

    def browse(self, type_: str) -> list[list[str]]:
        """Ask avahi-browse once: fields event, interface, protocol, name, type, domain, host, address, port, txt."""
        lines = self.exec("avahi-browse", "-rptk", type_, check=False).splitlines()
        return [line.split(";", 9) for line in lines if line.startswith("=")]

    def browsed(self, type_: str) -> dict[str, tuple[str, str, str, str]]:
        """Ask avahi-browse once: name → host, address, port, txt; names as they are, not escaped."""
        return {_unescape(fields[3]): (fields[6], fields[7], fields[8], fields[9]) for fields in self.browse(type_)}

    def watch(self, type_: str) -> Watch:
        """Follow a type with avahi-browse."""
        return Watch(self.start("avahi-browse", "-pk", type_, stdout=subprocess.PIPE))

    def seen(self, type_: str) -> set[str]:
        """Return the names that avahi-browse, followed from the first call on, says are there."""
        if type_ not in self._watches:
            self._watches[type_] = self.watch(type_)
        return set(self._watches[type_].there)

    def close(self) -> None:
        """End everything in the host, and the host."""
        for close in self.at_close:
            close()
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(DEADLINE_S)
        for program in reversed(self._programs):
            with suppress(ProcessLookupError):
                program.kill()
            for stream in (program.stdin, program.stdout, program.stderr):
                if stream is not None:
                    stream.close()
            program.wait()
        run("ip", "netns", "del", self.name)
        for directory in self._temporary:
            shutil.rmtree(directory, ignore_errors=True)


class Watch:
    """A running avahi-browse: what is there, how many have gone, and when something last happened."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.there: set[str] = set()
        self.lost_count = 0
        self.last_at = time.monotonic()
        self._process = process
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError):  # closed under our hands, with the host
            for line in self._process.stdout:
                event, _, _, name, *_ = line.decode().split(";")
                there = self.there | {_unescape(name)} if event == "+" else self.there - {_unescape(name)}
                self.lost_count += len(self.there) > len(there)
                self.there = there  # another thread reads it: replaced, not changed
                self.last_at = time.monotonic()


def _unescape(name: str) -> str:
    out, at = bytearray(), 0
    raw = name.encode()
    while at < len(raw):
        if raw[at : at + 1] == b"\\" and raw[at + 1 : at + 4].isdigit():
            out.append(int(raw[at + 1 : at + 4]))
            at += 4
        elif raw[at : at + 1] == b"\\":
            out.append(raw[at + 1])
            at += 2
        else:
            out.append(raw[at])
            at += 1
    return out.decode()
