"""HTTP checks, against servers that behave and servers that don't."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portd import __version__
from portd.core.model import HttpCheck
from tests.support.certificates import issue


@pytest.mark.parametrize(
    ("status", "check", "result", "note"),
    [
        ("200 OK", HttpCheck(), "passing", "200 OK"),
        ("204 No Content", HttpCheck(), "passing", "204 No Content"),
        ("299 Odd", HttpCheck(), "passing", "299 Odd"),
        ("301 Moved Permanently", HttpCheck(), "critical", "301 Moved Permanently"),
        ("404 Not Found", HttpCheck(), "critical", "404 Not Found"),
        ("429 Too Many Requests", HttpCheck(), "warning", "429 Too Many Requests"),
        ("503 Service Unavailable", HttpCheck(), "critical", "503 Service Unavailable"),
        ("404 Not Found", HttpCheck(expect_status=(404, 410)), "passing", "404 Not Found"),
        ("200 OK", HttpCheck(expect_status=(204,)), "critical", "200 OK"),
        ("429 Too Many Requests", HttpCheck(expect_status=(200,)), "warning", "429 Too Many Requests"),
        ("429 Too Many Requests", HttpCheck(expect_status=(429,)), "passing", "429 Too Many Requests"),
        ("200 OK", HttpCheck(method="HEAD"), "passing", "200 OK"),
    ],
)
def test_the_status_decides(
    run: Any, bed: Any, service: Any, answers: Any, answer: Any, status: str, check: HttpCheck, result: str, note: str
) -> None:
    async def scenario() -> None:
        async with service(answers(answer(status))) as port, bed() as prober:
            assert await prober.result(check, port) == (result, note)

    run(scenario())


def test_a_failing_answer_is_noted_and_cut_at_4_kb(run: Any, bed: Any, service: Any, answers: Any, answer: Any) -> None:
    body = "no database: ü\x1b[31m\n".encode() + b"x" * 100_000

    async def scenario() -> None:
        async with service(answers(answer("500 Oops", body))) as port, bed() as prober:
            result, note = await prober.result(HttpCheck(), port)
            assert result == "critical"
            assert note.startswith("500 Oops: no database: ü\N{REPLACEMENT CHARACTER}[31m\nxxx")
            assert 4000 < len(note.encode()) <= 4096

    run(scenario())


@pytest.mark.parametrize(("lead", "result"), [(0, "passing"), (64 * 1024 - 5, "passing"), (64 * 1024 - 4, "critical")])
def test_a_body_is_searched_in_its_first_64_kb(
    run: Any, bed: Any, service: Any, answers: Any, answer: Any, lead: int, result: str
) -> None:
    async def scenario() -> None:
        async with service(answers(answer(body=b"-" * lead + b"ready" + b"-" * 9000))) as port, bed() as prober:
            assert (await prober.result(HttpCheck(expect_body="ready"), port))[0] == result

    run(scenario())


def test_an_endless_body_is_left_after_64_kb(run: Any, bed: Any, service: Any) -> None:
    gone = asyncio.Event()

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(b"ready" * 10_000)
                await writer.drain()
        except ConnectionError:
            gone.set()

    async def scenario() -> None:
        async with service(pour) as port, bed() as prober:
            assert (await prober.result(HttpCheck(expect_body="ready"), port))[0] == "passing"
            async with asyncio.timeout(10):
                await gone.wait()

    run(scenario())


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (b"", "the connection was closed without an answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "the answer broke off"),
        (b"HTTP/1.1 200 OK\r\nX-Huge: " + b"x" * 1_000_000 + b"\r\n\r\n", "no HTTP answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000 + b"\r\n", ""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", ""),
        (b"\x16\x03\x01\x00\xa5", ""),
    ],
)
def test_what_is_no_proper_answer_is_critical(run: Any, bed: Any, service: Any, data: bytes, note: str) -> None:
    async def blurt(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        await writer.drain()

    async def scenario() -> None:
        async with service(blurt) as port, bed() as prober:
            result, said = await prober.result(HttpCheck(timeout=5), port)
            assert result == "critical"
            assert note in said

    run(scenario())


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300),
    lead=st.sampled_from(
        [b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]
    ),
)
def test_no_answer_of_server_does_more_than_fail_check(bed: Any, service: Any, data: bytes, lead: bytes) -> None:
    async def blurt(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(lead + data)

    async def scenario() -> None:
        async with service(blurt) as port, bed() as prober:
            _, note = await prober.result(HttpCheck(timeout=5), port)
            assert "itself failed" not in note

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("start", "piece", "note"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "interim answers"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", "interim answers"),
        (b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", "too many pieces"),
        (b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;" + b"x" * 5000, ""),
        (b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Trailer: y\r\n", ""),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", "no HTTP answer"),
    ],
)
def test_every_flood_ends_its_check_within_bounds(
    run: Any, bed: Any, service: Any, start: bytes, piece: bytes, note: str
) -> None:
    sent_bytes = 0
    cut_off = asyncio.Event()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent_bytes
        await reader.readuntil(b"\r\n\r\n")
        writer.write(start)
        block = piece * (4096 // len(piece) + 1)
        try:
            while True:
                writer.write(block)
                await writer.drain()
                sent_bytes += len(block)
        finally:
            cut_off.set()

    async def scenario() -> None:
        async with service(flood) as port, bed() as prober:
            result, said = await prober.result(HttpCheck(timeout=60, interval=60), port)
            assert result == "critical"
            assert note in said
            await cut_off.wait()

    run(scenario())
    assert sent_bytes < 8_000_000  # what the check read, and what the kernel's buffers hold


def test_stream_without_an_end_passes_by_its_status(run: Any, bed: Any, service: Any) -> None:
    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nfirst\n")
        await reader.read()

    async def scenario() -> None:
        async with service(stream) as port, bed() as prober:
            assert await prober.result(HttpCheck(timeout=0.4), port) == ("passing", "200 OK")
            result = await prober.result(HttpCheck(timeout=0.4, expect_body="second"), port)
            assert result == ("critical", "no answer within 0.4 s")

    run(scenario())


def test_server_that_answers_by_byte_runs_into_time_out(run: Any, bed: Any, service: Any) -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True:  # until the peer has had enough
            writer.write(b"z")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def scenario() -> None:
        async with service(trickle) as port, bed() as prober:
            assert await prober.result(HttpCheck(timeout=0.2), port) == ("critical", "no answer within 0.2 s")

    run(scenario())


def test_a_redirect_is_judged_and_never_followed(run: Any, bed: Any, service: Any, answers: Any, answer: Any) -> None:
    visits: list[bytes] = []

    async def scenario() -> None:
        async with service(answers(answer(), seen=visits)) as other:
            moved = answer("302 Found", headers=f"Location: http://127.0.0.1:{other}/\r\n")
            async with service(answers(moved)) as port, bed() as prober:
                assert (await prober.result(HttpCheck(), port))[0] == "critical"
                assert (await prober.result(HttpCheck(expect_status=(302,)), port))[0] == "passing"

    run(scenario())
    assert visits == []


def test_request_is_as_asked_for_and_carries_nothing_of_daemon(
    run: Any, bed: Any, service: Any, answers: Any, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORTD_TOKEN", "secret-of-the-daemon")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1/")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    seen: list[bytes] = []
    check = HttpCheck(
        method="POST",
        path="//a%2Fb/../c?x=%20y&q#f",
        headers={
            "X-Probe": "1",
            "user-agent": "mine",
            "host": "orders.example",
        },
    )

    async def scenario() -> int:
        async with service(answers(answer(headers="Set-Cookie: a=b\r\n"), seen=seen)) as port, bed() as prober:
            await prober.result(HttpCheck(), port)
            await prober.result(check, port)
            return int(port)

    port = run(scenario())
    plain, asked = ([line.lower() for line in head.decode().split("\r\n") if line] for head in seen)
    assert plain[0] == "get / http/1.1"
    assert set(plain[1:]) == {
        f"host: 127.0.0.1:{port}",
        f"user-agent: portd/{__version__}",
        "accept-encoding: identity",
        "connection: keep-alive",
        "accept: */*",
    }
    assert asked[0] == "post //a%2fb/../c?x=%20y&q#f http/1.1"
    assert set(asked[1:]) == {
        "host: orders.example",
        "x-probe: 1",
        "user-agent: mine",
        "content-length: 0",
        "accept-encoding: identity",
        "connection: keep-alive",
        "accept: */*",
    }
    assert not any(word in head for head in seen for word in (b"secret", b"Cookie", b"Authorization"))


def test_a_checked_service_can_start_again_at_once_without_reuseaddr(run: Any, bed: Any, answer: Any) -> None:
    """TIME_WAIT is with whoever closes first: it must not be the service."""

    async def scenario() -> int:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0), reuse_port=False) as listener:
            listener.setblocking(False)
            port = int(listener.getsockname()[1])
            async with bed() as prober:
                prober.bind(HttpCheck(), port)
                connection, _ = await loop.sock_accept(listener)
                with connection:
                    assert await loop.sock_recv(connection, 4096)
                    await loop.sock_sendall(connection, answer())
                    assert await loop.sock_recv(connection, 4096) == b""  # it hung up
                    await prober.until(lambda: prober.health == ["passing"])
        return port

    port = run(scenario())
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("address", "listens_on", "host"),
    [
        ("0.0.0.0", "0.0.0.0", "127.0.0.1"),
        ("::", "::", "[::1]"),
        ("::1", "::1", "[::1]"),
        ("127.77.0.9", "127.77.0.9", "127.77.0.9"),
    ],
)
def test_a_check_goes_to_the_lease_s_own_address(
    run: Any, bed: Any, service: Any, answers: Any, answer: Any, address: str, listens_on: str, host: str
) -> None:
    seen: list[bytes] = []

    async def scenario() -> None:
        async with service(answers(answer(), seen=seen), host=listens_on) as port, bed() as prober:
            assert (await prober.result(HttpCheck(), port, address=address))[0] == "passing"
            assert f"Host: {host}:{port}\r\n".encode() in seen[0]

    run(scenario())


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1."""
    home = tmp_path_factory.mktemp("tls")
    files = home / "cert.pem", home / "key.pem"
    issue(*files, "portd test", "subjectAltName = IP:127.0.0.1")
    return files


