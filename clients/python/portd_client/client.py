"""The sync client: one connection a call, so that a daemon's restart between two calls is nothing to recover from.

It uses the C half of the socket module: `import socket` costs 8 ms for names of constants that nobody needs here.
"""

from __future__ import annotations

import _socket
import os
from time import monotonic

from . import calls, endpoints, peers
from .errors import DaemonUnavailable, NoAnswerInTime, ProtocolError
from .protocol import EventReader, Request, ResponseReader, result

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from .endpoints import Endpoint
    from .protocol import ServerEvent
    from .types import Instances, LeaseDocument, LeaseRequest

TIMEOUT_S = 10.0
"""Seconds that a call may take: twice what the daemon itself gives its disk."""
SILENCE_S = 60.0
"""Seconds without a byte after which a stream of events counts as dead: the daemon breaks the silence every 15."""
READ_BYTES = 65536


class Client:
    """Speaks to one daemon. Every call raises Problem when the daemon says no, DaemonUnavailable when none answers.

    `url` is what PORTD_URL may say; None looks where the contract says. `token` is a bearer token, None takes
    PORTD_TOKEN unless that belongs to the lease of PORTD_LEASE. Threads may share a client.
    """

    def __init__(self, url: str | None = None, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        environ = os.environ
        self._candidates = [endpoints.parse(url)] if url else endpoints.candidates(environ, os.getuid())
        self._token = token if token is not None or "PORTD_LEASE" in environ else environ.get("PORTD_TOKEN")
        self._timeout_s = timeout_s

    @property
    def endpoint(self) -> Endpoint:
        """Return the place that answered last, or that is tried first."""
        return self._candidates[0]

    @property
    def url(self) -> str:
        """Return that place as PORTD_URL writes it."""
        return self.endpoint.url

    # --- the calls of the API ---

    def grant(self, wish: LeaseRequest) -> LeaseDocument:
        """Lease one port. The answer carries the lease's `token`, this once."""
        return self.call(calls.grant(wish))  # type: ignore[no-any-return]

    def grant_all(self, wishes: Sequence[LeaseRequest]) -> list[LeaseDocument]:
        """Lease several ports, all or none."""
        return self.call(calls.grant(wishes))  # type: ignore[no-any-return]

    def leases(self, **filters: Any) -> Iterator[LeaseDocument]:
        """Yield the leases that fit all filters, page after page."""
        while True:
            page = self.call(calls.leases(**filters))
            yield from page["leases"]
            if page["next"] is None:
                return
            filters["cursor"] = page["next"]

    def lease(self, lease_id: str) -> LeaseDocument:
        """Return one lease."""
        return self.call(calls.lease(lease_id))  # type: ignore[no-any-return]

    def service(self, name: str, **filters: Any) -> Instances:
        """Return a service's instances; with `after` and `wait` (seconds), once something changes."""
        return self.call(  # type: ignore[no-any-return]
            calls.service(name, **filters),
            timeout_s=self._timeout_s + float(filters.get("wait") or 0),
        )

    def call(self, request: Request, *, timeout_s: float | None = None) -> Any:
        """Make any call of `portd_client.calls`, and return its decoded answer (None where there is no body)."""
        reader, parts = ResponseReader(), []
        for part in self._receive(request, reader, self._timeout_s if timeout_s is None else timeout_s):
            parts.append(part)
            reader.check_size()
        return result(reader.status, reader.headers.get("content-type", ""), b"".join(parts))

    def events(self, after: int | None = None, service: str | None = None) -> Iterator[ServerEvent]:
        """Follow events until the daemon hangs up (ProtocolError or the end). RevisionGone is Problem `revision_gone`.

        `after` is the last revision that is known; None starts now.
        """
        reader, events, problem = ResponseReader(), EventReader(), b""
        for part in self._receive(calls.events(after, service), reader, SILENCE_S, accept="text/event-stream"):
            if reader.status == 200:
                yield from events.feed(part)
            else:
                problem += part
        if reader.status != 200:
            result(reader.status, reader.headers.get("content-type", ""), problem)

    # --- the way there ---

    def _receive(
        self, request: Request, reader: ResponseReader, timeout_s: float, accept: str = "application/json"
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
