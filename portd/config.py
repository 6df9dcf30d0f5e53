"""The configuration: frozen settings, every bound and every relation between them checked at load.

An error names the file, the line where it can be found, the key, and the rule that is broken. This module must not know
what the settings are used for.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from portd.core.errors import ConfigError
from portd.core.model import LABEL_PATTERN, MAIN_ENDPOINT, HoldKind, Label, PortNumber, Protocol

ZONE_MAX_CHARACTERS: Final = 61
"""Three labels of 63 (an endpoint, an instance, a service) fit before it in a name of 255 octets."""
SHA256_PATTERN: Final = r"^[0-9a-f]{64}\Z"
MIB: Final = 1 << 20

Problem = tuple[str, str]
"""The dotted key of a setting, and what is wrong with it."""


SOCKET_NAME_MAX_BYTES: Final = 107
"""The longest name of a unix socket (unix(7))."""


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all sections have in common: an unknown key is an error."""


class Listen(_Section, frozen=True):
    """Where the daemon listens. An empty string disables a listener; None means the default of the paths."""

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
    """Ports that one service has for good: `port` for its main endpoint, or `ports` by endpoint."""

    port: PortNumber | None = None
    ports: dict[Label, PortNumber] = {}
    protocol: Protocol = "tcp"
    address: str = "127.0.0.1"

    @property
    def endpoints(self) -> dict[str, int]:
        """Return the static port of each endpoint."""
        return dict(self.ports) if self.port is None else {MAIN_ENDPOINT: self.port}


class Service(_Section, frozen=True):
    """Rules for one service name.

    `users` may lease it (user names, uids as text, "@GROUP", "token:NAME"); empty: whoever has it. `when_all_critical`:
    what a look-up gives while every checked instance is critical.
    """

    users: tuple[str, ...] = ()
    when_all_critical: Literal["none", "all"] = "none"


class Leases(_Section, frozen=True):
    """Bounds on leases: seconds, and leases for each uid (0: no quota). `names`: whether a service name belongs to the
    user of its oldest live lease ("owned") or to everybody ("shared")."""

    max_ttl: Annotated[float, Meta(gt=0, le=31_536_000)] = 86_400.0
    cooldown: Annotated[float, Meta(ge=0, le=86_400)] = 5.0
    quota_per_uid: Annotated[int, Meta(ge=0)] = 5_000
    hold: HoldKind = "shared"
    names: Literal["owned", "shared"] = "owned"


class Store(_Section, frozen=True):
    """The database. `durability`: "full" survives a power cut, "fast" only the daemon's own death.

    Ended leases are kept for `history_days`, but no more than `history_mib` in all and `history_mib_per_user` for one
    user; the oldest go first.
    """

    path: str | None = None
    durability: Literal["full", "fast"] = "full"
    history_days: Annotated[float, Meta(ge=0, le=3650)] = 30.0
    history_mib: Annotated[int, Meta(ge=1, le=1 << 20)] = 512
    history_mib_per_user: Annotated[int, Meta(ge=1, le=1 << 20)] = 128


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
    """Unicast DNS; an empty `listen` disables it. `ttl` is in seconds."""

    listen: str | tuple[str, ...] = "127.0.0.1:8600"
    zone: str = "portd.internal."
    ttl: Annotated[int, Meta(ge=0, le=86_400)] = 0


class Compat(_Section, frozen=True):
    """Protocols of other programs that portd may speak; an empty string is off.

    `consul` (one or a list) and `grpc_port_server` are loopback addresses with a port; `portserver` is a path, or
    `@NAME` in the abstract namespace.
    """

    consul: str | tuple[str, ...] = ""
    portserver: str = ""
    grpc_port_server: str = ""


class Cluster(_Section, frozen=True):
    """Several hosts together, by etcd; an empty `engine` is off.

    `node` is this host's name (default: the host name), `advertise` the address or interface that other hosts reach
    (default: the one that reaches etcd). A host that dies disappears after `ttl` seconds. `follow`: all services, those
    that somebody here asked for, or what suits the number of hosts. A relative `password_file` is a systemd credential.
    """

    engine: Literal["", "etcd"] = ""
    endpoints: tuple[str, ...] = ()
    node: str = ""
    advertise: str = ""
    ttl: Annotated[int, Meta(ge=3, le=600)] = 10
    follow: Literal["auto", "all", "asked"] = "auto"
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    user: str = ""
    password_file: str = ""


