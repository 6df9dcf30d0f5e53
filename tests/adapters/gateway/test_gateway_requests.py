"""The gateway in front of real services: what passes, what is added, and who answers."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import http.client
import json
import socket
from contextlib import closing
from typing import Any

import pytest
from aiohttp import ClientSession, WSMsgType, WSServerHandshakeError

from tests.adapters.gateway.conftest import Gateway, run
from tests.cli.bed import end

TIMEOUT_S = 15.0


@pytest.fixture(scope="module")
def web(gateway: Gateway):
    """The service `web`, one instance."""
    with gateway.service("web", "--instance", "web-a") as program:
        yield program


def call(gateway: Gateway, host: str, method: str = "GET", path: str = "/", body: Any = None, **headers: str):
    """Make one request through the gateway."""
    fields = {"Host": host, **{name.replace("_", "-"): value for name, value in headers.items()}}
    with closing(http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=TIMEOUT_S)) as connection:
        connection.request(method, path, body, fields)
        answer = connection.getresponse()
        return answer, answer.read()


def echoed(gateway: Gateway, host: str, *args: Any, **more: Any) -> Any:
    answer, data = call(gateway, host, *args, **more)
    assert answer.status == 200, data
    return json.loads(data)


def raw(gateway: Gateway, request: bytes) -> socket.socket:
    """Send bytes to the gateway."""
    connection = socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT_S)
    connection.sendall(request)
    return connection


def headers_of(document: Any, name: str) -> list[str]:
    return [value for key, value in document["headers"] if key.lower() == name.lower()]


@pytest.mark.parametrize("host", ["web.localhost", "WEB.localhost:7780", "web-a.web.localhost", "main--web.localhost"])
def test_each_name_of_a_service_reaches_it(gateway: Gateway, web: Any, host: str) -> None:
    assert echoed(gateway, host)["pid"] == web.pid


@pytest.mark.parametrize(
    "host", ["other.localhost", "web-b.web.localhost", "admin--web.localhost", "a.example.com", "127.0.0.1"]
)
@pytest.mark.usefixtures("web")
def test_other_names_are_not_found(gateway: Gateway, host: str) -> None:
    assert call(gateway, host)[0].status == 404


@pytest.mark.usefixtures("web")
def test_method_path_body_and_host_pass_unchanged(gateway: Gateway) -> None:
    body = bytes(range(256)) * 5000
    path = "/a%2Fb//c;d?x=1&x=%20&y"
    seen = echoed(
        gateway, "web.localhost:7780", "PUT", path, gzip.compress(body), Content_Type="x/y", Content_Encoding="gzip"
    )
    assert (seen["method"], seen["path"], seen["size"]) == ("PUT", path, len(body))
    assert seen["sha256"] == hashlib.sha256(body).hexdigest()
    assert headers_of(seen, "Host") == ["web.localhost:7780"]
    assert headers_of(seen, "Content-Encoding") == ["gzip"]


@pytest.mark.usefixtures("web")
def test_forwarded_headers_are_set_and_hop_headers_removed(gateway: Gateway) -> None:
    seen = echoed(
        gateway, "web.localhost", Connection="keep-alive, X-Mine", X_Mine="1", TE="trailers", Keep_Alive="5",
        Proxy_Authorization="Basic x", X_Forwarded_Proto="https",
    )  # fmt: skip
    names = {name.lower() for name, _ in seen["headers"]}
    assert not names & {"x-mine", "te", "keep-alive", "proxy-authorization", "user-agent", "accept"}
    assert headers_of(seen, "X-Forwarded-For") == ["127.0.0.1"]
    assert headers_of(seen, "X-Forwarded-Host") == ["web.localhost"]
    assert headers_of(seen, "X-Forwarded-Proto") == ["https"]
    assert headers_of(seen, "Via") == ["1.1 portd-gateway"]


@pytest.mark.usefixtures("web")
def test_an_answer_passes_with_its_headers(gateway: Gateway) -> None:
    answer, _ = call(gateway, "web.localhost")
    assert (answer.getheader("Set-Cookie"), answer.getheader("X-Own")) == ("a=1", "yes")
    head, data = call(gateway, "web.localhost", "HEAD")
    assert (head.status, data) == (200, b"")


@pytest.mark.usefixtures("web")
def test_a_request_that_loops_is_answered_with_508(gateway: Gateway) -> None:
    assert call(gateway, "web.localhost", Via=", ".join(["1.1 portd-gateway"] * 5))[0].status == 508
    assert call(gateway, "web.localhost", Via="1.1 portd-gateway, 1.1 caddy")[0].status == 200


@pytest.mark.usefixtures("web")
def test_each_event_of_a_stream_arrives_before_the_next(gateway: Gateway) -> None:
    connection = raw(gateway, b"GET /events HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
    read = b""
    while b"data: 0\n\n" not in read:
        read += connection.recv(4096)
    assert b"data: 1" not in read
    call(gateway, "web.localhost", "POST", "/next")
    while b"data: 1\n\n" not in read:
        read += connection.recv(4096)
    connection.close()


@pytest.mark.usefixtures("web")
def test_each_part_of_an_upload_arrives_before_the_next(gateway: Gateway) -> None:
    connection = raw(
        gateway, b"POST /upload HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    )
    read = b""
    while b"5\n" not in read:
        read += connection.recv(4096)
    connection.sendall(b"3\r\nyou\r\n0\r\n\r\n")
    while b"0\r\n\r\n" not in read:
        read += connection.recv(4096)
    assert b"3\n" in read
    connection.close()


@pytest.mark.usefixtures("web")
def test_a_body_is_requested_once_the_service_requests_it(gateway: Gateway) -> None:
    head = b"POST /%s HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    connection = raw(gateway, head % b"echo")
    assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(b"hello")
    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    connection.close()
    connection = raw(gateway, head % b"refuse")
    assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    connection.close()


@pytest.mark.usefixtures("web")
def test_an_answer_that_breaks_off_is_not_completed(gateway: Gateway) -> None:
    with pytest.raises(http.client.IncompleteRead):
        call(gateway, "web.localhost", path="/broken")


@pytest.mark.usefixtures("web")
def test_websockets_pass_messages_subprotocols_and_closes(gateway: Gateway) -> None:
    async def converse() -> None:
        async with (
            ClientSession() as session,
            session.ws_connect(
                f"http://127.0.0.1:{gateway.port}/chat", headers={"Host": "web.localhost"}, protocols=["v1", "v2.chat"]
            ) as chat,
        ):
            assert chat.protocol == "v2.chat"
            await chat.send_str("é")
            assert (await chat.receive()).data == "é"
            await chat.send_bytes(bytes(2_000_000))
            assert len((await chat.receive()).data) == 2_000_000
            await chat.send_str("bye")
            message = await chat.receive()
            assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 4321, "on request")

    run(asyncio.wait_for(converse(), TIMEOUT_S))


@pytest.mark.usefixtures("web")
def test_a_refused_websocket_gets_the_service_status(gateway: Gateway) -> None:
    async def converse() -> int:
        async with ClientSession() as session:
            with pytest.raises(WSServerHandshakeError) as refused:
                await session.ws_connect(f"http://127.0.0.1:{gateway.port}/no", headers={"Host": "web.localhost"})
            return refused.value.status

    assert run(asyncio.wait_for(converse(), TIMEOUT_S)) == 200


def test_all_instances_get_requests(gateway: Gateway) -> None:
    with gateway.service("many") as one, gateway.service("many") as two:
        assert {echoed(gateway, "many.localhost")["pid"] for _ in range(4)} == {one.pid, two.pid}


def test_a_drained_instance_gets_no_requests(gateway: Gateway) -> None:
    with gateway.service("drained") as one, gateway.service("drained", "--instance", "drained-b") as two:
        assert gateway.daemon.portd("drain", "drained-b").returncode == 0
        assert {echoed(gateway, "drained.localhost")["pid"] for _ in range(6)} == {one.pid}
        assert two.poll() is None


def test_a_request_waits_for_a_service_that_restarts(gateway: Gateway) -> None:
    with gateway.service("back") as first:
        assert echoed(gateway, "back.localhost")["pid"] == first.pid
    with gateway.service("back", wait=False) as second:
        assert echoed(gateway, "back.localhost")["pid"] == second.pid
        assert echoed(gateway, "back.localhost", "POST", "/", b"x")["pid"] == second.pid


def test_a_killed_instance_costs_no_request(gateway: Gateway) -> None:
    with gateway.service("killed") as one, gateway.service("killed") as two:
        pids = [echoed(gateway, "killed.localhost")["pid"] for _ in range(4)]
        assert set(pids) == {one.pid, two.pid}
        end(one)
        assert {echoed(gateway, "killed.localhost")["pid"] for _ in range(8)} == {two.pid}
        assert echoed(gateway, "killed.localhost", "POST", "/", b"x")["pid"] == two.pid


def test_a_request_that_may_have_been_served_is_not_repeated(gateway: Gateway) -> None:
    with gateway.service("dies") as one, gateway.service("dies") as two:
        assert call(gateway, "dies.localhost", "POST", "/die", b"x")[0].status == 502
        assert one.wait(TIMEOUT_S) == 1 if one.poll() is not None else two.wait(TIMEOUT_S) == 1
        assert (one.poll() is None) != (two.poll() is None)


def test_the_error_page_says_what_portd_knows(gateway: Gateway) -> None:
    with gateway.service("gone", "--instance", "gone-1"):
        assert call(gateway, "gone.localhost")[0].status == 200
    answer, data = call(gateway, "gone.localhost", Accept="text/html")
    assert (answer.status, answer.getheader("Retry-After")) == (503, "1")
    assert b"gone-1 ended" in data
    assert b"its process exited" in data
    assert answer.getheader("Content-Type").startswith("text/html")


def test_the_gateway_serves_on_while_the_daemon_is_away(gateway: Gateway) -> None:
    with gateway.service("stays") as program:
        assert echoed(gateway, "stays.localhost")["pid"] == program.pid
        gateway.daemon.stop()
        try:
            assert echoed(gateway, "stays.localhost")["pid"] == program.pid
        finally:
            gateway.daemon.start()
        with gateway.service("later") as later:
            assert echoed(gateway, "later.localhost")["pid"] == later.pid
