"""The nouns of portd, and nothing else.

Every noun is immutable: a change makes a new one, so whoever holds an old one holds history, not a moving target.
This module must not know how nouns are stored, shown or sent. Wall times (`*_at`) are seconds since the epoch;
`tick` values are seconds on the lease clock, which stands still while the daemon does.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

Protocol = Literal["tcp", "udp", "both"]
HoldKind = Literal["shared", "exclusive", "none"]
State = Literal["held", "bound", "conflict", "ended"]
Health = Literal["passing", "warning", "critical", "unknown"]
Lifetime = Literal["process", "ttl", "static"]
EndedBecause = Literal["released", "owner_exited", "expired", "revoked", "host_rebooted"]
KnownBy = Literal["peercred", "socket", "token"]
VouchedBy = Literal["owner", "descendant", "unit", "token", "uid"]
"""Which rule made a listener the lease's own: see `core.ownership`."""

LABEL_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"
"""A DNS label (RFC 1123 section 2.1): services, instances and endpoints become host names."""
Label = Annotated[str, Meta(pattern=LABEL_PATTERN, min_length=1, max_length=63)]
PortNumber = Annotated[int, Meta(ge=1, le=65535)]

OWN_ADDRESS = "own"
"""The `address` that requests a loopback address of the instance's own."""
MAIN_ENDPOINT = "main"


class Now(Struct, frozen=True, gc=False):
    """One reading of the clock: `at` for people (epoch seconds), `tick` for deadlines (lease-clock seconds)."""

    at: float
    tick: float


class ProcessId(Struct, frozen=True, gc=False):
    """What distinguishes a process from every other one that ever had its pid.

    `start_ticks` is field 22 of /proc/PID/stat (10 ms ticks since boot); `inode` is the pidfd's inode where pidfs
    numbers processes (Linux 6.9 and up), else 0, and distinguishes two processes that started within one tick.
    """

    pid: int
    start_ticks: int
    boot_id: str
    inode: int = 0


class Owner(Struct, frozen=True, gc=False, kw_only=True):
    """The process that a lease belongs to, as far as the kernel lets portd see it: what it hides is None.

    `unit_path` is the control group of its systemd unit: a user's own unit may have the name of the system's. No view
    shows it.
    """

    pid: int | None = None
    uid: int | None = None
    user: str | None = None
    exe: str | None = None
    cmdline: tuple[str, ...] | None = None
    unit: str | None = None
    started_at: float | None = None
    known_by: KnownBy
    unit_path: str | None = None


Seconds = Annotated[float, Meta(ge=0.05, le=86400)]
Threshold = Annotated[int, Meta(ge=1, le=100)]
HeaderValue = Annotated[str, Meta(max_length=1024, pattern=r"^[\t\x20-\x7e]*\Z")]
HeaderName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z", max_length=128)]


CHECK_TIMEOUT_MAX_S: Final = 60.0
"""The longest time-out of a check, in seconds: a check that hangs occupies a slot of its user for as long."""


