"""The documents' types, for type checkers and readers: nothing here runs in a service.

All durations are seconds, all times RFC 3339 in UTC.
"""

from __future__ import annotations

from typing import Any, Literal, Required, TypedDict

Status = Literal["passing", "warning", "critical"]
Protocol = Literal["tcp", "udp", "both"]
Scope = Literal["local", "cluster", "lan", "all"]
Hold = Literal["shared", "exclusive", "none"]


class LeaseOptions(TypedDict, total=False):
    """What a program may request beside the service's name; None and absent both leave the default."""

    instance: str | None
    """The instance's name, a DNS label. By default the lowest free SERVICE-N."""
    endpoint: str
    """Which of the instance's ports this is, a DNS label. By default "main"."""
    protocol: Protocol
    """"tcp" (the default), "udp", or "both": the same number for the two."""
    address: str
    """What will be bound: an address of this host, "localhost", "0.0.0.0", "::", or "own" for a loopback address that
    no other instance has. By default "127.0.0.1"."""
    port: int | None
    """The preferred port, 1 to 65535. Another one is granted where it is taken, unless `exact`. By default the port
    that the instance had last, else any of the pool."""
    exact: bool
    """Accept no other port than `port`: PortTaken instead. By default False."""
    pool: str
    """The pool that the port comes from. By default "default"."""
    hold: Hold
    """How portd keeps the port until it is bound. "shared" (TCP's default): servers with SO_REUSEADDR can bind it;
    "exclusive": by handoff only; "none" (UDP's default): not at all."""
    ttl: float | None
    """Seconds after which the lease ends unless renewed, which happens in the background. By default the lease lives
    as long as this process."""
    tags: list[str]
    """Marks that look-ups can select by. By default none; with `metadata` at most 16 KiB."""
    metadata: dict[str, str]
    """What callers may know of the instance. By default empty."""
    weight: int
    """The instance's share of the callers, beside others of the same priority. By default 1."""
    priority: int
    """Callers use the instances of the lowest priority that serve. By default 0."""
    check: str | dict[str, Any] | None
    """How the instance is checked: a check of the API, or short: "tcp", "http:/healthz", "grpc:SERVICE", "listen",
    "report". By default not at all."""
    announce: bool | dict[str, Any]
    """Publish on the LAN (DNS-SD): True, or the announcement's `type`, `name` and `txt`. By default False."""


class LeaseRequest(TypedDict, total=False):
    """A lease request of the API; only `service` is required. The fields that LeaseOptions has mean the same here."""

    service: Required[str]
    instance: str
    endpoint: str
    protocol: Protocol
    address: str
    port: int | str | list[int | str]
    exact: bool
    adopt: bool
    """Lease `port` for the process that listens there now."""
    offset: int
    """In an array, not on its first lease: the port is the first lease's plus this."""
    pool: str
    hold: Hold
    pid: int
    """The process that the lease belongs to. By default the caller."""
    ttl: float
    tags: list[str]
    metadata: dict[str, str]
    weight: int
    priority: int
    check: dict[str, Any]
    announce: bool | dict[str, Any]


class LeaseChange(TypedDict, total=False):
    """The fields of a lease that can be replaced."""

    tags: list[str]
    metadata: dict[str, str]
    weight: int
    check: dict[str, Any] | None
    announce: bool | dict[str, Any] | None


class Owner(TypedDict):
    """The process that a lease belongs to; what the kernel or the caller's rights hide is None."""

    pid: int | None
    uid: int | None
    user: str | None
    exe: str | None
    cmdline: list[str] | None
    unit: str | None
    started_at: str | None
    known_by: Literal["peercred", "socket", "token"]


