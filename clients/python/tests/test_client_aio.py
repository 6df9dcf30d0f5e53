"""The same promises to an asyncio program."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from clients.conformance.bed import DEADLINE_S, Daemon, foreign_listener
from portd_client import aio, calls, steps
from portd_client.errors import DaemonUnavailable, Problem, ProtocolError
from portd_client.types import LeaseDocument


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look after leases every 50 ms: the pace is not what is tested."""
    monkeypatch.setattr(steps, "CHECK_S", 0.05)
    monkeypatch.setattr(steps, "RETRY_S", 0.05)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; fails at the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.01)


async def shown(client: aio.AsyncClient, service: str) -> list[LeaseDocument]:
    """List a service's leases."""
    return [lease async for lease in client.leases(service=service)]


def test_a_server_of_asyncio_takes_the_leased_socket(daemon: Daemon) -> None:
    async def main() -> None:
        client = aio.AsyncClient(daemon.url)
        async with aio.lease("served", client=client, tags=["blue"]) as lease:
            server = await asyncio.start_server(lambda _, writer: writer.close(), sock=await lease.listen())
            async with server:
                found = await client.resolve("served", wait_s=10)
                assert (found.port, found.tags) == (lease.port, ["blue"])
                reader, writer = await asyncio.open_connection(found.host, found.port)
                assert await reader.read() == b""
                writer.close()
                await writer.wait_closed()
                assert [one["owner"]["pid"] for one in await shown(client, "served")] == [os.getpid()]
        assert await shown(client, "served") == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_taken_port_is_declined_for_another(daemon: Daemon) -> None:
    async def main() -> None:
        async with aio.lease("raced", client=aio.AsyncClient(daemon.url), hold="none") as lease:
            first = lease.port
            with socket.create_server((lease.address, first)):
                listener = await lease.listen()
                assert listener.getsockname()[1] == lease.port != first
                listener.close()

    asyncio.run(main())


def test_ttl_lease_is_renewed_and_forgotten_one_taken_again(own_daemon: Daemon) -> None:
    async def main() -> None:
        client = aio.AsyncClient(own_daemon.url)
        async with aio.lease("kept", client=client, ttl=0.6) as lease:
            first = lease.document.get("expires_at")
            await until(
                lambda: lease.document.get("renewed_at") is not None and lease.document.get("expires_at") != first
            )
            first_id = lease.id
            own_daemon.stop(signal.SIGKILL)
            own_daemon.forget()
            await asyncio.to_thread(own_daemon.start)
            await until(lambda: lease.id != first_id)
            assert (await client.lease(lease.id))["port"] == lease.port

    asyncio.run(main())


def test_program_is_notified_when_its_lease_moves(own_daemon: Daemon) -> None:
    async def main() -> None:
        moved: list[int] = []
        async with aio.lease(
            "moved", client=aio.AsyncClient(own_daemon.url), on_change=lambda lease: moved.append(lease.port)
        ) as lease:
            port = lease.port
            own_daemon.stop()
            own_daemon.forget()
            with foreign_listener(lease.address, port):
                await asyncio.to_thread(own_daemon.start)
                await until(lambda: bool(moved))
            assert moved == [lease.port]
            assert lease.port != port

    asyncio.run(main())


def test_absent_daemon_is_an_error_or_an_ephemeral_port() -> None:
    async def main() -> None:
        absent = aio.AsyncClient("unix:///nonexistent/portd.sock")
        with pytest.raises(DaemonUnavailable, match="portd serve"):
            async with aio.lease("nobody", client=absent):
                raise AssertionError("nobody leases")
        async with aio.lease("nobody", client=absent, fallback="ephemeral") as lease:
            assert lease.id == ""
            listener = await lease.listen()
            assert listener.getsockname()[1] == lease.port
            listener.close()

    asyncio.run(main())


def test_a_problem_is_raised_with_its_code(daemon: Daemon) -> None:
    async def main() -> None:
        with pytest.raises(Problem) as caught:
            await aio.AsyncClient(daemon.url).grant({"service": "Not_A_Label"})
        assert (caught.value.code, caught.value.pointer) == ("invalid_request", "/service")

    asyncio.run(main())


def test_daemon_that_hangs_is_a_timeout() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = aio.AsyncClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
            with pytest.raises(DaemonUnavailable, match=r"0\.2 s"):
                await client.lease("x")

    asyncio.run(main())


def test_truncated_answer_is_a_protocol_error() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ProtocolError):
                await aio.AsyncClient(f"http://127.0.0.1:{port}").lease("x")

    asyncio.run(main())


def test_watch_tells_every_change_and_waits_out_a_restart(own_daemon: Daemon) -> None:
    async def main() -> None:
        client = aio.AsyncClient(own_daemon.url)
        answers = client.watch("watched")
        assert await anext(answers) == []
        lease = await client.grant({"service": "watched", "ttl": 60})
        listener = socket.create_server((lease["address"], lease["port"]))
        assert [one.port for one in await anext(answers)] == [lease["port"]]
        own_daemon.stop()
        await asyncio.to_thread(own_daemon.start)
        await client.call(calls.release(lease["id"]))
        async with asyncio.timeout(DEADLINE_S):
            assert await anext(answers) == []
        listener.close()
        await close(answers)

    asyncio.run(main())


def test_events_can_be_taken_up_where_they_broke_off(own_daemon: Daemon) -> None:
    async def main() -> None:
        client = aio.AsyncClient(own_daemon.url)
        lease = await client.grant({"service": "events", "ttl": 60})
        stream = client.events(after=0)
        first = await anext(stream)
        assert first.data["lease"]["id"] == lease["id"]
        own_daemon.stop()
        with pytest.raises((ProtocolError, DaemonUnavailable, StopAsyncIteration)):
            await anext(stream)
        await asyncio.to_thread(own_daemon.start)
        await client.call(calls.release(lease["id"]))
        async with asyncio.timeout(DEADLINE_S):
            stream = client.events(after=first.revision)
            while (event := await anext(stream)).name != "ended":
                pass
        assert event.revision > first.revision
        await close(stream)

    asyncio.run(main())


async def close(stream: AsyncIterator[object]) -> None:
    """End an iteration that would go on."""
    await stream.aclose()  # type: ignore[attr-defined]
