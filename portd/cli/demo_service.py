"""A small web service for the demo: its name on /, its health on /healthz."""

from __future__ import annotations

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Service(BaseHTTPRequestHandler):
    """Answers GET requests."""

    def do_GET(self) -> None:
        """Answer /healthz and /."""
        text = "ok\n" if self.path == "/healthz" else f"hello from {sys.argv[1]}, process {os.getpid()}\n"
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: the demo's own output is what matters."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Service).serve_forever()