class CheckTiming(Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What all checks have; `rise` and `fall` count results, all else is in seconds.

    Until the first pass a check runs every `start_interval`, then less and less often, down to every `interval`.
    """

    interval: Seconds = 10.0
    timeout: Annotated[float, Meta(ge=0.05, le=CHECK_TIMEOUT_MAX_S)] = 2.0
    rise: Threshold = 2
    fall: Threshold = 3
    start_period: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    start_interval: Seconds = 0.2


ServerName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]+\Z", max_length=253)]
FilePath = Annotated[str, Meta(pattern=r"^/[^\x00-\x1f]*\Z", max_length=1024)]


class Tls(Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """How a check speaks TLS. `server_name` is sent as SNI and must be in the certificate (None: the address is
    checked, and nothing is sent); `ca` is a PEM file that is trusted instead of the host's own authorities; `cert` and
    `key` are the client's. Files are read with the rights of the lease's user."""

    server_name: ServerName | None = None
    ca: FilePath | None = None
    cert: FilePath | None = None
    key: FilePath | None = None
    verify: bool = True


class ConnectCheck(CheckTiming, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """A check that connects to the service: with TLS where `tls` is true or an object, whose fields may also stand
    beside it; to another `endpoint` of the same instance where one is named."""

    endpoint: Label | None = None
    tls: bool | Tls = False
    server_name: ServerName | None = None
    ca: FilePath | None = None
    cert: FilePath | None = None
    key: FilePath | None = None
    verify: bool = True

    @property
    def security(self) -> Tls | None:
        """Return how to speak TLS, from both spellings; None for a plain connection."""
        given = self.tls if isinstance(self.tls, Tls) else Tls()
        return (
            Tls(
                server_name=given.server_name or self.server_name,
                ca=given.ca or self.ca,
                cert=given.cert or self.cert,
                key=given.key or self.key,
                verify=given.verify and self.verify,
            )
            if self.tls
            else None
        )


class HttpCheck(ConnectCheck, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True, tag="http"):
    """GET (or `method`) `path` on the lease's own address and port: 2xx or `expect_status` passes, 429 warns."""

    path: Annotated[str, Meta(pattern=r"^/[\x21-\x7e]*\Z", max_length=2048)] = "/"
    method: Literal["GET", "HEAD", "POST", "OPTIONS"] = "GET"
    headers: Annotated[dict[HeaderName, HeaderValue], Meta(max_length=32)] = {}
    expect_status: Annotated[tuple[Annotated[int, Meta(ge=100, le=599)], ...], Meta(max_length=32)] = ()
    expect_body: Annotated[str, Meta(max_length=1024)] | None = None
    tls_verify: bool = True


class TcpCheck(ConnectCheck, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True, tag="tcp"):
    """The port accepts a connection; with TLS, the handshake succeeds too."""


class GrpcCheck(ConnectCheck, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True, tag="grpc"):
    """The standard gRPC health protocol says SERVING for `service` ("" is the whole server)."""

    service: Annotated[str, Meta(max_length=256)] = ""


class ListenCheck(CheckTiming, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True, tag="listen"):
    """The kernel says that the owner listens: no traffic at all."""


class ReportCheck(CheckTiming, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True, tag="report"):
    """The service reports by itself, at least once in `ttl` seconds; silence is critical. A report counts at once."""

    rise: Threshold = 1
    fall: Threshold = 1
    ttl: Seconds = 30.0


class CommandCheck(CheckTiming, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True, tag="command"):
    """A program from the configuration's allow-list exits 0 (passing), 1 (warning) or else (critical)."""

    command: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=1024)], ...], Meta(min_length=1, max_length=32)
    ]


Check = HttpCheck | TcpCheck | GrpcCheck | ListenCheck | ReportCheck | CommandCheck


class Announcement(Struct, frozen=True, gc=False, kw_only=True):
    """A lease's DNS-SD service on the LAN: the request, and its result.

    `name` is the requested name; `published_as` is the name that was claimed on the LAN (None while nothing is
    published); `problem` says in one sentence why nothing is, or why the name differs.
    """

    type: str
    name: str
    txt: dict[str, str] = {}
    published_as: str | None = None
    problem: str | None = None


class Elsewhere(Struct, frozen=True, gc=False):
    """A port that a lease's owner listens on while it does not listen on the leased one."""

    address: str
    port: int