class Token(_Section, frozen=True):
    """A bearer token for callers from elsewhere, kept as its SHA-256 in hex (`printf %s TOKEN | sha256sum`)."""

    name: Label
    sha256: Annotated[str, Meta(pattern=SHA256_PATTERN)]
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
    services: dict[Label, Service] = {}
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
        """Return the block that own addresses are allocated from."""
        return ipaddress.IPv4Network(self.own_addresses)


class Paths(Struct, frozen=True):
    """The default paths of a daemon's files."""

    socket: str
    handoff: str
    http: tuple[str, ...]
    store: str
    config: str
    socket_mode: int
    inspector: str = ""
    """The socket of portd-inspector; "": other users' processes are inspected with the daemon's own rights."""


def system_paths() -> Paths:
    """Return the paths of the system daemon."""
    return Paths(
        "/run/portd/portd.sock",
        "/run/portd/handoff.sock",
        ("127.0.0.1:7783",),
        "/var/lib/portd/portd.db",
        "/etc/portd/portd.toml",
        0o666,
        "/run/portd-inspector.sock",
    )


def user_paths() -> Paths:
    """Return the paths of a user's daemon (XDG Base Directory Specification).

    Raises ConfigError where the user has no home directory and the environment does not say where files go.
    """
    runtime = runtime_directory()
    return Paths(
        f"{runtime}/portd/portd.sock",
        f"{runtime}/portd/handoff.sock",
        (),
        f"{_base_directory('XDG_STATE_HOME', '.local/state')}/portd/portd.db",
        f"{_base_directory('XDG_CONFIG_HOME', '.config')}/portd/portd.toml",
        0o600,
    )


def runtime_directory() -> str:
    """Return $XDG_RUNTIME_DIR, else /run/user/UID where that is the user's own, else a directory of the user's under
    the system's temporary directory; none of them is made here."""
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        return given
    uid = os.getuid()
    usual = f"/run/user/{uid}"
    try:
        status = os.stat(usual, follow_symlinks=False)
    except OSError:
        pass
    else:
        if stat.S_ISDIR(status.st_mode) and status.st_uid == uid:
            return usual
    return f"{tempfile.gettempdir()}/portd-runtime-{uid}"


def load(path: str | None, paths: Paths) -> Settings:
    """Read and check a configuration file; a missing file at the default path means the defaults.

    Raises ConfigError with the file, the line, the key and the rule.
    """
    place = Path(path or paths.config)
    try:
        text = place.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is None:
            return Settings()
        raise ConfigError(f"{place}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{place}: can't be read: {error.strerror}") from error
    return parse(text, str(place))


def parse(text: str, place: str = "portd.toml") -> Settings:
    """Decode and check TOML text; raises ConfigError with `place`, line and rule."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{place}: not TOML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{place}: not TOML: arrays or tables are nested too deeply") from None
    try:
        settings = msgspec.convert(raw, Settings)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at ")
        key = _name_entry(raw, where.removeprefix("`key` in ").strip("`").removeprefix("$").removeprefix("."))
        message = _PATTERNS.get(message.partition(" matching regex ")[2], message)
        if found := re.search(r"unknown field `([^`]+)`", message):
            key = f"{key}.{found[1]}" if key else found[1]
            message = "unknown setting"
        raise ConfigError(f"{place}{_line_of(text, key)}: {key or 'top level'}: {message}") from error
    for key, problem in _problems(settings):
        raise ConfigError(f"{place}{_line_of(text, key)}: {key}: {problem}")
    return settings


def pool_ports(pool: Pool) -> list[int]:
    """Return the ports of a pool in ascending order; raises ValueError for an item that is no port or range."""
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
    return [split_host_port(address) for address in (paths.http if http is None else _listed(http))]


def consul_addresses(settings: Settings) -> list[tuple[str, int]]:
    """Return where Consul's API is served; empty when it is disabled."""
    return [split_host_port(address) for address in _listed(settings.compat.consul)]


def dns_addresses(settings: Settings) -> list[tuple[str, int]]:
    """Return where DNS is served; empty when it is disabled."""
    return [split_host_port(address) for address in _listed(settings.dns.listen)]


