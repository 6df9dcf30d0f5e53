"""The documents' types, for type checkers and readers: nothing here runs in a service."""

from __future__ import annotations

from typing import Any, Literal, Required, TypedDict

Status = Literal["passing", "warning", "critical"]
Protocol = Literal["tcp", "udp", "both"]
Scope = Literal["local", "cluster", "lan", "all"]


class LeaseOptions(TypedDict, total=False):
    """What an application may say about a lease beside the service's name. Durations are seconds.

    `check` may be written short: "tcp", "http:/healthz".
    """

    instance: str | None
    endpoint: str
    protocol: Literal["tcp", "udp", "both"]
    address: str
    port: int | None
    exact: bool
    pool: str
    hold: Literal["shared", "exclusive", "none"]
    ttl: float | None
    tags: list[str]
    metadata: dict[str, str]
    check: str | dict[str, Any] | None
    announce: bool | dict[str, Any]


class LeaseRequest(TypedDict, total=False):
    """A request for one lease; only `service` is required. Durations are seconds."""

    service: Required[str]
    instance: str
    endpoint: str
    protocol: Protocol
    address: str
    port: int
    exact: bool
    pool: str
    hold: Literal["shared", "exclusive", "none"]
    pid: int
    ttl: float
    tags: list[str]
    metadata: dict[str, str]
    check: dict[str, Any]
    announce: bool | dict[str, Any]


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
    """A lease as the daemon shows it. Times are RFC 3339 in UTC. `token` is there once, in the answer to a grant."""

    id: Required[str]
    service: Required[str]
    instance: Required[str]
    endpoint: Required[str]
    protocol: Required[Protocol]
    address: Required[str]
    port: Required[int]
    pool: str
    hold: Literal["shared", "exclusive", "none"]
    state: Required[Literal["held", "bound", "conflict", "ended"]]
    health: Required[Literal["passing", "warning", "critical", "unknown"]]
    drain: Required[bool]
    lifetime: Required[Literal["process", "ttl", "static"]]
    owner: Owner
    tags: list[str]
    metadata: dict[str, str]
    check: dict[str, Any] | None
    announce: dict[str, Any] | None
    host: str
    created_at: str
    renewed_at: str | None
    expires_at: str | None
    ended_at: str | None
    ended_because: str | None
    revision: int
    token: str


class Instances(TypedDict):
    """The instances of a service, as of a revision."""

    service: str
    revision: int
    instances: list[LeaseDocument]
