"""The dashboard's files: `GET /` and what lies below `/ui/`.

The page calls the API as every caller does and has no rights of its own. This module must not know what is on the page.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Final, NamedTuple

from aiohttp import web

from portd.adapters.http.calls import Call, Route
from portd.core.errors import NotFound

MEDIA_TYPES: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY: Final = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
"""Nothing from elsewhere, nothing inline, in no frame (CSP level 3)."""


class _File(NamedTuple):
    body: bytes
    media_type: str
    etag: str


class PageCalls:
    """The handlers of the dashboard. The files are read once, at the start: 60 kB at most."""

    def __init__(self) -> None:
        self._files = {
            entry.name: _File(
                body := entry.read_bytes(),
                MEDIA_TYPES[entry.name.rpartition(".")[2]],
                f'"{hashlib.sha256(body).hexdigest()[:16]}"',
            )
            for entry in resources.files("portd.web").iterdir()
            if entry.name.rpartition(".")[2] in MEDIA_TYPES
        }

    def routes(self) -> list[Route]:
        """Return the routes of this module."""
        return [
            Route("GET", "/", self.index, "Show the dashboard", {200: str}, access="anybody", media_type="text/html"),
            Route(
                "GET",
                "/ui/{name}",
                self.file,
                "Get a file of the dashboard",
                {200: str},
                refusals=("not_found",),
                access="anybody",
                media_type="text/plain",
            ),
        ]

    async def index(self, call: Call) -> web.StreamResponse:
        """GET /."""
        return self._send(call.request, self._files["index.html"])

    async def file(self, call: Call) -> web.StreamResponse:
        """GET /ui/{name}. Raises NotFound for a name that is no file of the page."""
        found = self._files.get(call.path["name"])
        if found is None:
            raise NotFound(f"the dashboard has no file {call.path['name']}")
        return self._send(call.request, found)

    @staticmethod
    def _send(request: web.Request, file: _File) -> web.Response:
        headers = {
            "ETag": file.etag,
            "Cache-Control": "no-cache",  # a new daemon may have a new page: ask each time, 304 is cheap
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        if request.headers.get("If-None-Match") == file.etag:
            return web.Response(status=304, headers=headers)
        response = web.Response(body=file.body, content_type=file.media_type, charset="utf-8", headers=headers)
        response.enable_compression()
        return response
