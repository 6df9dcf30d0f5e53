"""A real service behind the gateway: what it got is what it answers. Run as a program: backend.py PORT."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys

from aiohttp import WSMsgType, web

NEXT = web.AppKey("next", asyncio.Event)


async def echo(request: web.Request) -> web.Response:
    """Answer with the request as it came in."""
    body = await request.read()
    return web.json_response(
        {
            "pid": os.getpid(),
            "method": request.method,
            "path": request.raw_path,
            "headers": [[name, value] for name, value in request.headers.items()],
            "size": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        },
        headers={"Set-Cookie": "a=1", "X-Own": "yes"},
    )


async def events(request: web.Request) -> web.StreamResponse:
    """Send one event, and the next one only when the test says so: POST /next."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number in range(2):
        await response.write(f"data: {number}\n\n".encode())
        await request.app[NEXT].wait()
    return response


async def proceed(request: web.Request) -> web.Response:
    """Let the event stream go on."""
    request.app[NEXT].set()
    return web.Response(text="ok")


async def upload(request: web.Request) -> web.StreamResponse:
    """Answer every part of the upload at once with its size."""
    response = web.StreamResponse()
    await response.prepare(request)
    async for part in request.content.iter_any():
        await response.write(f"{len(part)}\n".encode())
    return response


async def refuse(request: web.Request) -> web.Response:
    """Refuse an upload before it is sent."""
    return web.Response(status=413, text="too large")


async def _no_continue(request: web.Request) -> None:
    """Do not ask for the body: `refuse` answers without it."""


async def chat(request: web.Request) -> web.WebSocketResponse:
    """Echo messages; "bye" closes with a code of its own."""
    socket = web.WebSocketResponse(protocols=["v2.chat"])
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT and message.data == "bye":
            await socket.close(code=4321, message=b"on request")
        elif message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


async def broken(request: web.Request) -> web.StreamResponse:
    """Break off in the middle of an answer."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"half")
    request.transport.abort()
    return response


async def die(request: web.Request) -> web.Response:
    """Exit without an answer, after the request has been read."""
    os._exit(1)


async def app() -> web.Application:
    """Make the service."""
    made = web.Application(client_max_size=1 << 30)
    made[NEXT] = asyncio.Event()
    made.router.add_post("/next", proceed)
    made.router.add_get("/events", events)
    made.router.add_post("/upload", upload)
    made.router.add_post("/refuse", refuse, expect_handler=_no_continue)
    made.router.add_get("/chat", chat)
    made.router.add_get("/broken", broken)
    made.router.add_route("*", "/die", die)
    made.router.add_route("*", "/{tail:.*}", echo)
    return made


if __name__ == "__main__":
    web.run_app(app(), host="127.0.0.1", port=int(sys.argv[1]), print=None, handle_signals=False)
