"""`portd doctor`: what on this host stands in portd's way, why it matters, and the exact mend.

A check is a function from what was read of the host to findings, so that each can be tried on any host's words. A
`problem` will hurt sooner or later and makes the exit status 1; `advice` is what more could be had.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from portd._client import calls
from portd._client.client import Client
from portd._client.endpoints import SYSTEM_SOCKET
from portd._client.errors import DaemonUnavailable, PortdError
from portd.cli import printing
from portd.cli.options import JSON, Command, Option
from portd.config import Paths, Settings, dns_addresses, load, pool_ports, system_paths, user_paths
from portd.core.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any, Literal

DESCRIPTORS_SPARE = 1024
"""What a daemon needs beside one descriptor a held port and one an owner: connections, checks, the store."""
CAP_NET_BIND_SERVICE, CAP_SYS_PTRACE = 10, 19
"""Bits of capabilities(7)."""
AVAHI = "avahi-daemon"


class Finding:
    """One thing that is not as it should be."""

    __slots__ = ("mend", "severity", "what", "why")

    def __init__(self, severity: Literal["problem", "advice"], what: str, why: str, mend: str) -> None:
        self.severity = severity
        self.what = what
        self.why = why
        self.mend = mend


def doctor(values: dict[str, Any]) -> int:
    """Examine the host, and print what was found."""
    findings = list(_examine(values["config"]))
    if values["json"]:
        printing.json(
            {
                "findings": [
                    {name: getattr(finding, name) for name in ("severity", "what", "why", "mend")}
                    for finding in findings
                ]
            }
        )
    for finding in findings if not values["json"] else ():
        mend, *more = finding.mend.split("\n")
        printing.facts(
            [(finding.severity, finding.what), ("why", finding.why), ("mend", mend), *(("", line) for line in more)]
        )
        print()
    problems = sum(finding.severity == "problem" for finding in findings)
    if not values["json"]:
        print(
            "Nothing stands in portd's way."
            if not findings
            else f"{problems} of these {'is a problem' if problems == 1 else 'are problems'}, "
            f"{len(findings) - problems} advice."
        )
    return 1 if problems else 0


def _examine(config: str | None) -> Iterator[Finding]:
    status: dict[str, Any] | None = None
    ports: list[dict[str, Any]] = []
    client = Client(timeout_s=5.0)
    try:
        status = client.call(calls.status())
        ports = client.call(calls.ports())["ports"]
    except DaemonUnavailable as error:
        yield from unreachable(error)
    except PortdError as error:
        yield Finding(
            "problem",
            f"what answers at {client.url} is not a working portd: {error}",
            "nothing can be leased.",
            "see the daemon's log: journalctl -u portd",
        )
    is_system = client.endpoint.path in {"", SYSTEM_SOCKET} if status is not None else os.getuid() == 0
    paths = system_paths() if is_system else user_paths()
    try:
        settings = load(config, paths)
    except ConfigError as error:
        yield Finding(
            "problem",
            f"the configuration can't be used: {error}",
            "the daemon won't start again with it.",
            f"mend that line, then: portd serve --check-config --config {config or paths.config}",
        )
        settings = Settings()
    pool = {port for part in settings.pools.values() for port in pool_ports(part)}
    yield from ephemeral(
        pool,
        _read("/proc/sys/net/ipv4/ip_local_port_range"),
        _read("/proc/sys/net/ipv4/ip_local_reserved_ports"),
        paths.config,
    )
    yield from foreign(pool, ports, paths.config)
    if status is not None:
        yield from descriptors(len(pool), _read(f"/proc/{status['pid']}/limits"))
        yield from capabilities(_read(f"/proc/{status['pid']}/status"), settings, is_system=is_system)
        for warning in status["warnings"]:
            yield Finding("problem", warning, "the daemon says so itself.", "see its log: journalctl -u portd")
    yield from clock(_is_clock_synchronized())
    if settings.mdns.enabled:
        yield from responders(ports, status, settings, paths)
    if settings.dns.listen:
        yield from resolver(settings, _read("/etc/resolv.conf"), _forwarders())


# --- the checks ---


def unreachable(error: DaemonUnavailable) -> Iterator[Finding]:
    """No daemon; a socket file that nobody listens behind is told apart."""
    places = ", ".join(f"{url} ({reason})" for url, reason in error.tried)
    yield Finding(
        "problem",
        f"no daemon answers at {places}",
        "nothing can be leased.",
        "start one: systemctl start portd\nor, for yourself alone: portd serve --user",
    )
    for url, reason in error.tried:
        path = url.removeprefix("unix://")
        if path != url and reason == "connection refused":
            yield Finding(
                "problem",
                f"{path} is a socket that nobody listens behind",
                "its daemon died without tidying up, or is stopped; a new one replaces it.",
                f"start the daemon again, or if it is gone for good: rm {path}",
            )
        elif path != url and reason == "permission denied":
            yield Finding(
                "problem",
                f"{path} may not be opened by uid {os.getuid()}",
                "another user's daemon is not for you.",
                "run your own: portd serve --user",
            )


def ephemeral(pool: Iterable[int], range_text: str, reserved_text: str, config: str) -> Iterator[Finding]:
    """Pool ports that the kernel may give away as its own choice (ip_local_port_range, ip_local_reserved_ports)."""
    if len(range_text.split()) != 2:
        return
    first, last = (int(word) for word in range_text.split())
    reserved = expand(reserved_text)
    exposed = sorted(port for port in set(pool) - reserved if first <= port <= last)
    if not exposed:
        return
    wanted = spans(sorted(reserved | set(exposed)))
    yield Finding(
        "problem",
        f"pool ports {spans(exposed)} are inside the kernel's ephemeral range {first}-{last}",
        "any outgoing connection may take one of them; the lease then fails, or its owner can't bind.",
        f"keep the kernel off them: sysctl -w net.ipv4.ip_local_reserved_ports={wanted}\n"
        f"(and for the next boot, the same in /etc/sysctl.d/portd.conf), or move the pool in {config}",
    )


def foreign(pool: Iterable[int], ports: Sequence[Mapping[str, Any]], config: str) -> Iterator[Finding]:
    """Listeners inside the pool that have no lease."""
    pool = set(pool)
    found = [view for view in ports if view["verdict"] == "unmanaged" and view["port"] in pool]
    if not found:
        return
    named = ", ".join(
        f"{view['port']}/{view['protocol']} ({printing.owner(view['listeners'][0])})" for view in found[:8]
    )
    numbers = ", ".join(str(port) for port in sorted({view["port"] for view in found}))
    yield Finding(
        "problem",
        f"{len(found)} pool ports are listened on without a lease: {named}",
        "portd steps around them, one probation after the other; who else counts on them is not known here.",
        f"lease them (portd run), or leave them out in {config}: exclude = [{numbers}]",
    )


def descriptors(port_count: int, limits_text: str) -> Iterator[Finding]:
    """The daemon's file limit against what a full pool takes: a held port is one descriptor, an owner another."""
    line = next((line for line in limits_text.splitlines() if line.startswith("Max open files")), "")
    hard = line.split()[4] if len(line.split()) > 4 else ""
    needed = 2 * port_count + DESCRIPTORS_SPARE
    if hard.isdecimal() and int(hard) < needed:
        yield Finding(
            "problem",
            f"the daemon may open {hard} files; a full pool of {port_count} ports takes {needed}",
            "at the limit grants are refused as busy, and owners can't be watched.",
            f"in its unit: LimitNOFILE={needed}   (systemctl edit portd)\n"
            f"or before 'portd serve': ulimit -n {needed}, or a smaller pool",
        )


