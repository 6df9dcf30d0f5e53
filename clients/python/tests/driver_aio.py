"""The conformance suite's driver of the asyncio client; its protocol is in clients/conformance/README.md."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from contextlib import suppress
from typing import Any

import portd_client
from clients.python.tests.driver import (
    Arguments,
    Messages,
    failure,
    question,
    remaining,
    shown_instance,
    shown_lease,
    tell,
)
from portd_client import aio, calls, errors
from portd_client.protocol import Request


class Calls:
    """One method a call."""

    def __init__(self) -> None:
        self._client: aio.AsyncClient | None = None
        self._handles: dict[str, aio.AsyncLease] = {}
        self._listeners: dict[str, list[asyncio.Server | socket.socket]] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        logging.getLogger("portd_client").addHandler(Messages())

    @property
    def client(self) -> aio.AsyncClient:
        """Return the client: of the environment, unless `connect` was called."""
        if self._client is None:
            self._client = aio.AsyncClient()
        return self._client

    async def connect(self, arguments: Arguments) -> Any:
        self._client = aio.AsyncClient(arguments.pop("url", None), **arguments)
        await self._client.call(calls.leases(limit=1))
        return {"url": self._client.url}

    async def lease(self, arguments: Arguments) -> Any:
        handle, held = await self._lease(arguments)
        return shown_lease(handle, held)

    async def listen(self, arguments: Arguments) -> Any:
        backlog = arguments.pop("backlog", 128)
        handle = arguments.get("handle") or (await self._lease(arguments))[0]
        held = self._handles[handle]
        try:
            listeners = await held.sockets(backlog)
        except BaseException:
            if "handle" not in arguments:
                await held.release()
            raise
        self._listeners[handle] = [
            await asyncio.start_server(greet, sock=one) if one.type == socket.SOCK_STREAM else one for one in listeners
        ]
        return shown_lease(handle, held)

    async def _lease(self, arguments: Arguments) -> tuple[str, aio.AsyncLease]:
        handle = f"l{len(self._handles) + 1}"
        self._handles[handle] = held = aio.lease(
            client=self.client,
            on_change=lambda lease: tell(event="changed", handle=handle, port=lease.port, lease=lease.id),
            on_lost=lambda _, error: tell(event="lost", handle=handle, code=getattr(error, "code", "")),
            **arguments,
        )
        return handle, await held.__aenter__()

    async def call(self, arguments: Arguments) -> Any:
        request = Request(**{"target": arguments.pop("path"), **arguments})
        try:
            return {"status": 200, "body": await self.client.call(request)}
        except errors.Problem as error:
            return {"status": error.status, "body": error.document}

    async def renew(self, arguments: Arguments) -> Any:
        await self._handles[arguments["handle"]].renew(arguments.get("seconds"))

    async def decline(self, arguments: Arguments) -> Any:
        held = self._handles[arguments["handle"]]
        await held.decline()
        return shown_lease(arguments["handle"], held)

    async def transfer(self, arguments: Arguments) -> Any:
        await self._handles[arguments["handle"]].transfer(arguments["pid"])

    async def change(self, arguments: Arguments) -> Any:
        await self._handles[arguments["handle"]].change(arguments["fields"])

    async def events(self, arguments: Arguments) -> Any:
        """Return the first event after a revision that has the wanted name."""
        events = self.client.events(arguments["after"], arguments["service"])
        async for event in events:
            if event.name == arguments["name"]:
                lease = event.data["lease"]["id"]
                return {"name": event.name, "revision": event.revision, "lease": lease}
        return None

    async def release(self, arguments: Arguments) -> Any:
        handle = arguments["handle"]
        await self._handles[handle].release()
        for one in self._listeners.pop(handle, []):
            one.close()
            if isinstance(one, asyncio.Server):
                await one.wait_closed()

    async def drain(self, arguments: Arguments) -> Any:
        await self._handles[arguments["handle"]].drain()

    async def report(self, arguments: Arguments) -> Any:
        await self._handles[arguments["handle"]].report(arguments["status"], arguments.get("output", ""))

    async def resolve(self, arguments: Arguments) -> Any:
        return shown_instance(await self.client.resolve(**question(arguments)))

    async def resolve_all(self, arguments: Arguments) -> Any:
        found = await self.client.resolve_all(**question(arguments))
        return {"instances": [shown_instance(one) for one in found]}

    async def watch(self, arguments: Arguments) -> Any:
        handle = f"w{len(self._watches) + 1}"
        self._watches[handle] = asyncio.create_task(self._follow(handle, question(arguments)))
        return {"handle": handle}

    async def _follow(self, handle: str, arguments: Arguments) -> None:
        async for instances in self.client.watch(**arguments):
            tell(
                event="instances",
                handle=handle,
                is_stale=any(one.is_stale for one in instances),
                instances=[shown_instance(one) for one in instances],
            )

    async def unwatch(self, arguments: Arguments) -> Any:
        task = self._watches.pop(arguments["handle"])
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def close(self, arguments: Arguments) -> Any:
        for handle in self._handles:
            await self.release({"handle": handle})
        for handle in list(self._watches):
            await self.unwatch({"handle": handle})
        tasks = sum(task.get_name().startswith("portd ") for task in asyncio.all_tasks())
        return {"remaining": remaining() + tasks - OWN_SOCKETS}


OWN_SOCKETS = 2
"""The pair by which an event loop wakes itself."""


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Greet whoever connects."""
    writer.write(f"{sys.argv[1]}\n".encode())
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def main() -> None:
    """Answer calls, one after another, until the end of input; then give everything back."""
    made = Calls()
    portd_client.release_on_signal()
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        message = json.loads(line)
        try:
            tell(id=message["id"], result=await getattr(made, message["call"])(message["with"]) or {})
        except (portd_client.PortdError, TypeError, ValueError, OSError) as error:
            tell(id=message["id"], error=failure(error))
    await made.close({})


if __name__ == "__main__":
    asyncio.run(main())