def _name_entry(raw: dict[str, Any], where: str) -> str:
    """Replace msgspec's "SECTION[...]" by "SECTION.NAME": it does not say which entry of a table is wrong."""
    section, _, rest = where.partition("[...]")
    kind = _TABLES.get(section)
    if kind is None:
        return where
    for name, value in raw[section].items():
        try:
            msgspec.convert({name: value}, dict[Label, kind])  # type: ignore[valid-type]
        except msgspec.ValidationError:
            return f"{section}.{name}{rest}"
    return where


def _base_directory(variable: str, below_home: str) -> str:
    if given := os.environ.get(variable):
        return given
    try:
        return str(Path.home() / below_home)
    except RuntimeError:
        raise ConfigError(
            f"no home directory is known for uid {os.getuid()}: set HOME, or {variable} to a directory of yours"
        ) from None


_TABLES: Final[dict[str, type[_Section]]] = {"pools": Pool, "static": Static, "services": Service}
_PATTERNS: Final = {
    repr(LABEL_PATTERN): "is not a name of 1 to 63 of a-z, 0-9 and '-'",
    repr(SHA256_PATTERN): "is not a SHA-256 in 64 hexadecimal digits",
}
"""What an error says in place of a regular expression."""


def _listed(value: str | Sequence[str]) -> list[str]:
    return [item for item in ([value] if isinstance(value, str) else value) if item]


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


# --- what the types can't say: a function for each section, in the order of the sections ---


def _problems(settings: Settings) -> Iterator[Problem]:
    for check in _CHECKS:
        yield from check(settings)


def _check_listen(settings: Settings) -> Iterator[Problem]:
    listen = settings.listen
    for address in _listed(listen.http or ()):
        try:
            host, _ = split_host_port(address)
        except ValueError as error:
            yield "listen.http", str(error)
            continue
        if not ipaddress.ip_address(host).is_loopback and not listen.tls_cert:
            yield (
                "listen.http",
                f"{address} is not loopback: tokens would cross the network in the clear; set tls_cert, tls_key",
            )
    if bool(listen.tls_cert) != bool(listen.tls_key):
        yield "listen.tls_cert", "tls_cert and tls_key go together"


def _check_pools(settings: Settings) -> Iterator[Problem]:
    owners: dict[int, str] = {}
    for name, pool in settings.pools.items():
        try:
            ports = pool_ports(pool)
        except ValueError as error:
            yield f"pools.{name}", str(error)
            continue
        if not ports:
            yield f"pools.{name}", "has no port"
        if (other := next((owners[port] for port in ports if port in owners), None)) is not None:
            yield f"pools.{name}", f"overlaps pool {other}: a port belongs to one pool"
        owners.update(dict.fromkeys(ports, name))
    if "default" not in settings.pools:
        yield "pools", "there must be a pool named 'default'"


def _check_own_addresses(settings: Settings) -> Iterator[Problem]:
    try:
        block = settings.own_block
    except ValueError as error:
        yield "own_addresses", str(error)
        return
    if not block.is_loopback or block.num_addresses < 4:
        yield "own_addresses", "must be a block of at least four addresses within 127.0.0.0/8"


def _check_static(settings: Settings) -> Iterator[Problem]:
    for name, static in settings.static.items():
        try:
            ipaddress.ip_address(static.address)
        except ValueError as error:
            yield f"static.{name}.address", str(error)
        if (static.port is None) == (not static.ports):
            yield f"static.{name}", "needs either 'port' or 'ports', and not both"
    bindings = [
        (port, static.address, static.protocol, name)
        for name, static in settings.static.items()
        for port in static.endpoints.values()
    ]
    for (port, address, protocol, name), (other_port, other_address, other_protocol, other) in combinations(
        bindings, 2
    ):
        if (port, address) == (other_port, other_address) and (
            "both" in (protocol, other_protocol) or protocol == other_protocol
        ):
            later, earlier = max(name, other), min(name, other)
            key = "port" if settings.static[later].port is not None else "ports"
            yield f"static.{later}.{key}", f"{port} is static for {earlier} already"


def _check_services(settings: Settings) -> Iterator[Problem]:
    for name, service in settings.services.items():
        for user in service.users:
            if not re.fullmatch(r"@?[^\s@:]+|token:[a-z0-9-]+", user):
                yield f"services.{name}.users", f"{user!r} is not a user, a uid, @GROUP or token:NAME"


