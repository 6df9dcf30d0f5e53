"""The yardstick: the least that an aiohttp server can do. A POST is read and decoded, 400 bytes of JSON come back.

`python -m tests.bench.hello SOCKET PORT`; uvloop and msgspec, no access log, no middleware.
"""

from __future__ import annotations

import asyncio
import gc
import sys

import msgspec
import uvloop
from aiohttp import web

ANSWER = {"id": "0" * 24, "text": "x" * 355}
encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(dict[str, str]).decode


async def hello(request: web.Request) -> web.Response:
    """Answer."""
    if body := await request.read():
        decode(body)
    return web.Response(body=encode(ANSWER), content_type="application/json")


async def main(path: str, port: int) -> None:
    """Serve until killed."""
    app = web.Application()
    app.router.add_route("*", "/", hello)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.UnixSite(runner, path, backlog=1024).start()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    gc.freeze()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