@pytest.mark.parametrize(
    ("check", "is_trusted", "result", "note"),
    [
        (HttpCheck(tls=True), False, "critical", "certificate verify failed"),
        (HttpCheck(tls=True), True, "passing", "200 OK"),
        (HttpCheck(tls=True, tls_verify=False), False, "passing", "200 OK"),
        (HttpCheck(), False, "critical", "closed without an answer"),
    ],
)
def test_certificate_is_verified_unless_tls_verify_is_false(
    run: Any,
    bed: Any,
    service: Any,
    answers: Any,
    answer: Any,
    certificate: tuple[Path, Path],
    check: HttpCheck,
    is_trusted: bool,
    result: str,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cert, key = certificate
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    async def scenario() -> None:
        async with service(answers(answer()), ssl=context) as port, bed() as prober:
            report = await prober.result(check, port)
            assert report[0] == result
            assert note in report[1]

    run(scenario())


def test_tls_is_not_spoken_to_a_plain_server(run: Any, bed: Any, service: Any, answers: Any, answer: Any) -> None:
    async def blurt(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer())
        await writer.drain()

    async def scenario() -> None:
        async with service(blurt) as port, bed() as prober:
            assert (await prober.result(HttpCheck(tls=True), port))[0] == "critical"

    run(scenario())


def test_a_refused_connection_is_noted_as_one(run: Any, bed: Any, closed_port: int) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            assert await prober.result(HttpCheck(), closed_port) == ("critical", "connection refused")

    run(scenario())
