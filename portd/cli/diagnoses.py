"""What may be wrong with a host for portd, why it matters, and the fix: pure functions of what was read of the host.

A `problem` will hurt sooner or later and makes `portd doctor` exit with 1; `advice` is what could be better. What can't
be read is not diagnosed.
"""

from __future__ import annotations

from portd._client.errors import DaemonUnavailable
from portd.cli import printing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any, Literal

DESCRIPTORS_SPARE = 1024
"""Descriptors that a daemon needs beside one for each held port and one for each owner: connections, checks, store."""
CAP_NET_BIND_SERVICE = 10
"""A bit of capabilities(7)."""
UNPRIVILEGED_START = 1024
"""The kernel's default of ip_unprivileged_port_start."""
AVAHI = "avahi-daemon"
SHOWN_MAX = 8
MDNS_PORT = 5353


class Diagnosis:
    """One thing that is not as it should be."""

    __slots__ = ("fix", "severity", "what", "why")

    def __init__(self, severity: Literal["problem", "advice"], what: str, why: str, fix: str) -> None:
        self.severity = severity
        self.what = what
        self.why = why
        self.fix = fix


# --- the daemon ---


def unreachable(error: DaemonUnavailable, uid: int) -> Iterator[Diagnosis]:
    """No daemon answers; a socket file without a listener and one of another user are diagnosed apart."""
    places = ", ".join(f"{url} ({reason})" for url, reason in error.tried)
    yield Diagnosis(
        "problem",
        f"no daemon answers at {places}",
        "nothing can be leased.",
        "start one: systemctl start portd\nor, for yourself alone: portd serve --user",
    )
    for url, reason in error.tried:
        path = url.removeprefix("unix://")
        if path != url and reason == "connection refused":
            yield Diagnosis(
                "problem",
                f"nobody listens on the socket {path}",
                "its daemon was killed or is stopped; a new one replaces the file.",
                f"start the daemon again, or if it is gone for good: rm {path}",
            )
        elif path != url and reason == "permission denied":
            yield Diagnosis(
                "problem",
                f"uid {uid} may not open {path}",
                "it is another user's daemon.",
                "run your own: portd serve --user",
            )


def stale_settings(file_sizes: Mapping[str, int], status: Mapping[str, Any], config: str) -> Iterator[Diagnosis]:
    """The pools of the configuration file are not those that the daemon runs with."""
    running = {name: pool["size"] for name, pool in status["pools"].items()}
    if running == dict(file_sizes):
        return
    described = [", ".join(f"{name} {size}" for name, size in sorted(sizes.items())) for sizes in (running, file_sizes)]
    yield Diagnosis(
        "advice",
        f"the daemon runs with other pools ({described[0]} ports) than {config} has ({described[1]})",
        "the file changed since the daemon read it, or the daemon reads another one.",
        "systemctl restart portd   (leases survive), or name the file: portd doctor --config FILE",
    )


def descriptors(port_count: int, limits_text: str) -> Iterator[Diagnosis]:
    """The daemon's file limit is too low for a full pool: a held port is one descriptor, an owner another."""
    line = next((line for line in limits_text.splitlines() if line.startswith("Max open files")), "")
    hard = line.split()[4] if len(line.split()) > 4 else ""
    needed = 2 * port_count + DESCRIPTORS_SPARE
    if hard.isdecimal() and int(hard) < needed:
        yield Diagnosis(
            "problem",
            f"the daemon may open {hard} files; a full pool of {port_count} ports needs {needed}",
            "at the limit grants are refused as busy, and owners can't be watched.",
            f"in its unit: LimitNOFILE={needed}   (systemctl edit portd)\n"
            f"or before 'portd serve': ulimit -n {needed}, or a smaller pool",
        )


