"""etcd's JSON gateway (v3 API, etcd 3.4 and newer): one member, spoken to over HTTP.

Numbers of 64 bits are strings in its JSON, zeros are left out, keys and values are base64. This module must not know
what the keys mean.
"""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import aiohttp
import msgspec

CALL_TIMEOUT_S: Final = 1.0
"""Seconds that a member has to answer: beyond them another one is tried. A call takes milliseconds."""
READ_TIMEOUT_S: Final = 10.0
"""Seconds for a page of a read, which etcd renders whole."""
PAGE_KEYS: Final = 2_000
"""Keys of one page of a read: about 1 MB."""
LINE_MAX_BYTES: Final = 64 << 20
"""The longest message of a watch: all changes of one revision."""
_LEASE_NOT_FOUND: Final = 5
_OUT_OF_RANGE: Final = 11
_UNAUTHENTICATED: Final = 16


class EtcdError(Exception):
    """A member did not do what it was asked for; the message says why."""


class LeaseGone(EtcdError):
    """The lease has expired or was revoked."""


class Compacted(EtcdError):
    """The changes from that revision on are not kept."""


class Entry(NamedTuple):
    """A key of etcd: its value, the revision that wrote it, and the lease that it belongs to (0: none)."""

    key: str
    value: bytes
    mod_revision: int
    lease_id: int


class Header(NamedTuple):
    """What every answer says of the cluster."""

    cluster_id: int
    revision: int


class WatchNews(NamedTuple):
    """Changes of one watch, by revision; none when the watch has just been created."""

    watch_id: int
    header: Header
    changes: tuple[tuple[int, str, bytes | None], ...]


class Login(NamedTuple):
    """How portd identifies itself; `ssl_context` None is plain HTTP or the system's authorities."""

    ssl_context: ssl.SSLContext | None = None
    user: str = ""
    password: str = ""