class Lease(Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """The right of one owner to one (protocol, address, port) of this host.

    `uid` is the user of the process at the grant: it never changes, and rights and quotas go by it. `owner` describes
    the process as it is now: it may have changed its user and its program since. `listening` are the addresses at
    which its own listeners are, `vouched_by` the rule that made them its own, `elsewhere` the other ports that the
    owner listens on while this one is not listened on. `workspace` is the directory of the work tree that the service
    was started in, `branch` the branch that is checked out there. `weight` and `priority` are those of its SRV
    records (RFC 2782).

    The fields below the line never leave the daemon: no view of a lease shows them. `kin` are processes that are known
    to be its own, as (pid, start ticks): see `core.ownership`. `passed_from` is the owner before the last `passed`,
    `moved_from` the port before the last `declined`.
    What has its default is not stored: a default never changes, or the leases of older stores would change with it.
    """

    id: str
    service: str
    instance: str
    endpoint: str
    protocol: Protocol
    address: str
    port: int
    pool: str
    hold: HoldKind
    state: State = "held"
    health: Health = "unknown"
    health_note: str = ""
    health_since: float | None = None
    drain: bool = False
    listening: tuple[str, ...] = ()
    vouched_by: VouchedBy | None = None
    elsewhere: tuple[Elsewhere, ...] = ()
    lifetime: Lifetime
    owner: Owner
    uid: int | None = None
    tags: tuple[str, ...] = ()
    metadata: dict[str, str] = {}
    weight: int = 1
    priority: int = 0
    check: Check | None = None
    announce: Announcement | None = None
    workspace: str | None = None
    branch: str | None = None
    host: str
    created_at: float
    renewed_at: float | None = None
    ended_at: float | None = None
    ended_because: EndedBecause | None = None
    revision: int = 0
    # --- never shown ---
    process: ProcessId | None = None
    token_hash: bytes = b""
    ttl: float | None = None
    exact: bool = False
    port_requested: bool = False
    own_address: bool = False
    token_name: str | None = None
    foreign: Owner | None = None
    kin: tuple[tuple[int, int], ...] = ()
    passed_from: Owner | None = None
    moved_from: int | None = None

    @property
    def name(self) -> tuple[str, str, str]:
        """Return what identifies the endpoint among all: (service, instance, endpoint)."""
        return (self.service, self.instance, self.endpoint)

    @property
    def is_stint(self) -> bool:
        """Return whether this is no lease but the time that a lease had a port before it moved to another one."""
        return self.ended_at is not None and self.ended_because is None

    @property
    def user(self) -> int | str | None:
        """Return whose the lease is, for names and quotas: a uid, or `token:NAME` for a token of the configuration."""
        return self.uid if self.token_name is None else f"token:{self.token_name}"

    @property
    def protocols(self) -> tuple[Literal["tcp", "udp"], ...]:
        """Return the kernel's protocols that this lease covers."""
        return ("tcp", "udp") if self.protocol == "both" else (self.protocol,)


EventType = Literal[
    "granted",
    "bound",
    "unbound",
    "conflict",
    "declined",
    "draining",
    "undrained",
    "updated",
    "health",
    "announced",
    "passed",
    "ended",
]


class Event(Struct, frozen=True, gc=False):
    """One visible change: the lease as it is after it. Revisions only grow, across restarts too."""

    revision: int
    type: EventType
    at: float
    lease: Lease


class Listener(Struct, frozen=True, gc=False):
    """A socket that the kernel says is listening (TCP) or bound (UDP): `inode` names the socket, `uid` its creator."""

    protocol: Literal["tcp", "udp"]
    address: str
    port: int
    uid: int
    inode: int
    v6only: bool = True


def encode_lease(lease: Lease) -> bytes:
    """Encode a lease whole, secrets too, for the store alone."""
    return _lease_encoder.encode(lease)


def decode_lease(data: bytes) -> Lease:
    """Decode what `encode_lease` made; raises msgspec.DecodeError on anything else.

    Stores written before leases had a uid of their own know the owner's only; in older ones checks may have a time-out
    beyond CHECK_TIMEOUT_MAX_S, which is cut.
    """
    try:
        lease = _lease_decoder.decode(data)
    except msgspec.ValidationError:
        lease = msgspec.convert(_with_timeout_cut(msgspec.msgpack.decode(data)), Lease)
    if lease.uid is None and lease.owner.uid is not None:
        return msgspec.structs.replace(lease, uid=lease.owner.uid)
    return lease


def _with_timeout_cut(stored: Any) -> Any:
    check = stored.get("check") if isinstance(stored, dict) else None
    if isinstance(check, dict) and isinstance(timeout := check.get("timeout"), float | int):
        check["timeout"] = min(timeout, CHECK_TIMEOUT_MAX_S)
    return stored


_lease_encoder = msgspec.msgpack.Encoder()
_lease_decoder = msgspec.msgpack.Decoder(Lease)
