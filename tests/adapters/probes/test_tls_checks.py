"""TLS in checks: the name that is sent, whom a check trusts, the certificate that it shows, for every kind that
connects."""

from __future__ import annotations

import asyncio
import os
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from portd.core.model import Check, GrpcCheck, HttpCheck, Owner, TcpCheck, Tls
from tests.support.certificates import issue

NAME = "orders.example.com"
MINE = Owner(uid=os.getuid(), known_by="peercred")


class Files(NamedTuple):
    """A private authority, a server's certificate for NAME, and a client's."""

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    home = tmp_path_factory.mktemp("authority")
    authority = home / "ca.pem", home / "ca.key"
    issue(*authority, "ca", "basicConstraints = critical, CA:TRUE")
    server, client = (home / "server.pem", home / "server.key"), (home / "client.pem", home / "client.key")
    issue(*server, "server", f"subjectAltName = DNS:{NAME}", ca=authority)
    issue(*client, "client", "extendedKeyUsage = clientAuth", ca=authority)
    return Files(authority[0], *server, *client)


def server_context(files: Files, *, wants_client: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    if wants_client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(files.ca)
    return context


def tls(files: Files, **more: Any) -> Any:
    return {"tls": True, "server_name": NAME, "ca": str(files.ca), **more}


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if await reader.readuntil(b"\r\n\r\n"):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.read()


@pytest.mark.parametrize("kind", [HttpCheck, TcpCheck])
@pytest.mark.parametrize(
    ("change", "result"),
    [
        ({}, "passing"),
        ({"server_name": "other.example.com"}, "critical"),
        ({"server_name": None}, "critical"),  # the certificate has no address
        ({"ca": None}, "critical"),
        ({"ca": None, "verify": False}, "passing"),
        ({"ca": "/nowhere.pem"}, "critical"),
        ({"ca": "/etc/hostname"}, "critical"),
    ],
)
def test_name_and_authority_decide_whether_a_service_is_trusted(
    run: Any, bed: Any, service: Any, files: Files, kind: Any, change: Any, result: str
) -> None:
    async def scenario() -> None:
        async with service(answer, ssl=server_context(files)) as port, bed() as prober:
            assert (await prober.result(kind(**{**tls(files), **change}), port, owner=MINE))[0] == result

    run(scenario())


@pytest.mark.parametrize(
    "check",
    [
        HttpCheck(tls=Tls(server_name=NAME, verify=False)),
        HttpCheck(tls=True, verify=False, headers={"Host": NAME}),
        TcpCheck(tls=True, verify=False, server_name=NAME),
    ],
)
def test_configured_name_is_sent_to_a_server_that_demands_one(
    run: Any, bed: Any, service: Any, files: Files, check: Check
) -> None:
    context = server_context(files)
    seen: list[str | None] = []

    def demand(connection: Any, name: str | None, _: Any) -> int | None:
        seen.append(name)
        return None if name == NAME else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    context.sni_callback = demand

    async def scenario() -> None:
        async with service(answer, ssl=context) as port, bed() as prober:
            assert (await prober.result(check, port, owner=MINE))[0] == "passing"
            assert set(seen) == {NAME}

    run(scenario())


@pytest.mark.parametrize("has_certificate", [True, False])
def test_client_certificate_is_shown_where_configured(
    run: Any, bed: Any, service: Any, files: Files, has_certificate: bool
) -> None:
    own = {"cert": str(files.client_cert), "key": str(files.client_key)} if has_certificate else {}

    async def scenario() -> None:
        async with service(answer, ssl=server_context(files, wants_client=True)) as port, bed() as prober:
            result = await prober.result(HttpCheck(**tls(files, **own)), port, owner=MINE)
            assert result[0] == ("passing" if has_certificate else "critical")

    run(scenario())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become the user of a lease")
def test_files_are_read_with_rights_of_lease_s_user(run: Any, bed: Any, service: Any, files: Files) -> None:
    async def scenario() -> None:
        async with service(answer, ssl=server_context(files)) as port, bed() as prober:
            check = HttpCheck(**tls(files, cert=str(files.client_cert), key=str(files.client_key)))
            result, note = await prober.result(check, port, owner=Owner(uid=65534, known_by="peercred"))
            assert result == "critical"  # pytest's directories are root's alone
            assert "as the user of the lease" in note

    run(scenario())


@pytest.mark.parametrize(
    ("change", "result"), [({}, "passing"), ({"ca": None}, "critical"), ({"tls": False}, "critical")]
)
def test_grpc_health_is_checked_over_tls(run: Any, bed: Any, files: Files, change: Any, result: str) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    pair = (files.key.read_bytes(), files.cert.read_bytes())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()

    async def scenario() -> None:
        async with bed() as prober:
            check = GrpcCheck(**{**tls(files), **change})
            assert (await prober.result(check, port, owner=MINE))[0] == result

    try:
        run(scenario())
    finally:
        server.stop(None).wait()
