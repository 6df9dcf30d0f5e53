"""`portd doctor`: reads the daemon and the host, and prints what is wrong with the fix for each.

The rules are in `diagnoses`; here is what they need to know. The settings are those of the daemon that answers: its own
status where that says it, else the file that its command line names.
"""

from __future__ import annotations

import os
from pathlib import Path

from portd._client import calls
from portd._client.client import Client
from portd._client.endpoints import SYSTEM_SOCKET
from portd._client.errors import DaemonUnavailable, PortdError
from portd.cli import diagnoses, printing
from portd.cli.diagnoses import Diagnosis
from portd.cli.options import JSON, Command, Option
from portd.config import Settings, load, pool_ports, system_paths, user_paths
from portd.core.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

RESOLVER_TIMEOUT_S = 6.0
"""Seconds for the host's resolver to answer: one retry of a glibc resolver (resolv.conf(5))."""
PROBE_NAME = "ns"
"""A name in portd's zone that always has an address: the one that its NS record points to."""
TIME_ERROR = 5
"""What adjtimex(2) returns for a clock that is not synchronized."""


def doctor(values: dict[str, Any]) -> int:
    """Examine the host and print the diagnoses."""
    found = list(_examine(values["config"]))
    problems = sum(one.severity == "problem" for one in found)
    if values["json"]:
        fields = ("severity", "what", "why", "fix")
        printing.json({"diagnoses": [{name: getattr(one, name) for name in fields} for one in found]})
        return 1 if problems else 0
    for one in found:
        fix, *more = one.fix.split("\n")
        printing.facts([(one.severity, one.what), ("why", one.why), ("fix", fix), *(("", line) for line in more)])
        print()
    advice = len(found) - problems
    print(f"{problems} problem{'s' * (problems != 1)}, {advice} advice." if found else "No problem found.")
    return 1 if problems else 0


def _examine(config: str | None) -> Iterator[Diagnosis]:
    client = Client(timeout_s=5.0)
    status: dict[str, Any] | None = None
    ports: list[dict[str, Any]] = []
    leases: list[Any] = []
    try:
        status = client.call(calls.status())
        ports = client.call(calls.ports())["ports"]
        leases = list(client.leases())
    except DaemonUnavailable as error:
        yield from diagnoses.unreachable(error, os.getuid())
    except PortdError as error:
        yield Diagnosis(
            "problem",
            f"what answers at {client.url} is not a working portd: {error}",
            "nothing can be leased.",
            "see the daemon's log: journalctl -u portd",
        )
    words = _command_line(status["pid"]) if status is not None else []
    is_system = _is_system(words, client) if status is not None else os.getuid() == 0
    named = config or _named_config(words, status["pid"] if status is not None else 0)
    path = named or _default_path(is_system=is_system)
    settings: Settings | None = None
    try:
        settings = load(path, system_paths()) if named or os.path.exists(path) else Settings()
    except ConfigError as error:
        yield Diagnosis(
            "problem",
            f"the configuration can't be used: {error}",
            "the daemon won't start again with it.",
            f"correct that line, then: portd serve --check-config --config {path}",
        )
    yield from _ports(settings, status, ports, path)
    yield from diagnoses.listeners(leases)
    if status is not None:
        yield from _daemon(settings, status)
        yield from diagnoses.responders(ports, status, path)
        yield from _resolver(status["dns"], ports)
    yield from diagnoses.clock(_is_clock_synchronized())


def _ports(
    settings: Settings | None, status: Mapping[str, Any] | None, ports: Sequence[Mapping[str, Any]], path: str
) -> Iterator[Diagnosis]:
    if settings is None:
        return
    pools = {name: pool_ports(pool) for name, pool in settings.pools.items()}
    pool = {port for part in pools.values() for port in part}
    if status is not None:
        yield from diagnoses.stale_settings({name: len(part) for name, part in pools.items()}, status, path)
    yield from examine_settings(settings, path)
    yield from diagnoses.unleased(pool, ports, path)


