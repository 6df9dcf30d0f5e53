"""What all tests share: one whose program is not installed is skipped, and says which package has it."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PACKAGES = {
    "avahi-browse": "avahi-utils",
    "avahi-daemon": "avahi-daemon",
    "caddy": "caddy",
    "dbus-daemon": "dbus",
    "dig": "bind9-dnsutils",
    "gcc": "gcc",
    "go": "golang-go",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "node": "nodejs",
    "npm": "npm",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "prlimit": "util-linux",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "redis-server": "redis-server",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
"""Programs that tests start, and the Debian packages that have them (`.ci/run` installs all of them)."""


@contextmanager
def _skipping_what_is_missing() -> Generator[None, None, None]:
    try:
        yield
    except FileNotFoundError as error:
        program = Path(str(error.filename or "")).name
        if program not in PACKAGES or shutil.which(program) is not None:
            raise
        pytest.skip(f"{program} is not installed (Debian package {PACKAGES[program]})")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skip a test whose fixtures need a program that is not installed."""
    with _skipping_what_is_missing():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skip a test that needs a program that is not installed."""
    with _skipping_what_is_missing():
        return (yield)
