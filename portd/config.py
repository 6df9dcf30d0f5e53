"""The configuration: frozen settings, every bound and every relation between them checked at load.

A mistake is told with the file, the line where it can be found, the key, and the rule that it breaks. This module must
not know what the settings are used for.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from portd.core.errors import ConfigError
from portd.core.model import LABEL_PATTERN, HoldKind, Label, PortNumber, Protocol

ZONE_MAX_CHARACTERS: Final = 61
"""Three labels of 63 (an endpoint, an instance, a service) fit before it in a name of 255 octets."""


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all sections have in common: an unknown key is an error."""


class Listen(_Section, frozen=True):
    """Where the daemon listens. An empty string switches a listener off; None means the default of the paths."""

    socket: str | None = None
    handoff: str | None = None
    http: str | tuple[str, ...] | None = None
    tls_cert: str = ""
    tls_key: str = ""


class Pool(_Section, frozen=True):
    """Port ranges ("20000-29999", or one port), less those excluded."""

    ranges: tuple[str | PortNumber, ...]
    exclude: tuple[str | PortNumber, ...] = ()


DEFAULT_POOL: Final = Pool(ranges=("20000-29999",))
"""Outside Linux' ephemeral range (32768-60999), and of anything below 10000 that people type by hand."""


class Static(_Section, frozen=True):
    """A port that one service has for good."""

    port: PortNumber
    protocol: Protocol = "tcp"
    address: str = "127.0.0.1"


class Leases(_Section, frozen=True):
    """Bounds on leases: seconds, and leases for each uid (0: no quota)."""

    max_ttl: Annotated[float, Meta(gt=0, le=31_536_000)] = 86_400.0
    cooldown: Annotated[float, Meta(ge=0, le=86_400)] = 5.0
    quota_per_uid: Annotated[int, Meta(ge=0)] = 10_000
    hold: HoldKind = "shared"


class Store(_Section, frozen=True):
    """The database. `durability`: "full" survives a power cut, "fast" only the daemon's own death."""

    path: str | None = None
    durability: Literal["full", "fast"] = "full"
    history_days: Annotated[float, Meta(ge=0, le=3650)] = 30.0


class Health(_Section, frozen=True):
    """Checks: how many at once, and which programs (absolute paths) a `command` check may start."""

    concurrency: Annotated[int, Meta(ge=1, le=4096)] = 64
    allow_commands: tuple[str, ...] = ()


class Mdns(_Section, frozen=True):
    """Announcing on the LAN. `interfaces`: names; empty means all but loopback, container and bridge ports."""

    enabled: bool = True
    responder: Literal["auto", "embedded", "avahi"] = "auto"
    interfaces: tuple[str, ...] = ()


class Dns(_Section, frozen=True):
    """Unicast DNS; an empty `listen` switches it off. `ttl` is in seconds."""

    listen: str = "127.0.0.1:8600"
    zone: str = "portd.internal."
    ttl: Annotated[int, Meta(ge=0, le=86_400)] = 0


class Compat(_Section, frozen=True):
    """Protocols of others that portd may speak."""

    consul: str = ""
    portserver: str = ""


class Cluster(_Section, frozen=True):
    """Many hosts together."""

    engine: Literal["", "etcd"] = ""
    endpoints: tuple[str, ...] = ()
    node: str = ""
    advertise: str = ""


class Token(_Section, frozen=True):
    """A bearer token for callers from elsewhere, kept as its SHA-256 in hex (`printf %s TOKEN | sha256sum`)."""

    name: Label
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    admin: bool = False


class Auth(_Section, frozen=True):
    """Who is trusted beside root: the members of `admin_group` (none if there is no such group), and tokens."""

    admin_group: str = "portd"
    tokens: tuple[Token, ...] = ()


