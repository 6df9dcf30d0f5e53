"""What one user at full speed costs another: p99 of a grant, a state and a lookup, quiet and during each attack.

Attacker and measured user are two unprivileged uids on the load's core; the attacker yields to the other there (nice),
so that the figures are the daemon's. Refusals that the attacker gets are what its share is for; the other gets none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.bench import bed

ATTACKER, MEASURED = 65534, 65533
"""Uids without an account: each has shares of its own."""
SECONDS: Final = 5.0
SETTLE_S: Final = 2.0
"""How long an attack runs before it is measured: until its share is used up."""
STATE_EVERY: Final = 10
"""A state is measured once in so many rounds of a grant and a lookup."""
CHECK: Final = {"kind": "http", "interval": 60, "timeout": 60}


class Refusals:
    """An attacker's connection: counts answers and refusals, and connects again when it is hung up on."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._call = bed.Call(path)
        self.answered = self.refused = 0

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request; returns None for a refusal."""
        try:
            answer = self._call.ask(method, path, body)
        except RuntimeError:
            self.refused += 1
            return None
        except (OSError, bed.http.client.HTTPException):
            self.refused += 1
            self._call.close()
            return None
        self.answered += 1
        return answer


# --- attacks: each yields for ever, as often as it has done something ---


def churn(calls: Refusals, handoff: str) -> Iterator[None]:
    """Lease by the hundred and release: cooling ports."""
    while True:
        for lease in calls.ask("POST", "/v1/leases", [{"service": "churn", "ttl": 60}] * 100) or ():
            calls.ask("DELETE", f"/v1/leases/{lease['id']}")
            yield
        yield


def hoard(calls: Refusals, handoff: str) -> Iterator[None]:
    """Lease until the quota refuses, and go on."""
    while True:
        calls.ask("POST", "/v1/leases", [{"service": "hoard", "ttl": 3600}] * 100)
        yield


def decline(calls: Refusals, handoff: str) -> Iterator[None]:
    """Decline one port after the other: quarantined ports."""
    while True:
        lease = calls.ask("POST", "/v1/leases", {"service": "decline", "ttl": 60})
        while lease and calls.ask("POST", f"/v1/leases/{lease['id']}/decline"):
            yield
        yield


def listings(calls: Refusals, handoff: str) -> Iterator[None]:
    """Ask for everything: listings of leases, ports and services, metrics."""
    calls.ask("POST", "/v1/leases", [{"service": "many", "ttl": 3600}] * 500)
    while True:
        for path in ("/v1/leases?limit=1000", "/v1/services/many", "/v1/ports", "/v1/status"):
            calls.ask("GET", path)
            yield


def bodies(calls: Refusals, handoff: str) -> Iterator[None]:
    """Change a lease to the largest metadata there is, again and again: history."""
    lease = calls.ask("POST", "/v1/leases", {"service": "fat", "ttl": 3600})
    number = 0
    while True:
        number += 1
        metadata = {f"k{key}": "v" * 200 + str(number) for key in range(60)}
        calls.ask("PATCH", f"/v1/leases/{lease['id']}", {"metadata": metadata})
        yield


def checks(calls: Refusals, handoff: str) -> Iterator[None]:
    """Lease with checks that a silent listener never answers: slots of checks."""
    silent = []
    while len(silent) < 200 and (lease := calls.ask("POST", "/v1/leases", {"service": "hog", "check": CHECK})):
        silent.append(socket.create_server((lease["address"], lease["port"])))
    while True:
        time.sleep(0.1)
        yield


def _connections(path: str, kind: socket.SocketKind, request: bytes, calls: Refusals) -> Iterator[None]:
    """Open connections without end, each with a request; those that are closed are opened again."""
    opened: dict[int, socket.socket] = {}
    ends = select.poll()
    while True:
        for _ in range(100):
            connection = socket.socket(socket.AF_UNIX, kind)
            connection.settimeout(1)
            try:
                connection.connect(path)
                connection.sendall(request)
            except OSError:
                connection.close()
                calls.refused += 1
            else:
                calls.answered += 1
                opened[connection.fileno()] = connection
                ends.register(connection, select.POLLHUP | select.POLLRDHUP)
            yield
        for number, _ in ends.poll(0):
            calls.refused += 1
            ends.unregister(number)
            opened.pop(number).close()


def silent(calls: Refusals, handoff: str) -> Iterator[None]:
    """Open connections that say nothing."""
    return _connections(calls.path, socket.SOCK_STREAM, b"", calls)


def followers(calls: Refusals, handoff: str) -> Iterator[None]:
    """Follow events on as many connections as there are."""
    return _connections(calls.path, socket.SOCK_STREAM, b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n", calls)


def polls(calls: Refusals, handoff: str) -> Iterator[None]:
    """Wait for a service that never comes on as many connections as there are."""
    request = b"GET /v1/services/never?index=1&wait=60 HTTP/1.1\r\nHost: x\r\n\r\n"
    return _connections(calls.path, socket.SOCK_STREAM, request, calls)


def handoffs(calls: Refusals, handoff: str) -> Iterator[None]:
    """Open handoff connections that say nothing."""
    return _connections(handoff, socket.SOCK_SEQPACKET, b"", calls)


ATTACKS: Final[dict[str, Callable[[Refusals, str], Iterator[None]]]] = {
    "leases: all that the quota allows": hoard,
    "cooling ports: lease and release": churn,
    "quarantined ports: decline": decline,
    "answers: listings": listings,
    "history: the largest changes": bodies,
    "slots of checks: silent services": checks,
    "connections: silent ones": silent,
    "followers of events": followers,
    "long polls": polls,
    "handoff connections": handoffs,
}


# --- the measured user ---


def measured(path: str, seconds: float) -> dict[str, Any]:
    """Grant, look up and listen for so long; returns samples in milliseconds and how many requests were refused."""
    calls = Refusals(path)
    samples: dict[str, list[float]] = {"grant": [], "state": [], "lookup": []}
    calls.ask("POST", "/v1/leases", [{"service": "known", "ttl": 600}] * 3)
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end:
        with _timed(samples["grant"]):
            lease = calls.ask("POST", "/v1/leases", {"service": "mine", "ttl": 60})
        if lease:
            calls.ask("DELETE", f"/v1/leases/{lease['id']}")
        with _timed(samples["lookup"]):
            calls.ask("GET", "/v1/services/known")
        if rounds % STATE_EVERY == 0:
            _measure_state(calls, samples["state"])
        rounds += 1
        time.sleep(0.002)  # a user at rest between requests: the figures are of latency, not of throughput
    return {"samples": samples, "refused": calls.refused}


def _measure_state(calls: Refusals, samples: list[float]) -> None:
    """Listen on a port of our own, and wait until the lease says `bound`."""
    lease = calls.ask("POST", "/v1/leases", {"service": "state"})
    if not lease:
        return
    with socket.create_server((lease["address"], lease["port"])), _timed(samples):
        path = f"/v1/leases/{lease['id']}"
        bed.wait_for(lambda: (seen := calls.ask("GET", path)) and seen["state"] == "bound", "the lease is bound")
    calls.ask("DELETE", f"/v1/leases/{lease['id']}")


@contextlib.contextmanager
def _timed(samples: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    samples.append((time.perf_counter() - began) * 1e3)


# --- rows ---


async def measure() -> list[dict[str, Any]]:
    """Return a row without an attack, one for each attack, and one without an attack again."""
    return await asyncio.to_thread(_measure)


def _measure() -> list[dict[str, Any]]:
    if os.geteuid() != 0:
        return [{"attack": "needs root, to be two other users"}]
    return [_row(name) for name in ("none", *ATTACKS, "none again")]


def _row(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        os.chmod(directory, 0o755)
        daemon = bed.Portd(directory, "20000-29999", quota=5_000)
        stack.enter_context(daemon.serving())
        attack = None
        if name in ATTACKS:
            attack = stack.enter_context(_role("attack", ATTACKER, name, daemon))
            time.sleep(SETTLE_S)
        with _role("measure", MEASURED, str(SECONDS), daemon) as process:
            found = json.loads(process.communicate(timeout=bed.DEADLINE_S)[0])
        row: dict[str, Any] = {"attack": name}
        for what, values in found["samples"].items():
            row |= {f"{what}_p50_ms": _quantile(values, 50), f"{what}_p99_ms": _quantile(values, 99)}
        row["refused"] = found["refused"]
        if attack is not None:
            attack.terminate()
            counts = json.loads(attack.communicate(timeout=bed.DEADLINE_S)[0] or "{}")
            row |= {"attacker_answered": counts.get("answered"), "attacker_refused": counts.get("refused")}
        return row


def _quantile(values: list[float], percent: int) -> float | None:
    if len(values) < 2:
        return None
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 2)


@contextlib.contextmanager
def _role(role: str, uid: int, what: str, daemon: bed.Portd) -> Iterator[subprocess.Popen[Any]]:
    words = [sys.executable, "-m", "tests.bench.abuse", role, str(uid), what, daemon.socket, daemon.handoff]
    with bed.running(*words, core=bed.LOAD_CORE, stdout=subprocess.PIPE) as process:
        yield process


def main(role: str, uid: int, what: str, path: str, handoff: str) -> None:
    """Be one of the two users; prints what came of it as JSON."""
    if role == "attack":
        os.nice(10)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if role == "measure":
        print(json.dumps(measured(path, float(what))))
        return
    calls = Refusals(path)
    with contextlib.suppress(KeyboardInterrupt):
        for _ in ATTACKS[what](calls, handoff):
            pass
    print(json.dumps({"answered": calls.answered, "refused": calls.refused}))


if __name__ == "__main__":
    import resource
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
