"""Announcing on a LAN: portd, stock zeroconf (gathered) and avahi-daemon by D-Bus, side by side in one run.

`python -m tests.bench lan`; needs root. Each case has a LAN of its own: three namespaces on a bridge. What is seen and
lost is counted by avahi-browse on another host, which drops what said goodbye after a second (RFC 6762 section 10.1).
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

from tests.adapters.mdns.bed import Host, Lan, Watch
from tests.adapters.mdns.station import lease

Way = Literal["portd", "zeroconf", "avahi"]
WAYS: tuple[Way, ...] = ("portd", "zeroconf", "avahi")
SIZES = (1, 10, 100, 500, 1000)
TYPE = "_http._tcp"
SEEN_S, LOST_S, STILL_S = 20.0, 20.0, 5.0
"""How long to wait for all; how long without anything new before what was lost is counted."""
REST_S = 10.0
TICK_S = 0.005


async def measure(sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """Measure every size in every way, and what portd costs at rest; a row each. Takes two to three minutes."""
    return await asyncio.to_thread(_measure, sizes)


def _measure(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = [_case(way, count) for count in sizes for way in WAYS]
    return [*rows, _rest(500)]


def _case(way: Way, count: int) -> dict[str, Any]:
    with Lan() as lan:
        here, observer = lan.host(), lan.host()
        observer.start_avahi()
        watch = observer.watch(TYPE)
        publisher = _Publisher(here, way, count)
        packets, size_bytes = _sent(here)
        cpu_s = publisher.cpu_s()
        start = time.monotonic()
        publisher.send("publish")
        _wait(watch, lambda: len(watch.there) >= count, SEEN_S)
        seen_s, seen = watch.last_at - start, len(watch.there)
        stall_s = float(publisher.answer())
        cpu_s, (packets_after, size_after) = publisher.cpu_s() - cpu_s, _sent(here)
        start = time.monotonic()
        publisher.kill()
        lost = watch.lost_count
        _wait(watch, lambda: not watch.there, LOST_S)
        killed_s, killed = watch.last_at - start, watch.lost_count - lost
    return {
        "services": count,
        "way": way,
        "seen": seen,
        "all_seen_s": round(seen_s, 2),
        "cpu_s": round(cpu_s, 2),
        "packets": packets_after - packets,
        "kilobytes": round((size_after - size_bytes) / 1000),
        "worst_stall_ms": round(stall_s * 1000, 1),
        "lost_after_kill": killed,
        "all_lost_after_kill_s": round(killed_s, 2) if killed == count else None,
        "lost_after_stop": _stop(way, count),
    }


def _stop(way: Way, count: int) -> int:
    """Count what the observer loses when the publisher withdraws everything in order."""
    with Lan() as lan:
        here, observer = lan.host(), lan.host()
        observer.start_avahi()
        watch = observer.watch(TYPE)
        publisher = _Publisher(here, way, count)
        publisher.send("publish")
        _wait(watch, lambda: len(watch.there) >= count, SEEN_S)
        publisher.answer()
        lost = watch.lost_count
        publisher.send("stop")
        _wait(watch, lambda: not watch.there, LOST_S)
        return watch.lost_count - lost


def _rest(count: int) -> dict[str, Any]:
    with Lan() as lan:
        here, observer = lan.host(), lan.host()
        observer.start_avahi()
        watch = observer.watch(TYPE)
        publisher = _Publisher(here, "portd", count)
        publisher.send("publish")
        _wait(watch, lambda: len(watch.there) >= count, SEEN_S)
        publisher.answer()
        cpu_s = publisher.cpu_s()
        time.sleep(REST_S)
        return {
            "services": count,
            "way": "portd at rest",
            "cpu_percent": round((publisher.cpu_s() - cpu_s) / REST_S * 100, 2),
            "memory_mib": {name: round(_memory_bytes(pid) / 2**20, 1) for name, pid in publisher.pids().items()},
        }


def _wait(watch: Watch, condition: Callable[[], bool], deadline_s: float) -> None:
    """Wait until the condition holds, or nothing has happened for a while."""
    start = time.monotonic()
    while (
        not condition()
        and time.monotonic() - max(start, watch.last_at) < STILL_S
        and time.monotonic() - start < deadline_s
    ):
        time.sleep(0.005)


class _Publisher:
    """A process that publishes in one of the ways: it reads commands, and answers when each is done."""

    def __init__(self, host: Host, way: Way, count: int) -> None:
        if way == "avahi":
            host.start_avahi(objects_per_client_max="4096")
        self._avahi = host.avahi.pid if way == "avahi" else None
        self._process = host.start(
            sys.executable,
            "-m",
            "tests.bench.lan",
            "publish",
            way,
            str(count),
            host.bus or "",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
        )
        self._guardian = self.answer()

    def send(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())
        self._process.stdin.flush()

    def answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def pids(self) -> dict[str, int]:
        pids = {"publisher": self._process.pid}
        if self._avahi is not None:
            pids["avahi-daemon"] = self._avahi
        if self._guardian.isdigit():
            pids["guardian"] = int(self._guardian)
        return pids

    def cpu_s(self) -> float:
        """Return what all its processes have used."""
        return (
            sum(
                sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
                for pid in self.pids().values()
            )
            / 100
        )


def _memory_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss")


def _sent(host: Host) -> tuple[int, int]:
    (link,) = json.loads(host.ip("-s", "-j", "link", "show", "eth0"))
    return link["stats64"]["tx"]["packets"], link["stats64"]["tx"]["bytes"]


# --- the publishing process ---


async def _publish(way: Way, count: int, bus: str) -> None:
    publish, stop, guardian = await {"portd": _by_portd, "avahi": _by_portd, "zeroconf": _by_zeroconf}[way](count, bus)
    print(guardian, flush=True)
    words = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
    await words.readline()
    worst = _WorstStall()
    await publish()
    print(worst.stop(), flush=True)
    await words.readline()
    await stop()
    await words.readline()


class _WorstStall:
    """The longest that the event loop kept a timer waiting."""

    def __init__(self) -> None:
        self._worst_s = 0.0
        self._task = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK_S)
            self._worst_s = max(self._worst_s, time.perf_counter() - before - TICK_S)

    def stop(self) -> float:
        self._task.cancel()
        return self._worst_s


Steps = tuple[Callable[[], Awaitable[Any]], Callable[[], Awaitable[Any]], object]


async def _by_portd(count: int, bus: str) -> Steps:
    from portd.adapters.mdns.announcer import Announcer
    from portd.core.model import Event

    left = {f"s{number}" for number in range(count)}
    done = asyncio.Event()

    def report(lease_id: str, name: str | None, problem: str | None) -> None:
        assert problem is None, problem
        left.discard(lease_id)
        if not left:
            done.set()

    announcer = Announcer("box", report, bus_address=bus or "unix:path=/nonexistent")
    await announcer.start()
    while announcer.condition()["responder"] is None:
        await asyncio.sleep(0.01)
    events = [Event(1, "bound", 0.0, lease(name, port=20000 + number)) for number, name in enumerate(sorted(left))]

    async def publish() -> None:
        for event in events:
            announcer.apply(event)
        await done.wait()
        await asyncio.sleep(1.2)  # the second announcement belongs to the price

    return publish, announcer.close, announcer.condition().get("guardian")


async def _by_zeroconf(count: int, bus: str) -> Steps:
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

    address = next(
        line.split()[3].partition("/")[0]
        for line in subprocess.run(
            ["ip", "-o", "-4", "address", "show", "eth0"], check=True, capture_output=True, text=True
        ).stdout.splitlines()
    )
    zeroconf = AsyncZeroconf(interfaces=[address])
    infos = [
        AsyncServiceInfo(
            f"{TYPE}.local.",
            f"s{number}.{TYPE}.local.",
            port=20000 + number,
            server="box.local.",
            addresses=[socket.inet_aton(address)],
        )
        for number in range(count)
    ]

    async def publish() -> None:
        broadcasts = await asyncio.gather(*(zeroconf.async_register_service(info) for info in infos))
        await asyncio.gather(*broadcasts)
        await asyncio.sleep(1.2)

    async def stop() -> None:
        await zeroconf.async_unregister_all_services()
        await zeroconf.async_close()

    return publish, stop, None


def _main() -> None:
    if sys.argv[1:2] == ["publish"]:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_publish(sys.argv[2], int(sys.argv[3]), sys.argv[4]))  # type: ignore[arg-type]
    else:
        for row in asyncio.run(measure(tuple(map(int, sys.argv[1:])) or SIZES)):
            print(json.dumps(row))


if __name__ == "__main__":
    _main()