def capabilities(
    status_text: str, static_ports: Iterable[int], unprivileged_start: str, pool: Iterable[int] = ()
) -> Iterator[Diagnosis]:
    """The daemon lacks a capability (capabilities(7)) that its configuration needs."""
    line = next((line for line in status_text.splitlines() if line.startswith("CapEff:")), "")
    if not line:
        return
    granted = int(line.split()[1], 16)
    start = int(unprivileged_start) if unprivileged_start.strip().isdecimal() else UNPRIVILEGED_START
    if granted >> CAP_NET_BIND_SERVICE & 1:
        return
    for ports, role in ((static_ports, "static"), (pool, "in a pool")):
        low = sorted({port for port in ports if port < start})
        if low:
            yield Diagnosis(
                "problem",
                f"the daemon may not bind ports below {start}, and {spans(low)} are {role}",
                "those leases are refused.",
                "in its unit: AmbientCapabilities=CAP_NET_BIND_SERVICE\n"
                "or lower net.ipv4.ip_unprivileged_port_start, or configure other ports",
            )


# --- ports ---


def ephemeral(
    pool: Iterable[int], static: Mapping[int, str], range_text: str, reserved_text: str, config: str
) -> Iterator[Diagnosis]:
    """Pool and static ports that the kernel may choose itself (ip_local_port_range, ip_local_reserved_ports).

    `static` maps ports to their services.
    """
    if len(range_text.split()) != 2:
        return
    first, last = (int(word) for word in range_text.split())
    reserved = expand(reserved_text)
    exposed = sorted(port for port in set(pool) - reserved if first <= port <= last)
    fixed = sorted(port for port in set(static) - reserved if first <= port <= last)
    wanted = spans(sorted(reserved | set(exposed) | set(fixed)))
    fix = (
        f"reserve them: sysctl -w net.ipv4.ip_local_reserved_ports={wanted}\n"
        f"(and for the next boot, the same in /etc/sysctl.d/portd.conf), or change {config}"
    )
    if exposed:
        yield Diagnosis(
            "problem",
            f"pool ports {spans(exposed)} are inside the kernel's ephemeral range {first}-{last}",
            "any outgoing connection may occupy one of them; the lease then fails, or its owner can't bind.",
            fix,
        )
    if fixed:
        named = ", ".join(f"{port} ({static[port]})" for port in fixed)
        yield Diagnosis(
            "problem",
            f"static ports {named} are inside the kernel's ephemeral range {first}-{last}",
            "any outgoing connection may occupy one while its service is away; the service is then refused its port.",
            fix,
        )


def unleased(pool: Iterable[int], ports: Sequence[Mapping[str, Any]], config: str) -> Iterator[Diagnosis]:
    """Listeners inside the pool that have no lease."""
    pool = set(pool)
    found = [view for view in ports if view["verdict"] == "unmanaged" and view["port"] in pool and view["listeners"]]
    if not found:
        return
    named = ", ".join(
        f"{view['port']}/{view['protocol']} ({printing.owner(view['listeners'][0])})" for view in found[:SHOWN_MAX]
    )
    numbers = ", ".join(str(port) for port in sorted({view["port"] for view in found}))
    yield Diagnosis(
        "problem",
        f"{len(found)} pool ports are listened on without a lease: {named}",
        "portd skips them; nobody finds or checks those services.",
        f"lease them: portd adopt SERVICE {found[0]['port']}\nor leave them out in {config}: exclude = [{numbers}]",
    )