def examine_settings(settings: Settings, path: str) -> Iterator[Diagnosis]:
    """Examine what is wrong with the settings on this host, whether a daemon runs or not."""
    yield from diagnoses.ephemeral(
        {port for pool in settings.pools.values() for port in pool_ports(pool)},
        _static_ports(settings),
        _read("/proc/sys/net/ipv4/ip_local_port_range"),
        _read("/proc/sys/net/ipv4/ip_local_reserved_ports"),
        path,
    )


def _daemon(settings: Settings | None, status: Mapping[str, Any]) -> Iterator[Diagnosis]:
    pid = status["pid"]
    yield from diagnoses.descriptors(
        sum(pool["size"] for pool in status["pools"].values()), _read(f"/proc/{pid}/limits")
    )
    yield from diagnoses.capabilities(
        _read(f"/proc/{pid}/status"),
        _static_ports(settings) if settings is not None else (),
        _read("/proc/sys/net/ipv4/ip_unprivileged_port_start"),
        () if settings is None else {port for pool in settings.pools.values() for port in pool_ports(pool)},
    )
    for warning in status["warnings"]:
        yield Diagnosis("problem", warning, "the daemon reports it itself.", "see its log: journalctl -u portd")


def _resolver(dns: Mapping[str, Any], ports: Sequence[Mapping[str, Any]]) -> Iterator[Diagnosis]:
    if not dns.get("enabled") or not dns.get("listen") or dns.get("problem"):
        return
    name = f"{PROBE_NAME}.{dns['zone'].rstrip('.')}"
    programs = [
        printing.process(socket).partition("[")[0]
        for view in ports
        if view["port"] == 53 and view["protocol"] == "udp"
        for socket in view["listeners"]
    ]
    is_resolved = str(Path("/etc/resolv.conf").resolve()).startswith("/run/systemd/resolve")
    program = "systemd-resolved" if is_resolved or "systemd-resolved" in programs else next(iter(programs), "")
    yield from diagnoses.resolver(_is_found(name), name, dns, program)


# --- reading the daemon and the host ---


def _static_ports(settings: Settings) -> dict[int, str]:
    """Return static ports and their services."""
    return {port: service for service, static in settings.static.items() for port in static.endpoints.values()}


def _command_line(pid: int) -> list[str]:
    """Return a daemon's arguments; empty where they can't be read."""
    return _read(f"/proc/{pid}/cmdline").split("\0")[:-1]


def _named_config(words: Sequence[str], pid: int) -> str | None:
    """Return the file that a daemon's `--config` names; None where it has none."""
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or at + 1 < len(words)):
            path = value if equals else words[at + 1]
            return path if os.path.isabs(path) else os.path.join(os.path.realpath(f"/proc/{pid}/cwd"), path)
    return None


def _is_system(words: Sequence[str], client: Client) -> bool:
    return "--user" not in words if "serve" in words else client.endpoint.path in {"", SYSTEM_SOCKET}


def _default_path(*, is_system: bool) -> str:
    try:
        return (system_paths() if is_system else user_paths()).config
    except (RuntimeError, ConfigError):  # no home directory
        return system_paths().config


def _read(path: str) -> str:
    """Read a small file; "" where that is not possible."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _is_found(name: str) -> bool:
    """Ask the host's resolver for a name, as every program does; one that does not answer in time does not find it."""
    import socket
    import threading

    answers: list[bool] = []

    def ask() -> None:
        try:
            answers.append(bool(socket.getaddrinfo(name, None)))
        except OSError:
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # getaddrinfo(3) has no time limit of its own
    thread.start()
    thread.join(RESOLVER_TIMEOUT_S)
    return answers[0] if answers else False


def _is_clock_synchronized() -> bool | None:
    """Ask adjtimex(2) whether the clock is synchronized; None where that is not possible."""
    import ctypes

    buffer = ctypes.create_string_buffer(512)  # struct timex, 208 bytes; modes = 0 only reads
    state = ctypes.CDLL(None).adjtimex(buffer)
    return None if state < 0 else state != TIME_ERROR


COMMANDS = (
    Command(
        "doctor",
        [],
        "Check this host for problems and show how to fix them",
        doctor,
        (Option("--config", "FILE", "the daemon's configuration (the one that the daemon reads)"), JSON),
        """
Each diagnosis says what is wrong, why it matters, and the fix. Exit status 1
when one of them is a problem.""",
    ),
)