class Gateway:
    """A connection pool to one member. Every call raises EtcdError, within CALL_TIMEOUT_S unless it reads pages."""

    def __init__(self, url: str, login: Login) -> None:
        self.url = url.rstrip("/")
        self._login = login
        self._token: str | None = None
        connector = aiohttp.TCPConnector(ssl=login.ssl_context or True)
        self._http = aiohttp.ClientSession(connector=connector, auto_decompress=False)

    async def close(self) -> None:
        """Close every connection."""
        await self._http.close()

    # --- keys ---

    async def get(self, key: str) -> tuple[Header, Entry | None]:
        """Read one key, linearizably: a member that has lost the others does not answer."""
        found = await self._call("kv/range", {"key": _b64(key)})
        entries = [_entry(kv) for kv in found.get("kvs", ())]
        return _header(found), entries[0] if entries else None

    async def read(self, prefix: str) -> tuple[Header, dict[str, bytes]]:
        """Read all keys with a prefix, as of one revision, a page at a time."""
        found: dict[str, bytes] = {}
        first: Header | None = None
        start, end = prefix.encode(), _after_prefix(prefix)
        while True:
            body = {"key": _b64(start), "range_end": _b64(end), "limit": PAGE_KEYS}
            if first is not None:
                body["revision"] = first.revision
            answer = await self._call("kv/range", body, READ_TIMEOUT_S)
            first = first or _header(answer)
            entries = [_entry(kv) for kv in answer.get("kvs", ())]
            found.update((entry.key, entry.value) for entry in entries)
            if not answer.get("more") or not entries:
                return first, found
            start = entries[-1].key.encode() + b"\0"

    async def write(
        self, lease_id: int, changes: Iterable[tuple[str, bytes | None]], compare: tuple[str, str, int]
    ) -> tuple[bool, int]:
        """Put keys under a lease, and delete those without a value, in one transaction, if a comparison holds.

        `compare` is (key, "MOD" or "CREATE", revision), 0 for a key that does not exist. Returns whether it was
        applied, and at which revision. Raises LeaseGone.
        """
        key, target, revision = compare
        operations: list[dict[str, Any]] = []
        for changed, value in changes:
            if value is None:
                operations.append({"request_delete_range": {"key": _b64(changed)}})
            else:
                put = {"key": _b64(changed), "value": _b64(value), "lease": str(lease_id)}
                operations.append({"request_put": put})
        condition = {"key": _b64(key), "target": target, f"{target.lower()}_revision": str(revision)}
        answer = await self._call("kv/txn", {"compare": [condition], "success": operations})
        return bool(answer.get("succeeded")), _header(answer).revision

    # --- leases ---

    async def grant(self, ttl_s: int) -> int:
        """Take a lease of so many seconds; returns its id."""
        return int((await self._call("lease/grant", {"TTL": ttl_s}))["ID"])

    async def keep_alive(self, lease_id: int) -> int | None:
        """Renew a lease; returns its seconds, None where it is gone (etcd answers 200 without a TTL)."""
        answer = (await self._call("lease/keepalive", {"ID": str(lease_id)})).get("result", {})
        return int(answer.get("TTL", 0)) or None

    async def keys_of(self, lease_id: int) -> list[str]:
        """Return the keys that belong to a lease."""
        answer = await self._call("lease/timetolive", {"ID": str(lease_id), "keys": True}, READ_TIMEOUT_S)
        return [_text(key) for key in answer.get("keys", ())]

    async def status(self) -> Mapping[str, Any]:
        """Return the member's status: version, dbSize, leader."""
        return await self._call("maintenance/status", {})

    # --- watches ---

    async def watch(self, starts: Sequence[tuple[str, int]]) -> AsyncIterator[WatchNews]:
        """Watch prefixes, each from a revision on; a watch's id is its place in `starts`, from 1.

        The gateway accepts several watches of one connection only in one body. Raises Compacted, and EtcdError when the
        stream ends: a watch that ends says nothing about the keys.
        """
        body = b"\n".join(
            msgspec.json.encode(
                {
                    "create_request": {
                        "key": _b64(prefix),
                        "range_end": _b64(_after_prefix(prefix)),
                        "start_revision": str(revision),
                        "watch_id": str(number),
                        "progress_notify": True,
                    }
                }
            )
            for number, (prefix, revision) in enumerate(starts, 1)
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_TIMEOUT_S)
        try:
            async with self._http.post(
                f"{self.url}/v3/watch", data=body, timeout=timeout, headers=await self._headers()
            ) as response:
                if response.status != 200:
                    raise self._refusal(response.status, await response.read())
                buffered = bytearray()
                async for piece in response.content.iter_any():
                    buffered += piece
                    if len(buffered) > LINE_MAX_BYTES:
                        raise EtcdError(f"{self.url} sends a message of more than {LINE_MAX_BYTES} bytes")
                    *lines, rest = buffered.split(b"\n")
                    buffered = bytearray(rest)
                    for line in filter(None, lines):
                        yield _news(bytes(line))
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
            raise EtcdError(f"{self.url}: the watch failed: {_reason(error)}") from error
        raise EtcdError(f"{self.url}: the watch ended")

    # --- calls ---

    async def _call(self, path: str, body: Any, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        status, data = await self._post(path, body, timeout_s, await self._headers())
        if status == 401 and self._login.user:  # the token has expired: etcd keeps one for 300 s by default
            self._token = None
            status, data = await self._post(path, body, timeout_s, await self._headers())
        if status != 200:
            raise self._refusal(status, data)
        return self._decode(data)

    async def _headers(self) -> dict[str, str]:
        if not self._login.user:
            return {}
        if self._token is None:
            body = {"name": self._login.user, "password": self._login.password}
            status, data = await self._post("auth/authenticate", body, CALL_TIMEOUT_S, {})
            if status != 200:
                raise self._refusal(status, data)
            self._token = str(self._decode(data).get("token", ""))
        return {"Authorization": self._token}

    async def _post(self, path: str, body: Any, timeout_s: float, headers: dict[str, str]) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                async with self._http.post(
                    f"{self.url}/v3/{path}", data=msgspec.json.encode(body), headers=headers, allow_redirects=False
                ) as response:
                    return response.status, await response.read()
        except TimeoutError:
            raise EtcdError(f"{self.url} has not answered for {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EtcdError(f"{self.url} can't be reached: {_reason(error)}") from error

    def _decode(self, data: bytes) -> dict[str, Any]:
        try:
            decoded = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            decoded = None
        if not isinstance(decoded, dict):
            raise EtcdError(f"{self.url} does not answer in JSON: is it etcd's client URL?")
        return decoded

    def _refusal(self, status: int, data: bytes) -> EtcdError:
        """Return what a refusal means, as an error that says what to do."""
        try:
            answer = self._decode(data)
        except EtcdError:
            if status == 404:
                return EtcdError(
                    f"{self.url} has no JSON gateway: start etcd without --enable-grpc-gateway=false, and give its "
                    "client URL"
                )
            return EtcdError(f"{self.url} answers with HTTP status {status}: is it etcd's client URL?")
        message, code = str(answer.get("message") or answer.get("error") or status), answer.get("code")
        if code == _LEASE_NOT_FOUND and "lease" in message:
            return LeaseGone(message)
        if code == _OUT_OF_RANGE or "compacted" in message:
            return Compacted(message)
        if "commonname" in message.lower():
            return EtcdError(
                f"{self.url}: {message}: with authentication on, etcd's gateway refuses client certificates that have "
                "a CN: use one without, and set user and password_file"
            )
        if code == _UNAUTHENTICATED or "authentication" in message or "user name is empty" in message:
            return EtcdError(f"{self.url}: {message}: check [cluster] user and password_file")
        return EtcdError(f"{self.url}: {message}")


def _news(line: bytes) -> WatchNews:
    """Decode a message of a watch; raises Compacted or EtcdError where it was canceled."""
    message = msgspec.json.decode(line)
    if "error" in message:
        raise EtcdError(f"the watch failed: {message['error'].get('message', 'unknown')}")
    result = message["result"]
    if result.get("canceled"):
        if "compact_revision" in result:
            raise Compacted(f"changes up to revision {result['compact_revision']} are not kept")
        raise EtcdError(f"the watch was canceled: {result.get('cancel_reason', 'no reason given')}")
    changes = tuple(
        (
            int(event["kv"]["mod_revision"]),
            _text(event["kv"]["key"]),
            None if event.get("type") == "DELETE" else b64decode(event["kv"].get("value", "")),
        )
        for event in result.get("events", ())
    )
    return WatchNews(int(result.get("watch_id", 0)), _header(result), changes)


def _header(answer: Mapping[str, Any]) -> Header:
    header = answer.get("header", {})
    return Header(int(header.get("cluster_id", 0)), int(header.get("revision", 0)))


def _entry(kv: Mapping[str, Any]) -> Entry:
    return Entry(_text(kv["key"]), b64decode(kv.get("value", "")), int(kv["mod_revision"]), int(kv.get("lease", 0)))


def _text(encoded: str) -> str:
    return b64decode(encoded).decode(errors="replace")


def _b64(value: str | bytes) -> str:
    return b64encode(value.encode() if isinstance(value, str) else value).decode()


def _after_prefix(prefix: str) -> bytes:
    """Return the first key after all that have a prefix (it ends with '/')."""
    raw = prefix.encode()
    return raw[:-1] + bytes((raw[-1] + 1,))


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