def listeners(leases: Iterable[Mapping[str, Any]]) -> Iterator[Diagnosis]:
    """An owner listens on another port or wider than its lease, or a foreign process listens on the leased port."""
    for lease in leases:
        name = f"{lease['service']} {printing.instance(lease)}"
        if other := printing.elsewhere(lease):
            yield Diagnosis(
                "problem",
                f"{name} leased port {lease['port']}, and its owner listens on {other} instead",
                "callers are not sent to it, and the port that it uses is not protected.",
                "give it the port: {port} in the command of 'portd run', or $PORT from its environment\n"
                "(a $PORT on the command line of portd run, or in a Procfile, is expanded before portd runs)",
            )
        if wide := printing.wider(lease):
            yield Diagnosis(
                "advice",
                f"{name} leased {lease['address']} and listens on {wide}: open to the LAN",
                "other hosts can connect to a service that was meant for this one.",
                f"let it bind {{host}} ({lease['address']}), or lease what it binds: --address 0.0.0.0",
            )
        if lease["state"] == "conflict":
            yield Diagnosis(
                "problem",
                f"a process that is not the owner's listens on port {lease['port']} of {name}",
                "callers may reach the wrong program; the instance is left out of lookups.",
                f"see which: portd who {lease['port']}; end it, or make it the owner: portd transfer {lease['id']} PID",
            )


# --- the host ---


def clock(is_synchronized: bool | None) -> Iterator[Diagnosis]:
    """The host's clock is not synchronized (None: not known)."""
    if is_synchronized is False:
        yield Diagnosis(
            "advice",
            "this host's clock is not synchronized (adjtimex)",
            "leases use another clock and are not affected; times in history and logs may be wrong.",
            "timedatectl set-ntp true, or run chrony",
        )


def responders(ports: Sequence[Mapping[str, Any]], status: Mapping[str, Any], config: str) -> Iterator[Diagnosis]:
    """Another mDNS responder than the daemon and its guardian is on port 5353 (RFC 6762 section 15: one a host)."""
    mdns = status["mdns"]
    if not mdns.get("enabled"):
        return
    own = {status["pid"], mdns.get("guardian")}
    names = sorted(
        {
            printing.owner(socket)
            for view in ports
            if view["port"] == MDNS_PORT and view["protocol"] == "udp"
            for socket in view["listeners"]
            if socket["pid"] is None or socket["pid"] not in own
        }
    )
    if not names or (mdns.get("responder") == "avahi" and all(name.startswith(AVAHI) for name in names)):
        return
    yield Diagnosis(
        "problem",
        f"another mDNS responder uses port {MDNS_PORT}: {', '.join(names)}",
        "two responders on one host receive each other's unicast answers (RFC 6762, section 15).",
        "systemd-resolved: MulticastDNS=no in /etc/systemd/resolved.conf, then restart it\n"
        f'Avahi: responder = "avahi" under [mdns] in {config}',
    )


def resolver(is_answered: bool | None, name: str, dns: Mapping[str, Any], resolver_name: str) -> Iterator[Diagnosis]:
    """The host's resolver does not find a name that portd serves (None: not asked).

    `resolver_name` is the program that resolves here, as far as it is known: its fix is shown.
    """
    if is_answered is not False:
        return
    zone = dns["zone"].rstrip(".")
    server = next(iter(dns["listen"]), "") if isinstance(dns["listen"], list | tuple) else dns["listen"]
    host, _, port = server.rpartition(":")
    fixes = {
        "systemd-resolved": "portd install --resolved\nor in /etc/systemd/resolved.conf.d/portd.conf; restart it:\n"
        f"[Resolve]\nDNS={server}\nDomains=~{zone}",
        "dnsmasq": f"in /etc/dnsmasq.d/portd.conf, then restart dnsmasq: server=/{zone}/{host.strip('[]')}#{port}",
        "unbound": "in unbound.conf, then restart unbound:\nserver:\n  do-not-query-localhost: no\n"
        f"  domain-insecure: {zone}\nstub-zone:\n  name: {zone}\n  stub-addr: {host.strip('[]')}@{port}",
    }
    yield Diagnosis(
        "advice",
        f"this host's resolver does not find {name}",
        f"programs can't look up NAME.{zone}; portd resolve, the clients and dig @{host.strip('[]')} -p {port} can.",
        fixes.get(resolver_name) or "\n".join(f"{one}: {fix}" for one, fix in fixes.items()),
    )


def expand(text: str) -> set[int]:
    """Expand "8080,9148-9150", the form of ip_local_reserved_ports."""
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