def capabilities(status_text: str, settings: Settings, *, is_system: bool) -> Iterator[Finding]:
    """What the daemon would need to be allowed (capabilities(7)), for what it is asked to do."""
    line = next((line for line in status_text.splitlines() if line.startswith("CapEff:")), "")
    if not line:
        return
    granted = int(line.split()[1], 16)
    low = sorted({port for static in settings.static.values() for port in static.endpoints.values() if port < 1024})
    if low and not granted >> CAP_NET_BIND_SERVICE & 1:
        yield Finding(
            "problem",
            f"the daemon may not bind ports below 1024, and {spans(low)} are static",
            "those leases are refused.",
            "in its unit: AmbientCapabilities=CAP_NET_BIND_SERVICE",
        )
    if is_system and not granted >> CAP_SYS_PTRACE & 1:
        yield Finding(
            "advice",
            "the daemon may not look into other users' processes (CAP_SYS_PTRACE)",
            "'portd who' can't name the process behind another user's port, only the user.",
            "in its unit: AmbientCapabilities=CAP_SYS_PTRACE",
        )


def clock(is_synchronized: bool | None) -> Iterator[Finding]:
    """Whether anybody keeps this host's clock right (None: not known)."""
    if is_synchronized is False:
        yield Finding(
            "advice",
            "nobody keeps this host's clock right (adjtimex says unsynchronized)",
            "leases run on another clock and don't mind; times in history and logs may jump or lie.",
            "timedatectl set-ntp true, or run chrony",
        )


