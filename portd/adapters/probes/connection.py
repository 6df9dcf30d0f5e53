"""A bounded connection to a checked service, plain or over TLS.

A service may be anybody's: whatever it sends, a check costs a bounded number of bytes, and the loop gets its turn
between any two reads. This module must not know what a check asks.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

from portd.adapters.probes.results import ProbeFailed, describe

READ_BYTES: Final = 16 * 1024
RECEIVED_MAX_BYTES: Final = 256 * 1024
"""What one check receives at most: a head of 64 KB, a body of 64 KB and its framing fit twice over."""


class Target(NamedTuple):
    """Where a check goes: an address and a port of the lease's own instance."""

    host: str
    port: int

    @property
    def authority(self) -> str:
        """Return the target as `host:port` (RFC 3986 section 3.2)."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Trust(NamedTuple):
    """TLS for one connection: the context, and the name that is sent as SNI and must be in the certificate."""

    context: ssl.SSLContext
    server_name: str | None


class Connection:
    """An open connection. `receive` raises ProbeFailed beyond RECEIVED_MAX_BYTES; the caller sets the time-out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._received_bytes = 0

    def send(self, data: bytes) -> None:
        """Send, without waiting: a request is a few kilobytes. Raises ConnectionResetError when the peer is gone."""
        if self._writer.is_closing():
            raise ConnectionResetError
        self._writer.write(data)

    async def receive(self) -> bytes:
        """Return what has come, b"" at the end; raises OSError where the connection breaks."""
        data = await self._reader.read(READ_BYTES)
        self._received_bytes += len(data)
        if self._received_bytes > RECEIVED_MAX_BYTES:
            raise ProbeFailed(f"the answer has more than {RECEIVED_MAX_BYTES // 1024} KB")
        await asyncio.sleep(0)  # data that is there already is read without a pause: others get their turn here
        return data


@asynccontextmanager
async def opened(target: Target, trust: Trust | None = None) -> AsyncIterator[Connection]:
    """Connect, and hang up at the end without waiting for the peer. Raises ProbeFailed or OSError.

    A port of the kernel's ephemeral range may be chosen for our own end: then we talk to ourselves (a simultaneous
    open, RFC 9293 section 3.5), and nobody listens.
    """
    try:
        reader, writer = await asyncio.open_connection(
            *target,
            limit=READ_BYTES,
            ssl=None if trust is None else trust.context,
            server_hostname=None if trust is None else trust.server_name or target.host,
        )
    except ssl.SSLCertVerificationError as error:
        raise ProbeFailed(f"certificate verify failed: {error.verify_message or describe(error)}") from error
    except ssl.SSLError as error:
        raise ProbeFailed(f"no TLS connection: {describe(error)}") from error
    except ssl.CertificateError as error:
        raise ProbeFailed(f"certificate verify failed: {describe(error)}") from error
    try:
        if writer.get_extra_info("sockname") == writer.get_extra_info("peername"):
            raise ConnectionRefusedError
        yield Connection(reader, writer)
    except ssl.SSLError as error:  # TLS 1.3 servers refuse a client certificate after the handshake
        raise ProbeFailed(f"the TLS connection broke: {describe(error)}") from error
    finally:
        writer.transport.abort()
