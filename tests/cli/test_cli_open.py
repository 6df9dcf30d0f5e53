"""`portd open` prints the dashboard's URL where no browser can be opened."""

from __future__ import annotations

from tests.cli.bed import Daemon, serving

NO_BROWSER = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "BROWSER": ""}


def test_open_prints_a_deep_link_to_the_port(daemon: Daemon) -> None:
    with serving(daemon, "opened") as port:
        for target in ("opened", "opened-1", str(port)):
            assert daemon.portd("open", target, **NO_BROWSER).stdout == f"http://127.0.0.1:7783/#{port}\n"
    assert daemon.portd("open", **NO_BROWSER).stdout == "http://127.0.0.1:7783/\n"
