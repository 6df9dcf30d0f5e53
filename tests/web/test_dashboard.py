"""The dashboard in a real browser: what a person sees, clicks, and hears read aloud."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.harness import Daemon, wait_for
from tests.web.conftest import Browser

WEB = Path(__file__).parents[2] / "portd/web"
SIZE_MAX_BYTES = 60_000
SHOTS = os.environ.get("PORTD_SCREENSHOTS")


def url(daemon: Daemon, port: int | str = "") -> str:
    return f"http://127.0.0.1:{daemon.tcp[1]}/" + (f"#{port}" if port else "")


def lease(daemon: Daemon, **request: object) -> dict:
    with daemon.connect() as connection:
        reply = connection.call("POST", "/v1/leases", {"ttl": 600, **request})
    assert reply.status == 201, reply.body
    return reply.body


@contextmanager
def listening(port: int) -> Iterator[int]:
    """Run a program that listens on a port, and yield its pid."""
    program = (
        f"import socket, sys; s = socket.create_server(('127.0.0.1', {port})); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate(b"\n")


def test_page_files_are_small_and_inject_no_markup() -> None:
    files = [path for path in WEB.iterdir() if path.suffix in (".html", ".css", ".js", ".svg")]
    assert sum(path.stat().st_size for path in files) < SIZE_MAX_BYTES
    for path in files:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", path.read_text()), path
        assert not re.search(r"(src|href)=\"https?:", path.read_text()), f"{path} loads something from elsewhere"


def test_page_allows_nothing_from_elsewhere(own_daemon: Daemon) -> None:
    with own_daemon.connect() as connection:
        page = connection.call("GET", "/")
        missing = connection.call("GET", "/ui/../portd.toml")
        again = connection.call("GET", "/", If_None_Match=page.headers["etag"])
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert (missing.status, again.status) == (404, 304)


def test_page_shows_leases_as_they_come_and_go(own_daemon: Daemon, browser: Browser) -> None:
    browser.do("open", url=url(own_daemon))
    wait_for(lambda: browser.do("visible", selector="#services .empty"), "the page says that nothing is leased")
    granted = lease(own_daemon, service="orders", tags=["blue"])
    wait_for(lambda: browser.texts("#services .name") == ["orders (0 of 1 instances serve)"], "a row for orders")
    assert str(granted["port"]) in browser.texts("#services summary")[0]
    with own_daemon.connect() as connection:
        connection.call("DELETE", f"/v1/leases/{granted['id']}")
    wait_for(lambda: not browser.texts("#services .name"), "the row is gone")
    wait_for(
        lambda: re.search(r"\bended\b.*\bgranted\b", " ".join(browser.texts("#events .event"))),
        "the events list the end before the grant: the newest is first",
    )
    assert browser.do("errors") == []


def test_page_names_what_needs_attention(own_daemon: Daemon, browser: Browser) -> None:
    granted = lease(own_daemon, service="orders", check={"kind": "report", "ttl": 60})
    browser.do("open", url=url(own_daemon))
    with own_daemon.connect() as connection:
        report = {"status": "critical", "note": "<b>database gone</b>"}
        connection.call("PUT", f"/v1/leases/{granted['id']}/health", report)
    wait_for(lambda: browser.texts("#attention li"), "something needs attention")
    assert browser.texts("#attention li") == [f"{granted['port']} orders-1 is critical: <b>database gone</b>"]


def test_search_finds_by_service_port_and_tag(own_daemon: Daemon, browser: Browser) -> None:
    lease(own_daemon, service="orders", tags=["blue"])
    billing = lease(own_daemon, service="billing")
    browser.do("open", url=url(own_daemon))
    wait_for(lambda: len(browser.texts("#services .name")) == 2, "two services")
    for wanted, found in (("blue", "orders"), (str(billing["port"]), "billing")):
        browser.do("fill", selector="#search", text="")
        browser.do("evaluate", expression="document.activeElement.blur()")
        browser.do("press", key="/")
        browser.do("type", text=wanted)
        wait_for(lambda f=found: [t.split(" ")[0] for t in browser.texts("#services .name")] == [f], f"only {found}")


def test_port_panel_opens_by_link_and_drains_and_releases(own_daemon: Daemon, browser: Browser) -> None:
    granted = lease(own_daemon, service="orders")
    browser.do("open", url=url(own_daemon, granted["port"]))
    wait_for(lambda: browser.do("visible", selector="#port"), "the panel opens")
    browser.do("click", selector="#port button:text-is('Drain')")
    wait_for(lambda: browser.do("visible", selector="#port button:text-is('Stop draining')"), "it drains")
    with own_daemon.connect() as connection:
        assert connection.call("GET", f"/v1/leases/{granted['id']}").body["drain"] is True
    browser.do("click", selector="#port button:text-is('Release')")
    wait_for(lambda: "released" in " ".join(browser.texts("#port .past li")), "the history says released")
    browser.do("press", key="Escape")
    wait_for(lambda: not browser.do("visible", selector="#port"), "the panel closes")


def test_listener_without_a_lease_is_adopted_from_the_page(own_daemon: Daemon, browser: Browser) -> None:
    port = own_daemon.last_port
    with listening(port) as pid:
        browser.do("open", url=url(own_daemon, port))
        wait_for(lambda: browser.do("visible", selector="#port .adopt"), "the panel offers to adopt")
        browser.do("fill", selector="#port .adopt input", text="stray")
        browser.do("click", selector="#port .adopt button")
        wait_for(lambda: browser.texts("#services .name") == ["stray (1 of 1 instances serve)"], "it is adopted")
        with own_daemon.connect() as connection:
            found = connection.call("GET", f"/v1/leases?port={port}").body["leases"]
        assert [each["owner"]["pid"] for each in found] == [pid]


def test_page_stays_and_catches_up_when_the_daemon_restarts(own_daemon: Daemon, browser: Browser) -> None:
    lease(own_daemon, service="orders")
    browser.do("open", url=url(own_daemon))
    wait_for(lambda: browser.texts("#services .name"), "a row for orders")
    own_daemon.stop()
    wait_for(lambda: browser.do("visible", selector="#connection"), "the page says that it is not connected")
    assert len(browser.texts("#services .name")) == 1
    own_daemon.start()
    lease(own_daemon, service="billing")
    wait_for(lambda: len(browser.texts("#services .name")) == 2, "the page has caught up")
    wait_for(lambda: not browser.do("visible", selector="#connection"), "the page is connected again")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_has_no_accessibility_fault(own_daemon: Daemon, browser: Browser, scheme: str, width: int) -> None:
    for number in range(3):
        lease(own_daemon, service="orders", check={"kind": "report", "ttl": 60})
        lease(own_daemon, service=f"web-{number}", tags=["blue"])
    with listening(own_daemon.last_port):
        browser.do("open", url=url(own_daemon), width=width, colorScheme=scheme)
        wait_for(lambda: len(browser.texts("#services .name")) == 4, "four services")
        wait_for(lambda: browser.texts("#unmanaged .row"), "a listener without a lease")
        browser.do("click", selector="#services summary")
        browser.do("click", selector="#services .port-link")
        wait_for(lambda: browser.do("visible", selector="#port dl"), "the panel opens")
        assert browser.do("axe") == []
        if SHOTS:
            browser.do("screenshot", path=f"{SHOTS}/dashboard-{scheme}-{width}.png")
    assert browser.do("errors") == []
