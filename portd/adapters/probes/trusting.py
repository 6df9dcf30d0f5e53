"""Whom a check trusts over TLS, and the certificate that it shows: contexts made of the check's PEM files.

The files are named by whoever leases a port, so they are read by a program with that user's rights, never by the
daemon: a key that only the daemon can read proves the daemon's identity, not the user's.
"""

from __future__ import annotations

import os
import ssl
from collections import OrderedDict
from typing import Final, NamedTuple

from portd.adapters.probes.command import PATH, Run
from portd.adapters.probes.connection import Trust
from portd.adapters.probes.launching import Launcher, Rights, rights_of
from portd.adapters.probes.results import ProbeFailed, describe, note
from portd.core.model import ConnectCheck, HttpCheck, Lease, Tls
from portd.leasing.seams import Clock

CONTEXTS_KEPT: Final = 256
"""Contexts kept for the next check: one with the host's own authorities takes 20 ms and 600 KB to make."""
CONTEXT_KEPT_S: Final = 60.0
"""After so many seconds the files are read again: a renewed certificate counts within a minute."""
FILE_MAX_BYTES: Final = 256 * 1024
"""The host's whole bundle of authorities has about 200 KB."""


class _Kept(NamedTuple):
    context: ssl.SSLContext
    until: float


class TrustStore:
    """The contexts of all checks."""

    def __init__(self, clock: Clock, launcher: Launcher) -> None:
        self._clock = clock
        self._launcher = launcher
        self._kept: OrderedDict[tuple[int | None, Tls, tuple[str, ...]], _Kept] = OrderedDict()

    async def find(self, lease: Lease, check: ConnectCheck, alpn: tuple[str, ...] = ()) -> Trust | None:
        """Return how to speak TLS with the service, or None for a plain connection; raises ProbeFailed."""
        tls = check.security
        if tls is None:
            return None
        verify = tls.verify and not (isinstance(check, HttpCheck) and not check.tls_verify)
        server_name = tls.server_name or (_host_header(check) if isinstance(check, HttpCheck) else None)
        tls = Tls(ca=tls.ca, cert=tls.cert, key=tls.key, verify=verify)
        has_files = tls.ca or tls.cert
        key = (lease.uid if has_files else None, tls, alpn)
        now = self._clock.now().tick
        kept = self._kept.get(key)
        if kept is None or kept.until <= now:
            kept = self._kept[key] = _Kept(await self._make(lease.uid, tls, alpn), now + CONTEXT_KEPT_S)
            if len(self._kept) > CONTEXTS_KEPT:
                self._kept.popitem(last=False)
        return Trust(kept.context, server_name)

    async def _make(self, uid: int | None, tls: Tls, alpn: tuple[str, ...]) -> ssl.SSLContext:
        authorities = None if tls.ca is None else await self._read(tls.ca, _reader_of_authorities(uid))
        own = b""
        if tls.cert is not None:
            for path in (tls.cert, tls.key) if tls.key is not None else (tls.cert,):
                own += await self._read(path, rights_of(uid)) + b"\n"
        try:
            return make_context(tls, authorities, own, alpn)
        except (ssl.SSLError, ValueError) as error:
            raise ProbeFailed(f"the certificate files of the check can't be used: {describe(error)}") from error

    async def _read(self, path: str, rights: Rights) -> bytes:
        async with Run(("/bin/cat", "--", path), {"PATH": PATH}, rights, self._launcher, FILE_MAX_BYTES) as run:
            if await run.exit_status():
                raise ProbeFailed(f"can't read {path} as the user of the lease: {note(run.output[:200])}")
            return run.output


def make_context(tls: Tls, authorities: bytes | None, own: bytes, alpn: tuple[str, ...]) -> ssl.SSLContext:
    """Make a client's context; raises ssl.SSLError or ValueError for what is no PEM, or does not go together."""
    context = ssl.create_default_context(cadata=None if authorities is None else authorities.decode("ascii"))
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if own:
        memory = os.memfd_create("portd-check")  # `ssl` reads a certificate from a file alone
        try:
            os.write(memory, own)
            # Without a password OpenSSL asks for one on the terminal.
            context.load_cert_chain(f"/proc/self/fd/{memory}", password=lambda: b"-")
        finally:
            os.close(memory)
    return context


def _reader_of_authorities(uid: int | None) -> Rights:
    """Say as whom a file of authorities is read. It holds no secret, and nothing of it is shown: where the daemon can't
    become the user, its own user reads it, without its capabilities."""
    try:
        return rights_of(uid)
    except ProbeFailed:
        if os.geteuid() == 0:
            raise
        return Rights()


def _host_header(check: HttpCheck) -> str | None:
    """Return the host that the check's own Host header names."""
    value = next((value for name, value in check.headers.items() if name.lower() == "host"), "")
    host = value.strip().partition(":")[0]
    return host or None
