"""Websockets through the gateway: messages, pings and closes pass in both directions as they come.

The opening handshake goes to the service first: the client gets its subprotocol, or its refusal. Compression is
negotiated on each side for itself.
"""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import ClientSession, ClientWebSocketResponse, WSCloseCode, WSMsgType, web
from multidict import CIMultiDict
from yarl import URL

MESSAGE_MAX_BYTES: Final = 64 << 20
"""The largest message: one is whole in memory before it passes."""
CLOSE_S: Final = 2.0
"""Seconds that a side has to answer a close."""

WebSocket = web.WebSocketResponse | ClientWebSocketResponse


async def connect(session: ClientSession, url: URL, headers: CIMultiDict[str]) -> ClientWebSocketResponse:
    """Open a websocket to a service with the client's headers; raises aiohttp.ClientError."""
    own = CIMultiDict((name, value) for name, value in headers.items() if not name.lower().startswith("sec-websocket-"))
    return await session.ws_connect(
        url,
        headers=own,
        protocols=[word.strip() for line in headers.getall("Sec-WebSocket-Protocol", ()) for word in line.split(",")],
        autoclose=False,
        autoping=False,
        max_msg_size=MESSAGE_MAX_BYTES,
        ssl=False,
    )


async def relay(request: web.BaseRequest, service: ClientWebSocketResponse) -> web.WebSocketResponse:
    """Accept the client's websocket, and pass messages until either side closes."""
    client = web.WebSocketResponse(
        protocols=[service.protocol] if service.protocol else (),
        timeout=CLOSE_S,
        autoclose=False,
        autoping=False,
        max_msg_size=MESSAGE_MAX_BYTES,
    )
    await client.prepare(request)
    tasks = [asyncio.create_task(_pass(client, service)), asyncio.create_task(_pass(service, client))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(service.close(), client.close(), return_exceptions=True)
    return client


async def _pass(source: WebSocket, sink: WebSocket) -> None:
    """Pass messages in one direction until the source closes or breaks; the sink is then closed with its code."""
    while True:
        message = await source.receive()
        if message.type is WSMsgType.TEXT:
            await sink.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await sink.send_bytes(message.data)
        elif message.type is WSMsgType.PING:
            await sink.ping(message.data)
        elif message.type is WSMsgType.PONG:
            await sink.pong(message.data)
        elif message.type is WSMsgType.CLOSE:
            await sink.close(code=message.data or WSCloseCode.OK, message=(message.extra or "").encode())
            return
        else:  # it broke without a close
            await sink.close(code=WSCloseCode.SERVICE_RESTART)
            return
