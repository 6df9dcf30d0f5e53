"""HTTP/1.1 (RFC 9112) and server-sent events, as far as portd speaks them, without any I/O.

Bytes go in, answers come out: the sync and the asyncio client share every line here. This module must not know sockets,
time, or what the calls mean.
"""

from __future__ import annotations

from . import documents
from .errors import ProtocolError, problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Generic, TypeVar

    T_co = TypeVar("T_co", covariant=True)

    class _Typed(Generic[T_co]):
        """Carries the type of a call's result; for type checkers alone, since importing typing costs 8 ms."""
else:
    T_co = None

    class _Typed:
        __slots__ = ()

        def __class_getitem__(cls, item):
            return cls


HEAD_MAX_BYTES = 64 * 1024
"""The longest head (status line and fields) that is read: portd's own are under 1 KB."""
BODY_MAX_BYTES = 64 * 1024 * 1024
"""The longest body that is gathered in memory: 10,000 leases are about 10 MB. Streams are not gathered."""


class Request(_Typed[T_co]):
    """One call: `target` is the path with its query; `body` is encoded as JSON, None means no body.

    `token` is the lease's own, and goes before the client's.
    """

    __slots__ = ("body", "method", "target", "token")

    def __init__(self, method: str, target: str, body: Any = None, token: str | None = None) -> None:
        self.method = method
        self.target = target
        self.body = body
        self.token = token

    def render(self, host: str, token: str | None = None, accept: str = "application/json") -> bytes:
        """Write the request; the lease's own token goes before the client's. Each connection serves one request."""
        data = b"" if self.body is None else documents.encode(self.body)
        lines = [f"{self.method} {self.target} HTTP/1.1", f"Host: {host}", f"Accept: {accept}", "Connection: close"]
        if bearer := self.token or token:
            lines.append(f"Authorization: Bearer {bearer}")
        if self.body is not None:
            lines.append("Content-Type: application/json")
        if self.body is not None or self.method in {"POST", "PUT", "PATCH"}:
            lines.append(f"Content-Length: {len(data)}")
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1:
            raise ValueError("a token, host or path with a line break in it")
        return head.encode("latin-1") + b"\r\n\r\n" + data


