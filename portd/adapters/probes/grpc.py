"""The `grpc` check: the standard health protocol, `grpc.health.v1.Health/Check`.

HTTP/2 is spoken by h2 (pure Python, sans I/O), not by grpcio: that brings 20 MB, threads and a loop of its own, for one
unary call with two messages that are a field each. Those are coded here by hand.
Sources: doc/health-checking.md and doc/PROTOCOL-HTTP2.md of github.com/grpc/grpc; the encoding guide of protobuf.dev.
"""

from __future__ import annotations

from typing import Final

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

from portd.adapters.probes.connection import Target, Trust, opened
from portd.adapters.probes.results import USER_AGENT, CheckResult, ProbeFailed, note
from portd.core.model import GrpcCheck

PATH: Final = "/grpc.health.v1.Health/Check"
SERVING: Final = 1
STATUS_NAMES: Final = {0: "UNKNOWN", SERVING: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
ANSWER_MAX_BYTES: Final = 64 * 1024
"""A whole answer is 100 bytes, with settings and headers 500. Beyond this it is no health check's answer."""
SETTINGS: Final = 4
FRAME_TYPE_AT: Final = 3
"""A server's first frame is SETTINGS (RFC 9113 sections 3.4 and 4.1)."""
NO_HTTP2: Final = "no HTTP/2 answer: is this a gRPC port, and is TLS set as the server has it?"
_CONFIG: Final = H2Configuration(client_side=True, header_encoding="utf-8")
_STREAM: Final = 1


async def probe(target: Target, check: GrpcCheck, trust: Trust | None) -> CheckResult:
    """Call once. Raises ProbeFailed or OSError when there is no proper answer; the caller sets the time-out."""
    async with opened(target, trust) as connection:
        call = HealthCall(target.authority, check, scheme="http" if trust is None else "https")
        received_bytes = 0
        while not call.is_over:
            connection.send(call.data_to_send())
            data = await connection.receive()
            received_bytes += len(data)
            if not data:
                raise ProbeFailed("the connection was closed without an answer")
            if received_bytes > ANSWER_MAX_BYTES:
                raise ProbeFailed("the answer is too large to be one")
            call.receive(data)
        return call.result()


class HealthCall:
    """One call of the health service on one connection, without its I/O."""

    def __init__(self, peer: str, check: GrpcCheck, *, scheme: str = "http") -> None:
        self._http2 = H2Connection(_CONFIG)
        self._http2.local_settings[SettingCodes.ENABLE_PUSH] = 0
        self._http2.initiate_connection()
        self._http2.send_headers(
            _STREAM,
            [
                (":method", "POST"),
                (":scheme", scheme),
                (":path", PATH),
                (":authority", peer),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("user-agent", USER_AGENT),
                ("grpc-timeout", f"{round(check.timeout * 1000)}m"),
            ],
        )
        self._http2.send_data(_STREAM, encode_request(check.service), end_stream=True)
        self._headers: dict[str, str] = {}
        self._message = bytearray()
        self._is_open = False
        self.is_over = False

    def data_to_send(self) -> bytes:
        """Return the bytes to send now."""
        return self._http2.data_to_send()

    def receive(self, data: bytes) -> None:
        """Parse what the server sent; raises ProbeFailed when it is not HTTP/2."""
        if not self._is_open and len(data) > FRAME_TYPE_AT:
            if data[FRAME_TYPE_AT] != SETTINGS:  # h2 would wait for the rest of a frame that is none
                raise ProbeFailed(NO_HTTP2)
            self._is_open = True
        try:
            for event in self._http2.receive_data(data):
                self._on_event(event)
        except (ProtocolError, UnicodeDecodeError) as error:
            raise ProbeFailed(NO_HTTP2) from error

    def _on_event(self, event: Event) -> None:
        match event:
            case ResponseReceived() | TrailersReceived():
                self._headers.update((str(name), str(value)) for name, value in event.headers or ())
            case DataReceived():
                self._message += event.data or b""
            case StreamEnded():
                self.is_over = True
            case StreamReset() | ConnectionTerminated() if not self.is_over:
                raise ProbeFailed(f"the server broke the call off (HTTP/2 error {int(event.error_code or 0)})")

    def result(self) -> CheckResult:
        """Judge the answer once the call is over."""
        status = self._headers.get("grpc-status")
        if status is None:
            raise ProbeFailed(f"no gRPC answer: HTTP status {self._headers.get(':status')}")
        if status != "0":
            return CheckResult("critical", note(f"grpc-status {status}: {self._headers.get('grpc-message', '')}"))
        serving = decode_response(bytes(self._message))
        return CheckResult(
            "passing" if serving == SERVING else "critical", STATUS_NAMES.get(serving, f"status {serving}")
        )


def encode_request(service: str) -> bytes:
    """Encode HealthCheckRequest {string service = 1}, uncompressed, behind its length."""
    name = service.encode()
    message = b"\x0a" + _varint(len(name)) + name if name else b""
    return b"\0" + len(message).to_bytes(4, "big") + message


def decode_response(data: bytes) -> int:
    """Decode HealthCheckResponse {ServingStatus status = 1}; a status that is left out is 0. Raises ProbeFailed."""
    message = data[5:]
    if len(data) < 5 or data[0] != 0 or int.from_bytes(data[1:5], "big") != len(message):
        raise ProbeFailed("the gRPC message is cut off or compressed")
    if not message:
        return 0
    if len(message) != 2 or message[0] != 0x08 or message[1] > 0x7F:
        raise ProbeFailed("the gRPC message is no HealthCheckResponse")
    return message[1]


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))