class Log(_Section, frozen=True):
    """What is logged, and how: "auto" writes for the journal where there is one, else plain text."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"


class Settings(_Section, frozen=True):
    """The whole configuration."""

    listen: Listen = Listen()
    pools: dict[Label, Pool] = msgspec.field(default_factory=lambda: {"default": DEFAULT_POOL})
    own_addresses: str = "127.77.0.0/16"
    static: dict[Label, Static] = {}
    leases: Leases = Leases()
    store: Store = Store()
    health: Health = Health()
    mdns: Mdns = Mdns()
    dns: Dns = Dns()
    compat: Compat = Compat()
    cluster: Cluster = Cluster()
    auth: Auth = Auth()
    log: Log = Log()

    @property
    def own_block(self) -> ipaddress.IPv4Network:
        """Return the block that own addresses are taken from."""
        return ipaddress.IPv4Network(self.own_addresses)


class Paths(Struct, frozen=True):
    """Where a daemon's files are, before the configuration says otherwise."""

    socket: str
    handoff: str
    http: tuple[str, ...]
    store: str
    config: str
    socket_mode: int


def system_paths() -> Paths:
    """Return the places of the system daemon."""
    return Paths(
        "/run/portd/portd.sock",
        "/run/portd/handoff.sock",
        ("127.0.0.1:7783",),
        "/var/lib/portd/portd.db",
        "/etc/portd/portd.toml",
        0o666,
    )


def user_paths() -> Paths:
    """Return the places of a user's daemon (XDG Base Directory Specification)."""
    home = Path.home()
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"{tempfile.gettempdir()}/portd-runtime-{os.getuid()}"
    state = os.environ.get("XDG_STATE_HOME") or str(home / ".local/state")
    config = os.environ.get("XDG_CONFIG_HOME") or str(home / ".config")
    return Paths(
        f"{runtime}/portd/portd.sock",
        f"{runtime}/portd/handoff.sock",
        (),
        f"{state}/portd/portd.db",
        f"{config}/portd/portd.toml",
        0o600,
    )


def load(path: str | None, paths: Paths) -> Settings:
    """Read and check a configuration file; a missing file at the default place means the defaults.

    Raises ConfigError that says what is wrong, and where.
    """
    place = Path(path or paths.config)
    try:
        text = place.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is None:
            return Settings()
        raise ConfigError(f"{place}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: can't be read: {error}") from error
    return parse(text, str(place))


def parse(text: str, place: str = "portd.toml") -> Settings:
    """Decode and check TOML text; raises ConfigError with `place`, line and rule."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{place}: not TOML: {error}") from error
    try:
        settings = msgspec.convert(raw, Settings)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        key = where.rstrip("`")
        if found := re.search(r"unknown field `([^`]+)`", message):
            key = f"{key}.{found[1]}" if key else found[1]
        raise ConfigError(f"{place}{_line_of(text, key)}: {key or 'top level'}: {message}") from error
    for key, problem in _problems(settings):
        raise ConfigError(f"{place}{_line_of(text, key)}: {key}: {problem}")
    return settings


def pool_ports(pool: Pool) -> list[int]:
    """Return the ports of a pool in ascending order."""
    excluded = {port for item in pool.exclude for port in _expand(item)}
    return sorted({port for item in pool.ranges for port in _expand(item)} - excluded)


def split_host_port(text: str) -> tuple[str, int]:
    """Split "127.0.0.1:7783" or "[::1]:7783"; raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError(f"{text!r} is not ADDRESS:PORT")
    host = host.removeprefix("[").removesuffix("]")
    ipaddress.ip_address(host)
    return host, int(port)


def http_addresses(settings: Settings, paths: Paths) -> list[tuple[str, int]]:
    """Return where HTTP is served over TCP."""
    http = settings.listen.http
    places = paths.http if http is None else (http,) if isinstance(http, str) else http
    return [split_host_port(place) for place in places if place]


def _expand(item: str | int) -> range:
    if isinstance(item, int):
        return range(item, item + 1)
    found = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", item)
    if not found:
        raise ValueError(f"{item!r} is not a port or a range like 20000-29999")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last <= 65535:
        raise ValueError(f"{item!r} is not within 1-65535, lower bound first")
    return range(first, last + 1)