def _check_store(settings: Settings) -> Iterator[Problem]:
    if settings.store.path == "":
        yield "store.path", "must not be empty: leave it out for the default"
    if settings.store.history_mib_per_user > settings.store.history_mib:
        yield "store.history_mib_per_user", f"must not exceed history_mib ({settings.store.history_mib})"


def _check_health(settings: Settings) -> Iterator[Problem]:
    for command in settings.health.allow_commands:
        if not command.startswith("/"):
            yield "health.allow_commands", f"{command!r} is not an absolute path"


def _check_dns(settings: Settings) -> Iterator[Problem]:
    for address in _listed(settings.dns.listen):
        try:
            split_host_port(address)
        except ValueError as error:
            yield "dns.listen", str(error)
    zone = settings.dns.zone.removesuffix(".")
    if len(zone) > ZONE_MAX_CHARACTERS or not all(re.match(LABEL_PATTERN, label) for label in zone.lower().split(".")):
        yield "dns.zone", f"{zone!r} is not a domain name of 1 to {ZONE_MAX_CHARACTERS} characters"


def _check_compat(settings: Settings) -> Iterator[Problem]:
    compat = settings.compat
    for address in _listed(compat.consul):
        yield from _check_loopback("compat.consul", address)
    name = compat.portserver.removeprefix("@")
    if compat.portserver and (
        not name or len(name) > SOCKET_NAME_MAX_BYTES or (name[0] != "/" and name == compat.portserver)
    ):
        yield (
            "compat.portserver",
            f"{compat.portserver!r} is not @NAME or an absolute path of at most {SOCKET_NAME_MAX_BYTES} bytes",
        )
    if compat.grpc_port_server:
        yield from _check_loopback("compat.grpc_port_server", compat.grpc_port_server)


def _check_loopback(key: str, address: str) -> Iterator[Problem]:
    try:
        host, _ = split_host_port(address)
    except ValueError as error:
        yield key, str(error)
    else:
        if not ipaddress.ip_address(host).is_loopback:
            yield key, f"{host} is not a loopback address: its callers can't be identified"


def _check_cluster(settings: Settings) -> Iterator[Problem]:
    cluster = settings.cluster
    if not cluster.engine:
        if cluster != Cluster():
            yield "cluster.engine", 'must be set to "etcd" for the other settings of [cluster] to apply'
        return
    if not cluster.endpoints:
        yield "cluster.endpoints", 'needs the client URLs of etcd, like ["http://10.0.0.1:2379"]'
    for url in cluster.endpoints:
        if not re.fullmatch(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}/?", url):
            yield "cluster.endpoints", f"{url!r} is not http://HOST:PORT or https://HOST:PORT"
    if cluster.node and not re.match(LABEL_PATTERN, cluster.node):
        yield "cluster.node", f"{cluster.node!r} is not a name of 1 to 63 of a-z, 0-9 and '-'"
    if cluster.advertise:
        yield from _check_advertise(cluster.advertise)
    if bool(cluster.tls_cert) != bool(cluster.tls_key):
        yield "cluster.tls_cert", "tls_cert and tls_key go together"
    is_plain = any(url.startswith("http://") for url in cluster.endpoints)
    if is_plain and (cluster.tls_ca or cluster.tls_cert):
        yield "cluster.endpoints", "with tls_ca or tls_cert every URL must begin with https://"
    if bool(cluster.user) != bool(cluster.password_file):
        yield "cluster.user", "user and password_file go together"


def _check_advertise(advertise: str) -> Iterator[Problem]:
    try:
        address = ipaddress.ip_address(advertise)
    except ValueError:
        if not re.fullmatch(r"[^\s/:]{1,15}", advertise):
            yield "cluster.advertise", f"{advertise!r} is neither an address nor the name of an interface"
        return
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        yield "cluster.advertise", f"{advertise} is not an address that other hosts reach"


def _check_auth(settings: Settings) -> Iterator[Problem]:
    names = [token.name for token in settings.auth.tokens]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield "auth.tokens", f"two tokens are named {name!r}: a token's name is its user"


_CHECKS: Final[Sequence[Callable[[Settings], Iterator[Problem]]]] = (
    _check_listen,
    _check_pools,
    _check_own_addresses,
    _check_static,
    _check_services,
    _check_store,
    _check_health,
    _check_dns,
    _check_compat,
    _check_cluster,
    _check_auth,
)


def _line_of(text: str, key: str) -> str:
    """Return the line of a dotted key as ":LINE", or "" where it is not found."""
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
