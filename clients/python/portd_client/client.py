"""The sync client: one connection a call, so that a daemon's restart between two calls is nothing to recover from.

It uses the C half of the socket module: `import socket` costs 8 ms for names of constants that nobody needs here.
"""

from __future__ import annotations

import _socket
import os
from time import monotonic

from . import calls, endpoints, peers
from .errors import DaemonUnavailable, NoAnswerInTime, ProtocolError
from .protocol import EventReader, ResponseReader, result

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Literal, TypeVar, Unpack

    from .endpoints import Endpoint
    from .lookup import AllLookupOptions, Instance, LookupOptions, WatchOptions
    from .protocol import Event, Request
    from .types import (
        Host,
        Instances,
        LanService,
        LeaseChange,
        LeaseDocument,
        LeaseFilters,
        LeasePage,
        LeaseRequest,
        PortView,
        ServiceFilters,
        ServicePage,
        ServiceSummary,
        Status,
    )

    T = TypeVar("T")

TIMEOUT_S = 10.0
"""Seconds that a call may take: twice what the daemon itself gives its disk."""
SILENCE_S = 60.0
"""Seconds without a byte after which a stream of events counts as dead: the daemon breaks the silence every 15."""
READ_BYTES = 65536


class Client:
    """Speaks to one daemon. Every call raises Problem when the daemon refuses, DaemonUnavailable when none answers.

    `url` is what PORTD_URL may contain; None tries PORTD_URL, else the user's socket, the system's socket, and
    http://127.0.0.1:7783. `token` is a bearer token; None uses PORTD_TOKEN, unless that belongs to the lease of
    PORTD_LEASE. `timeout_s` bounds each call, in seconds. Threads may share a client.

    Before it sends anything it checks that root, the user `portd` or this user is at the other end.
    """

    def __init__(self, url: str | None = None, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        environ = os.environ
        self._candidates = [endpoints.parse(url)] if url else endpoints.candidates(environ, os.geteuid())
        self._token = token if token is not None or "PORTD_LEASE" in environ else environ.get("PORTD_TOKEN")
        self._timeout_s = timeout_s

    @property
    def endpoint(self) -> Endpoint:
        """Return the endpoint that answered last, or that is tried first."""
        return self._candidates[0]

    @property
    def timeout_s(self) -> float:
        """Return the seconds that a call may take, beside what it waits for."""
        return self._timeout_s

    @property
    def url(self) -> str:
        """Return that endpoint as PORTD_URL writes it."""
        return self.endpoint.url

    # --- the calls of the API ---

    def grant(self, request: LeaseRequest, *, wait_s: float | None = None) -> LeaseDocument:
        """Request one lease. The answer carries the lease's `token`, this once.

        The daemon waits up to `wait_s` seconds for an exact port, the instance's previous one, or any.
        """
        found: LeaseDocument = self.call(calls.grant(request, wait_s), timeout_s=self._waiting(wait_s))
        return found

    def grant_all(self, requests: Sequence[LeaseRequest], *, wait_s: float | None = None) -> list[LeaseDocument]:
        """Request several leases, all or none."""
        found: list[LeaseDocument] = self.call(calls.grant(requests, wait_s), timeout_s=self._waiting(wait_s))
        return found

    def leases(self, **filters: Unpack[LeaseFilters]) -> Iterator[LeaseDocument]:
        """Yield the leases that match all filters, page after page."""
        cursor = None
        while True:
            page: LeasePage = self.call(calls.leases(**filters, cursor=cursor))
            yield from page["leases"]
            if (cursor := page["next"]) is None:
                return

    def lease(self, lease_id: str) -> LeaseDocument:
        """Return one lease, an ended one too while the daemon remembers it; raises LeaseLost."""
        return self.call(calls.lease(lease_id))

    def renew(self, lease_id: str, seconds: float | None = None, *, token: str | None = None) -> LeaseDocument:
        """Restart the clock of a ttl lease; `seconds` is a new period, None keeps the last one."""
        return self.call(calls.renew(lease_id, seconds, token))

    def decline(self, lease_id: str, *, token: str | None = None) -> LeaseDocument:
        """Request another port under the same lease: somebody else has this one."""
        return self.call(calls.decline(lease_id, token))

    def drain(self, lease_id: str, on: bool = True, *, token: str | None = None) -> LeaseDocument:
        """Take an instance out of look-ups while it keeps its ports; `on=False` brings it back."""
        return self.call(calls.drain(lease_id, on, token))

    def transfer(self, lease_id: str, pid: int, *, token: str | None = None) -> LeaseDocument:
        """Hand a lease over to another process of this host."""
        return self.call(calls.transfer(lease_id, pid, token))

    def change(self, lease_id: str, fields: LeaseChange, *, token: str | None = None) -> LeaseDocument:
        """Replace a lease's tags, metadata, weight, check or announcement."""
        return self.call(calls.change(lease_id, fields, token))

    def report(self, lease_id: str, status: Status, note: str = "", *, token: str | None = None) -> LeaseDocument:
        """Report health, for a lease whose check is `report`."""
        return self.call(calls.report(lease_id, status, note, token))

    def release(self, lease_id: str, *, token: str | None = None) -> None:
        """Release a lease; one that has ended stays so."""
        self.call(calls.release(lease_id, token))

    def ports(self) -> list[PortView]:
        """Return every port of the host that is leased, static, cooling or listened on."""
        found: list[PortView] = self.call(calls.ports())["ports"]
        return found

    def port(self, number: int, protocol: Literal["tcp", "udp"] | None = None) -> PortView:
        """Return who has a port, per the kernel and per the lease table; None is TCP."""
        found: PortView = self.call(calls.port(number, protocol))
        return found

    def history(self, number: int, at: str | None = None) -> list[LeaseDocument]:
        """Return who had a port, newest first; `at` (RFC 3339) selects one moment."""
        found: list[LeaseDocument] = self.call(calls.history(number, at))["leases"]
        return found

    def services(self) -> Iterator[ServiceSummary]:
        """Yield the services' names with counts by health, page after page."""
        cursor = None
        while True:
            page: ServicePage = self.call(calls.services(cursor=cursor))
            yield from page["services"]
            if (cursor := page.get("next")) is None:
                return

    def service(self, name: str, **filters: Unpack[ServiceFilters]) -> Instances:
        """Return a service's instances; with `wait` (seconds) and `after` or `min`, once there is what it waits for."""
        return self.call(calls.service(name, **filters), timeout_s=self._waiting(filters.get("wait")))

    def lan(self, type: str | None = None) -> list[LanService]:
        """Return the DNS-SD services seen on the LAN; `type` selects one, as "_http._tcp"."""
        found: list[LanService] = self.call(calls.lan(type))["services"]
        return found

    def hosts(self) -> list[Host]:
        """Return the hosts of the cluster."""
        return self.call(calls.hosts())

    def status(self) -> dict[str, Any]:
        """Return the daemon's condition: version, pools, counts, warnings."""
        return self.call(calls.status())

    def events(self, after: int | None = None, service: str | None = None) -> Iterator[Event]:
        """Follow events until the daemon closes the stream (ProtocolError or the end).

        `after` is the last revision that is known; None starts now. Raises Problem `revision_gone` when the daemon does
        not keep what followed that revision: list again, then follow.
        """
        reader, events, problem = ResponseReader(), EventReader(), b""
        for part in self._receive(calls.events(after, service), reader, SILENCE_S, accept="text/event-stream"):
            if reader.status == 200:
                yield from events.feed(part)
            else:
                problem += part
        if reader.status != 200:
            result(reader.status, reader.headers.get("content-type", ""), problem)

    def call(self, request: Request[T], *, timeout_s: float | None = None) -> T:
        """Make any call of `portd_client.calls`, and return its decoded answer (None where there is no body)."""
        return self.exchange(request, timeout_s=timeout_s)[0]

    def exchange(self, request: Request[T], *, timeout_s: float | None = None) -> tuple[T, dict[str, str]]:
        """Make any call, and return its decoded answer and its header fields, whose names are in lower case."""
        reader, parts = ResponseReader(), []
        for part in self._receive(request, reader, self._timeout_s if timeout_s is None else timeout_s):
            parts.append(part)
            reader.check_size()
        answer = result(reader.status, reader.headers.get("content-type", ""), b"".join(parts))
        return answer, reader.headers

    # --- look-ups ---

    def resolve(self, service: str, **options: Unpack[LookupOptions]) -> Instance:
        """Return one instance that serves; see `portd_client.resolve`."""
        from .lookup import resolve

        return resolve(service, client=self, **options)

    def resolve_all(self, service: str, **options: Unpack[AllLookupOptions]) -> list[Instance]:
        """Return all instances that serve; see `portd_client.resolve_all`."""
        from .lookup import resolve_all

        return resolve_all(service, client=self, **options)

    def watch(self, service: str, **options: Unpack[WatchOptions]) -> Iterator[list[Instance]]:
        """Yield the instances that serve, whenever they change; see `portd_client.watch`."""
        from .lookup import watch

        return watch(service, client=self, **options)

    # --- connections ---

    def _waiting(self, wait_s: float | None) -> float:
        """Return the time-out of a call that the daemon may hold back for `wait_s` seconds."""
        return self._timeout_s + float(wait_s or 0)

    def _receive(
        self, request: Request[Any], reader: ResponseReader, timeout_s: float, accept: str = "application/json"
    ) -> Iterator[bytes]:
        """Send a request and yield the body as it comes; `timeout_s` bounds each silence, and a whole call."""
        connection, endpoint = self._connect(min(timeout_s, self._timeout_s))
        deadline = None if accept == "text/event-stream" else monotonic() + timeout_s
        try:
            connection.sendall(request.render(endpoint.authority, self._token, accept))
            while not reader.is_complete:
                connection.settimeout(timeout_s if deadline is None else max(deadline - monotonic(), 0.001))
                reader.feed(connection.recv(READ_BYTES))
                if part := reader.take():
                    yield part
        except TimeoutError:
            raise NoAnswerInTime(endpoint.url, timeout_s) from None
        except OSError as error:
            raise ProtocolError(f"{endpoint.url}: the connection broke: {error}") from error
        finally:
            connection.close()

    def _connect(self, timeout_s: float) -> tuple[Any, Endpoint]:
        tried = []
        for endpoint in self._candidates:
            try:
                connection = _open(endpoint, timeout_s)
            except OSError as error:
                tried.append((endpoint.url, reason(error)))
                continue
            self._candidates = [endpoint, *(other for other in self._candidates if other is not endpoint)]
            return connection, endpoint
        raise DaemonUnavailable(tried)


def reason(error: OSError) -> str:
    """Say in a few words why a connection failed."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def _open(endpoint: Endpoint, timeout_s: float) -> Any:
    """Connect to one place; raises OSError when nobody is there, or somebody who is not portd."""
    if endpoint.tls:
        return _open_tls(endpoint, timeout_s)
    if endpoint.path:
        peers.check_directory(endpoint)
        return _connected(_socket.AF_UNIX, endpoint.path, timeout_s, peers.check_unix)
    failure: OSError | None = None
    host = endpoint.host.encode() if endpoint.host.isascii() else endpoint.host  # a str would load the IDNA codec: 5 ms
    for family, _, _, _, address in _socket.getaddrinfo(host, endpoint.port, 0, _socket.SOCK_STREAM):
        try:
            listener = peers.LoopbackCheck(*address[:2])
            return _connected(family, address, timeout_s, listener.check)
        except OSError as error:
            failure = error
    raise failure or OSError(f"{endpoint.host} has no address")


def _connected(family: int, address: Any, timeout_s: float, check: Callable[[Any], None]) -> Any:
    connection = _socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(timeout_s)
        connection.connect(address)
        check(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _open_tls(endpoint: Endpoint, timeout_s: float) -> Any:
    import socket
    import ssl

    plain = socket.create_connection((endpoint.host, endpoint.port), timeout_s)
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=endpoint.host)
    except BaseException:
        plain.close()
        raise
