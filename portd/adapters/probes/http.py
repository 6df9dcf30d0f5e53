"""The `http` check, plain and over TLS.

Every check opens a connection of its own, and hangs up first. A kept one would prove nothing about `accept`, would
occupy a worker of a server that has few, cost a descriptor a service at either end, and still lead to the old process
after the port has changed hands; `Connection: close` would leave the TIME_WAIT on the service's own port, where it
keeps the next start from binding without SO_REUSEADDR. It costs 0.15 ms more than a kept one (0.35 ms in all).
No redirect is followed: a 3xx is judged by its status as any other.
"""

from __future__ import annotations

import ssl
from functools import cached_property
from types import TracebackType
from typing import Final

import aiohttp
from yarl import URL

from portd.adapters.probes.finding import USER_AGENT, Finding, ProbeFailed, authority, describe, note
from portd.core.model import HttpCheck, Lease

BODY_MAX_BYTES: Final = 64 * 1024
"""How much of a body is read: enough for any page that says how a service is. What comes after it is not waited for."""
HEADERS: Final = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", "Connection": "keep-alive"}
"""What every request says, unless its check says otherwise; beside it Host and Accept."""
TOO_MANY_REQUESTS: Final = 429
"""RFC 6585 section 4: the service works, and has enough to do."""


class HttpProbe:
    """The client of all HTTP checks: no cookies, no proxies, no credentials; nothing of the daemon's goes out."""

    async def __aenter__(self) -> HttpProbe:
        connector = aiohttp.TCPConnector(limit=0, force_close=True, use_dns_cache=False, happy_eyeballs_delay=None)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(),
            read_bufsize=BODY_MAX_BYTES,
            headers=HEADERS,
            skip_auto_headers=("Content-Type",),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def probe(self, lease: Lease, check: HttpCheck) -> Finding:
        """Ask once. Raises ProbeFailed or OSError when there is no proper answer; the caller sets the time-out."""
        try:
            async with self._session.request(
                check.method, _url(lease, check), headers=check.headers, allow_redirects=False, ssl=self._trust(check)
            ) as response:
                return judge(check, response.status, response.reason or "", await _beginning(response.content))
        except aiohttp.ClientConnectorCertificateError as error:
            raise ProbeFailed(describe(error.certificate_error)) from error
        except aiohttp.ClientConnectorError as error:
            raise ProbeFailed(describe(error.os_error)) from error
        except aiohttp.ServerDisconnectedError as error:
            raise ProbeFailed("the connection was closed without an answer") from error
        except aiohttp.ClientPayloadError as error:
            raise ProbeFailed("the answer broke off") from error
        except aiohttp.ClientResponseError as error:
            raise ProbeFailed(f"no HTTP answer: {note(error.message)}") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise ProbeFailed(describe(error)) from error

    def _trust(self, check: HttpCheck) -> ssl.SSLContext | bool:
        """Say whom the client trusts: aiohttp's False trusts anybody."""
        return self._verifying if check.tls and check.tls_verify else False

    @cached_property
    def _verifying(self) -> ssl.SSLContext:
        """The host's own trust; read when first needed: it takes 20 ms, and most checks are plain."""
        return ssl.create_default_context()


def judge(check: HttpCheck, status: int, reason: str, body: bytes) -> Finding:
    """Judge an answer by its status and the beginning of its body."""
    line = f"{status} {reason}".strip()
    is_expected = status in check.expect_status if check.expect_status else 200 <= status < 300
    if not is_expected:
        text = note(f"{line}: ".encode() + body) if body else note(line)
        return Finding("warning" if status == TOO_MANY_REQUESTS else "critical", text)
    if check.expect_body is not None and check.expect_body.encode() not in body:
        return Finding("critical", note(f"{line}, but its first {len(body)} bytes lack {check.expect_body!r}"))
    return Finding("passing", note(line))


def _url(lease: Lease, check: HttpCheck) -> URL:
    """Build the URL with the path exactly as it was given: what it means is the service's to say."""
    path, _, query = check.path.partition("?")
    return URL.build(
        scheme="https" if check.tls else "http", authority=authority(lease), path=path, query_string=query, encoded=True
    )


async def _beginning(content: aiohttp.StreamReader) -> bytes:
    body = bytearray()
    while len(body) < BODY_MAX_BYTES and (chunk := await content.readany()):
        body += chunk
    return bytes(body[:BODY_MAX_BYTES])