def responders(
    ports: Sequence[Mapping[str, Any]], status: Mapping[str, Any] | None, settings: Settings, paths: Paths
) -> Iterator[Finding]:
    """Other mDNS responders on port 5353 (RFC 6762 section 15: one a host)."""
    # The guardian, which sends goodbyes for a killed daemon, has the daemon's own sockets.
    own = {status["pid"], (status.get("mdns") or {}).get("guardian")} if status is not None else set()
    others = {
        listener["pid"]: printing.owner(listener)
        for view in ports
        if view["port"] == 5353 and view["protocol"] == "udp"
        for listener in view["listeners"]
        if listener["pid"] is None or listener["pid"] not in own
    }
    names = sorted(set(others.values()))
    if not names or (all(name.startswith(AVAHI) for name in names) and settings.mdns.responder != "embedded"):
        return
    yield Finding(
        "problem",
        f"another mDNS responder has port 5353: {', '.join(names)}",
        "two responders on one host take each other's unicast answers (RFC 6762, section 15).",
        "systemd-resolved: MulticastDNS=no in /etc/systemd/resolved.conf, and restart it\n"
        f'Avahi: responder = "avahi" under [mdns] in {paths.config}',
    )


def resolver(settings: Settings, resolv_text: str, forwarders: str) -> Iterator[Finding]:
    """Whether this host's resolver asks portd about portd's zone."""
    zone = settings.dns.zone.rstrip(".")
    host, port = (dns_addresses(settings) or [("", 0)])[0]
    lines = (line.split() for line in resolv_text.splitlines())
    servers = [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]
    if zone in forwarders or (port == 53 and host in servers):
        return
    named = ", ".join(servers) or "none"
    yield Finding(
        "advice",
        f"this host's resolver (nameserver {named}) does not ask portd about {zone}",
        f"programs can't look up NAME.{zone}; portd resolve, the clients and dig @{host} -p {port} can.",
        "systemd-resolved: write /etc/systemd/resolved.conf.d/portd.conf and restart it:\n"
        f"[Resolve]\nDNS={host}:{port}\nDomains=~{zone}\n"
        f"dnsmasq: server=/{zone}/{host}#{port}",
    )


# --- reading the host ---


def expand(text: str) -> set[int]:
    """Expand "8080,9148-9150" as ip_local_reserved_ports writes it."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def spans(ports: Sequence[int]) -> str:
    """Write ascending ports as ranges: 8080,9148-9150."""
    parts: list[list[int]] = []
    for port in ports:
        if parts and port == parts[-1][1] + 1:
            parts[-1][1] = port
        else:
            parts.append([port, port])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _read(path: str) -> str:
    """Read a small file; "" where that can't be done: what can't be seen is not found wanting."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _forwarders() -> str:
    """Read where systemd-resolved and dnsmasq are told which server to ask for which zone."""
    places = (
        "/etc/systemd/resolved.conf",
        "/etc/systemd/resolved.conf.d/*.conf",
        "/run/systemd/resolved.conf.d/*.conf",
        "/etc/systemd/network/*.network",
        "/etc/dnsmasq.conf",
        "/etc/dnsmasq.d/*",
    )
    lines = [line for place in places for path in sorted(glob.glob(place)) for line in _read(path).splitlines()]
    return "\n".join(line for line in lines if not line.lstrip().startswith(("#", ";")))


def _is_clock_synchronized() -> bool | None:
    """Ask adjtimex(2) whether the clock is kept right; None where that can't be asked."""
    import ctypes

    buffer = ctypes.create_string_buffer(512)  # struct timex, 208 bytes; modes = 0 only reads
    state = ctypes.CDLL(None).adjtimex(buffer)
    return None if state < 0 else state != 5  # TIME_ERROR


COMMANDS = (
    Command(
        "doctor",
        [],
        "Tell what on this host stands in portd's way, with the mend",
        doctor,
        (Option("--config", "FILE", "the daemon's configuration, if it is not at its usual place"), JSON),
        """
Each finding says what is so, why it matters, and the exact mend. Exit status 1 when one of them is a problem.""",
    ),
)