def _problems(settings: Settings) -> list[tuple[str, str]]:
    """List what the types can't say: relations between settings."""
    found: list[tuple[str, str]] = []
    owners: dict[int, str] = {}
    for name, pool in settings.pools.items():
        try:
            ports = pool_ports(pool)
        except ValueError as error:
            found.append((f"pools.{name}", str(error)))
            continue
        if not ports:
            found.append((f"pools.{name}", "has no port"))
        if (other := next((owners[port] for port in ports if port in owners), None)) is not None:
            found.append((f"pools.{name}", f"overlaps pool {other}: a port belongs to one pool"))
        owners.update(dict.fromkeys(ports, name))
    if "default" not in settings.pools:
        found.append(("pools", "there must be a pool named 'default'"))
    try:
        if not settings.own_block.is_loopback or settings.own_block.num_addresses < 4:
            found.append(("own_addresses", "must be a block of at least four addresses within 127.0.0.0/8"))
    except ValueError as error:
        found.append(("own_addresses", str(error)))
    for name, static in settings.static.items():
        try:
            ipaddress.ip_address(static.address)
        except ValueError as error:
            found.append((f"static.{name}.address", str(error)))
        for other_name, other_static in settings.static.items():
            if (
                other_name < name
                and (static.port, static.address) == (other_static.port, other_static.address)
                and ("both" in (static.protocol, other_static.protocol) or static.protocol == other_static.protocol)
            ):
                found.append((f"static.{name}.port", f"{static.port} is static for {other_name} already"))
    found.extend(_listen_problems(settings))
    zone = settings.dns.zone.removesuffix(".")
    if len(zone) > ZONE_MAX_CHARACTERS or not all(re.match(LABEL_PATTERN, label) for label in zone.lower().split(".")):
        found.append(("dns.zone", f"{zone!r} is not a domain name of 1 to {ZONE_MAX_CHARACTERS} characters"))
    found.extend(
        ("health.allow_commands", f"{command!r} is not an absolute path")
        for command in settings.health.allow_commands
        if not command.startswith("/")
    )
    return found


def _listen_problems(settings: Settings) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    listen = settings.listen
    for key, places in (
        ("listen.http", (listen.http,) if isinstance(listen.http, str) else listen.http or ()),
        ("dns.listen", (settings.dns.listen,)),
    ):
        for place in places:
            try:
                host = split_host_port(place)[0] if place else "127.0.0.1"
            except ValueError as error:
                found.append((key, str(error)))
                continue
            if key == "listen.http" and not ipaddress.ip_address(host).is_loopback and not listen.tls_cert:
                problem = f"{place} is not loopback: tokens would cross the network in the clear; set tls_cert, tls_key"
                found.append((key, problem))
    if bool(listen.tls_cert) != bool(listen.tls_key):
        found.append(("listen.tls_cert", "tls_cert and tls_key go together"))
    if settings.cluster.engine == "etcd" and not settings.cluster.endpoints:
        found.append(("cluster.endpoints", "an etcd cluster needs endpoints"))
    return found


def _line_of(text: str, key: str) -> str:
    """Find the line of a dotted key, best effort: ":LINE", or nothing."""
    parts = [part for part in re.split(r"[.\[\]]+", key) if part]
    for depth in range(len(parts), 0, -1):
        table, name = ".".join(parts[: depth - 1]), parts[depth - 1]
        current = ""
        for number, line in enumerate(text.splitlines(), 1):
            stripped = line.strip()
            if stripped.startswith("["):
                current = stripped.strip("[] ").replace('"', "")
                if current == ".".join(parts[:depth]):
                    return f":{number}"
            elif current == table and re.match(rf'"?{re.escape(name)}"?\s*=', stripped):
                return f":{number}"
    return ""