class LeaseDocument(TypedDict, total=False):
    """A lease as the daemon shows it."""

    id: Required[str]
    service: Required[str]
    instance: Required[str]
    endpoint: Required[str]
    protocol: Required[Protocol]
    address: Required[str]
    port: Required[int]
    pool: str
    hold: Hold
    state: Required[Literal["held", "bound", "conflict", "ended"]]
    listening: list[str]
    """The addresses at which the lease's own listeners are."""
    vouched_by: Literal["owner", "descendant", "unit", "token", "uid"] | None
    """Why a listener counts as the lease's own."""
    elsewhere: list[dict[str, Any]]
    """Other ports that the owner listens on, while this one is not listened on."""
    health: Required[Literal["passing", "warning", "critical", "unknown"]]
    health_note: str
    health_since: str | None
    checked_at: str | None
    drain: Required[bool]
    lifetime: Required[Literal["process", "ttl", "static"]]
    owner: Owner
    uid: int | None
    """The owner's user at the grant: rights and quota go by it."""
    tags: list[str]
    metadata: dict[str, str]
    weight: int
    priority: int
    check: dict[str, Any] | None
    announce: dict[str, Any] | None
    host: str
    created_at: str
    renewed_at: str | None
    expires_at: str | None
    ended_at: str | None
    ended_because: Literal["released", "owner_exited", "expired", "revoked", "host_rebooted"] | None
    revision: int
    token: str
    """Whoever shows it may change the lease. In the answer to a grant alone."""


class LeaseFilters(TypedDict, total=False):
    """What a list of leases is narrowed by."""

    service: str | None
    instance: str | None
    endpoint: str | None
    protocol: Protocol | None
    port: int | None
    pid: int | None
    uid: int | None
    pool: str | None
    state: Literal["held", "bound", "conflict", "ended"] | None
    health: Literal["passing", "warning", "critical", "unknown"] | None
    tag: str | list[str] | None
    limit: int | None
    """Leases in one page. Pages follow one another by themselves."""


class ServiceFilters(TypedDict, total=False):
    """Which instances of a service are returned, and whether the call waits for them."""

    serving: bool | None
    """Only those that serve."""
    passing: bool | None
    """Another name of `serving`."""
    health: Literal["passing", "warning", "critical", "unknown"] | None
    held: bool | None
    """Those that nobody listens on yet, too."""
    tag: str | list[str] | None
    """Only those that have all of these tags."""
    endpoint: str
    scope: Scope | None
    min: int | None
    """Wait until that many instances serve."""
    after: int | str | None
    """Wait for a change after this revision, which may be written STORE:REVISION."""
    wait: float | None
    """Seconds to wait at most."""


class Instances(TypedDict):
    """The instances of a service, as of a revision."""

    service: str
    revision: int
    instances: list[LeaseDocument]


class ServiceSummary(TypedDict):
    """A service's name, and how many of its instances are how."""

    name: str
    instances: int
    passing: int
    warning: int
    critical: int
    unknown: int


class ServicePage(TypedDict):
    """One page of services; `next` is the cursor of the following one."""

    services: list[ServiceSummary]
    next: str | None


class LeasePage(TypedDict):
    """One page of leases; `next` is the cursor of the following one."""

    leases: list[LeaseDocument]
    next: str | None


class Listener(TypedDict, total=False):
    """A socket on a port; what the kernel hides is None."""

    address: str
    socket: Literal["listening", "bound", "connected"]
    pid: int | None
    uid: int | None
    user: str | None
    exe: str | None
    cmdline: list[str] | None
    unit: str | None


class PortView(TypedDict, total=False):
    """Who has a port, per the kernel and per the lease table."""

    port: Required[int]
    protocol: Required[Literal["tcp", "udp"]]
    verdict: Required[
        Literal["held", "bound", "conflict", "unmanaged", "taken", "cooling", "declined", "static", "free"]
    ]
    lease: LeaseDocument | None
    left_over_of: LeaseDocument | None
    listeners: list[Listener]


class LanService(TypedDict):
    """A DNS-SD service that was seen on the LAN."""

    type: str
    name: str
    host: str
    addresses: list[str]
    port: int
    txt: dict[str, str]
    ours: bool


class Host(TypedDict):
    """A host of the cluster."""

    host: str
    address: str
    version: str
    services: int
    instances: int
    seen: str
    self: bool