class ResponseReader:
    """Reads one response. Feed it bytes as they come, b"" at the end of the stream; take the body as it appears."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_complete = False
        self._data = bytearray()
        self._body = bytearray()
        self._left: int | None = None  # bytes of the body (or of this chunk) to come; None: until the stream ends
        self._chunked = False
        self._in_chunk = False

    def feed(self, data: bytes) -> None:
        """Receive bytes; raises ProtocolError when they are no response, or end before it does."""
        self._data += data
        if not self.status and not self._read_head():
            if not data:
                raise ProtocolError("the connection was closed before an answer came")
            return
        if self._chunked:
            self._read_chunks()
        elif not self.is_complete:
            self._read_plain(at_end=not data)
        if not data and not self.is_complete:
            raise ProtocolError("the connection was closed in the middle of an answer")

    def take(self) -> bytes:
        """Return the part of the body that came since the last call."""
        taken = bytes(self._body)
        self._body.clear()
        return taken

    def check_size(self) -> None:
        """Raise ProtocolError when the body is longer than fits into memory."""
        if len(self._body) > BODY_MAX_BYTES:
            raise ProtocolError(f"the answer is longer than {BODY_MAX_BYTES} bytes")

    def _read_head(self) -> bool:
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            if len(self._data) > HEAD_MAX_BYTES:
                raise ProtocolError("what answers does not speak HTTP")
            return False
        first, *fields = self._data[:end].decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise ProtocolError("what answers does not speak HTTP/1.1")
        del self._data[: end + 4]
        for field in fields:
            name, _, value = field.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        status = int(rest[:3])
        if 100 <= status < 200:  # an interim response: the real one follows (RFC 9110 section 15.2)
            self.headers.clear()
            return self._read_head()
        self.status = status
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        length = self.headers.get("content-length", "")
        if status in {204, 304}:
            self._left = 0
        elif length and not self._chunked:
            if not length.isdecimal():
                raise ProtocolError(f"a Content-Length of {length!r}")
            self._left = int(length)
        return True

    def _read_plain(self, *, at_end: bool) -> None:
        part = self._data[: self._left]
        del self._data[: len(part)]
        self._body += part
        if self._left is not None:
            self._left -= len(part)
        self.is_complete = self._left == 0 or (at_end and self._left is None)

    def _read_chunks(self) -> None:
        while self._data and not self.is_complete:
            if not self._in_chunk:
                end = self._data.find(b"\r\n")
                if end < 0:
                    if len(self._data) > HEAD_MAX_BYTES:
                        raise ProtocolError("a chunk without a length")
                    return
                try:
                    self._left = int(bytes(self._data[:end]).partition(b";")[0], 16)
                except ValueError:
                    raise ProtocolError("a chunk without a length") from None
                del self._data[: end + 2]
                self._in_chunk = True
                self.is_complete = self._left == 0  # trailers are not awaited: portd sends none
            assert self._left is not None
            part = self._data[: self._left]
            del self._data[: len(part)]
            self._body += part
            self._left -= len(part)
            if self._left or len(self._data) < 2:
                return
            del self._data[:2]
            self._in_chunk = False


def result(status: int, content_type: str, body: bytes) -> Any:
    """Decode a whole answer: JSON as Python values, no body as None; raises the Problem that it is."""
    is_json = "json" in content_type
    try:
        value = documents.decode(body) if is_json and body else None
    except (ValueError, UnicodeDecodeError) as error:
        raise ProtocolError(f"an answer that should be JSON is none: {error}") from None
    if status >= 400:
        raise problem(value if isinstance(value, dict) else {"detail": f"HTTP status {status}"}, status)
    return value if is_json else body or None


class Event:
    """One event of the daemon: what happened to which lease.

    `name` is its type ("granted", "bound", "health", "passed", "ended" and so on), `revision` its number, and `data`
    the whole document with `at`, `service`, `note` and `lease`.
    """

    __slots__ = ("data", "name", "revision")

    def __init__(self, name: str, data: dict[str, Any], revision: int) -> None:
        self.name = name
        self.data = data
        self.revision = revision

    def __repr__(self) -> str:
        return f"<portd event {self.revision}: {self.name} {self.data.get('service', '')}>"


class EventReader:
    """Splits a stream into server-sent events (WHATWG HTML, section 9.2.6), and decodes them. Comments vanish."""

    def __init__(self) -> None:
        self._data = b""
        self._revision = 0

    def feed(self, data: bytes) -> list[Event]:
        """Receive bytes, and return the events that they complete; raises ProtocolError for what is no event."""
        *blocks, self._data = (self._data + data).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._data) > BODY_MAX_BYTES:
            raise ProtocolError("an event that does not end")
        return [event for block in blocks if (event := self._event(block.decode("utf-8", "replace"))) is not None]

    def _event(self, block: str) -> Event | None:
        name, lines = "message", []
        for line in block.split("\n"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "data":
                lines.append(value)
            elif field == "event":
                name = value
            elif field == "id":
                if not value.isdecimal():
                    raise ProtocolError(f"an event with the id {value!r}, which is no revision")
                self._revision = int(value)
        if not lines:
            return None
        try:
            document = documents.decode("\n".join(lines).encode())
        except ValueError as error:
            raise ProtocolError(f"an event that is not JSON: {error}") from None
        return Event(name, document if isinstance(document, dict) else {}, self._revision)


def query(target: str, fields: Mapping[str, Any]) -> str:
    """Add a query to a path: None leaves a field out, a list repeats it, booleans are written as JSON writes them."""
    pairs = [
        (name, item)
        for name, value in fields.items()
        if value is not None
        for item in (value if isinstance(value, (list, tuple)) else (value,))
    ]
    return target + ("?" + "&".join(f"{name}={quote(_text(item))}" for name, item in pairs) if pairs else "")


def quote(text: str) -> str:
    """Percent-encode all but RFC 3986's unreserved characters (urllib.parse costs 8 ms to import)."""
    return "".join(chr(byte) if byte in _UNRESERVED else f"%{byte:02X}" for byte in text.encode())


_UNRESERVED = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~")


def _text(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)
