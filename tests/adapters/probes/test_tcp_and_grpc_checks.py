"""TCP checks against bare listeners, gRPC checks against grpcio's own server and health service."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from portd.adapters.probes.grpc import HealthCall, decode_response, encode_request
from portd.adapters.probes.results import ProbeFailed
from portd.core.model import GrpcCheck, TcpCheck

STATUS = health_pb2.HealthCheckResponse
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


# --- tcp ---


def test_a_listener_passes_and_is_sent_nothing(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            async with bed() as prober:
                assert await prober.result(TcpCheck(), listener.getsockname()[1]) == ("passing", "connected")
            connection, _ = await loop.sock_accept(listener)
            with connection:
                assert await loop.sock_recv(connection, 100) == b""

    run(scenario())


def test_a_port_that_nobody_listens_on_is_critical(run: Any, bed: Any, closed_port: int) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            assert await prober.result(TcpCheck(), closed_port) == ("critical", "connection refused")

    run(scenario())


def test_listener_whose_backlog_is_full_runs_into_time_out(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        with socket.socket() as listener, socket.socket() as first:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            first.connect(listener.getsockname())
            async with bed() as prober:
                report = await prober.result(TcpCheck(timeout=0.2), listener.getsockname()[1])
                assert report == ("critical", "no answer within 0.2 s")

    run(scenario())


def test_tcp_check_of_udp_lease_is_critical_and_nothing_worse(run: Any, bed: Any, closed_port: int) -> None:
    async def scenario() -> None:
        async with bed() as prober:
            assert (await prober.result(TcpCheck(), closed_port, protocol="udp"))[0] == "critical"

    run(scenario())


# --- grpc ---


@contextmanager
def grpc_server(*, with_health: bool = True) -> Iterator[tuple[int, health.HealthServicer]]:
    """Run grpcio's server with the standard health service."""
    servicer = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(2))
    if with_health:
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port, servicer
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(
    ("status", "service", "result", "note"),
    [
        (STATUS.SERVING, "", "passing", "SERVING"),
        (STATUS.SERVING, "orders.v1.Orders", "passing", "SERVING"),
        (STATUS.SERVING, "x" * 256, "passing", "SERVING"),
        (STATUS.NOT_SERVING, "", "critical", "NOT_SERVING"),
        (STATUS.UNKNOWN, "", "critical", "UNKNOWN"),
        (STATUS.SERVICE_UNKNOWN, "", "critical", "SERVICE_UNKNOWN"),
    ],
)
def test_the_serving_status_decides(run: Any, bed: Any, status: int, service: str, result: str, note: str) -> None:
    async def scenario(port: int) -> None:
        async with bed() as prober:
            assert await prober.result(GrpcCheck(service=service), port) == (result, note)

    with grpc_server() as (port, servicer):
        servicer.set(service, status)
        run(scenario(port))


def test_a_service_that_the_server_does_not_know_is_critical(run: Any, bed: Any) -> None:
    async def scenario(port: int) -> None:
        async with bed() as prober:
            result, note = await prober.result(GrpcCheck(service="nobody"), port)
            assert result == "critical"
            assert note.startswith("grpc-status 5")  # NOT_FOUND

    with grpc_server() as (port, _):
        run(scenario(port))


def test_a_server_without_the_health_service_is_critical(run: Any, bed: Any) -> None:
    async def scenario(port: int) -> None:
        async with bed() as prober:
            result, note = await prober.result(GrpcCheck(), port)
            assert result == "critical"
            assert note.startswith("grpc-status 12")  # UNIMPLEMENTED

    with grpc_server(with_health=False) as (port, _):
        run(scenario(port))


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no HTTP/2 answer"),
        (b"", "closed without an answer"),
        (b"\0\0\0\x04\0\0\0\0\0" * 20_000, ""),  # settings without end
        (b"\0\0\0\x04\0\0\0\0\0\0\0\x08\x07\0\0\0\0\0" + bytes(7) + b"\x0b", "HTTP/2 error 11"),  # GOAWAY
        (
            b"\0\0\0\x04\0\0\0\0\0\0\0\x01\x01\x05\0\0\0\x01\x88",
            "no gRPC answer: HTTP status 200",
        ),  # a plain web server's
    ],
)
def test_what_is_no_proper_grpc_answer_is_critical(run: Any, bed: Any, service: Any, data: bytes, note: str) -> None:
    async def blurt(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(PREFACE))
        writer.write(data)
        await writer.drain()

    async def scenario() -> None:
        async with service(blurt) as port, bed() as prober:
            result, said = await prober.result(GrpcCheck(timeout=5), port)
            assert result == "critical"
            assert note in said

    run(scenario())


def test_grpc_server_that_never_answers_runs_into_time_out(run: Any, bed: Any, service: Any) -> None:
    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            pass

    async def scenario() -> None:
        async with service(listen) as port, bed() as prober:
            assert await prober.result(GrpcCheck(timeout=0.2), port) == ("critical", "no answer within 0.2 s")

    run(scenario())


@given(st.text(max_size=300))
def test_requests_are_coded_as_protobuf_does(service: str) -> None:
    message = health_pb2.HealthCheckRequest(service=service).SerializeToString()
    assert encode_request(service) == b"\0" + len(message).to_bytes(4, "big") + message


@pytest.mark.parametrize("status", [STATUS.UNKNOWN, STATUS.SERVING, STATUS.NOT_SERVING, STATUS.SERVICE_UNKNOWN])
def test_responses_are_decoded_as_protobuf_codes_them(status: int) -> None:
    message = STATUS(status=status).SerializeToString()
    assert decode_response(b"\0" + len(message).to_bytes(4, "big") + message) == status


@given(st.binary(max_size=200), st.booleans())
def test_no_answer_of_server_does_more_than_fail_check(data: bytes, settings_first: bool) -> None:
    call = HealthCall("127.0.0.1:1", GrpcCheck())
    try:
        call.receive((b"\0\0\0\x04\0\0\0\0\0" if settings_first else b"") + data)
        call.result()
    except ProbeFailed:
        return
    raise AssertionError("garbage was taken for an answer")


@given(st.binary(max_size=20))
def test_no_message_does_more_than_fail_the_check(data: bytes) -> None:
    try:
        assert 0 <= decode_response(data) <= 0x7F
    except ProbeFailed:
        return
