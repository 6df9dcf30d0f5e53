"""The gateway's own answers: what portd knows, for people as HTML, for programs as one plain text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, Final

from aiohttp import web

from portd.adapters.gateway.directory import Ended
from portd.core.hostnames import PublicName, format_host

BECAUSE: Final = {
    "released": "it was released",
    "owner_exited": "its process exited",
    "expired": "it was not renewed in time",
    "revoked": "its lease was revoked",
    "host_rebooted": "the host was rebooted",
}
STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:42rem;margin:4rem auto;padding:0 1rem;color-scheme:light dark}"
    "code{font-family:ui-monospace,monospace}"
)


def why_none(name: PublicName, live: Sequence[dict[str, Any]], ended: Sequence[Ended]) -> list[str]:
    """Return sentences that explain why nobody serves a name."""
    said = [_condition(lease) for lease in live]
    gone = [one for one in ended if one.instance not in {lease["instance"] for lease in live}]
    now = datetime.now(UTC)
    said += [
        f"{one.instance} ended {_ago(now, one.ended_at)} ago: {BECAUSE.get(one.because, one.because)}." for one in gone
    ]
    return said or [f"No lease has the name {format_host(name)}."]


def respond(
    request: web.BaseRequest,
    status: int,
    title: str,
    sentences: Sequence[str],
    services: Sequence[str] = (),
    port: int | None = None,
) -> web.Response:
    """Make an answer of the gateway's own; `services` are listed with links, at `port`."""
    headers = {"Cache-Control": "no-store", "X-Portd-Gateway": "answer"}
    if status == 503:
        headers["Retry-After"] = "1"
    if "text/html" not in request.headers.get("Accept", ""):
        lines = [title, *sentences, *(["Services that answer: " + ", ".join(services)] if services else [])]
        return web.Response(status=status, text="\n".join(lines) + "\n", headers=headers)
    suffix = "" if port in (None, 80, 443) else f":{port}"
    links = "".join(
        f'<li><a href="//{escape(format_host(PublicName(one)))}{suffix}/">{escape(one)}</a></li>' for one in services
    )
    listed = f"<p>Services that answer:</p><ul>{links}</ul>" if links else ""
    paragraphs = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1>{paragraphs}{listed}<p><small>portd gateway</small></p></html>\n"
    )
    return web.Response(status=status, text=page, content_type="text/html", headers=headers)


def _condition(lease: dict[str, Any]) -> str:
    name = lease["instance"]
    if lease["state"] == "conflict":
        return f"{name}: another process listens on its port {lease['port']}; see portd who {lease['port']}."
    if lease["state"] == "held":
        elsewhere = ", ".join(f"{one['address']}:{one['port']}" for one in lease.get("elsewhere") or ())
        if elsewhere:
            return f"{name} listens on {elsewhere} instead of its port {lease['port']}."
        return f"{name} does not listen on its port {lease['port']} yet."
    if lease["drain"]:
        return f"{name} is draining."
    note = f": {lease['health_note']}" if lease.get("health_note") else ""
    return f"{name} is up, but its health check is {lease['health']}{note}."


def _ago(now: datetime, then: datetime) -> str:
    seconds = max(0, int((now - then).total_seconds()))
    for size, letter in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {letter}"
    return f"{seconds} s"
