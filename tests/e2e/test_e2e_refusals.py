"""A start that is refused says so in one line: what failed, on which file or address, and what to do."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import DEADLINE_S, NOBODY, Daemon, free_tcp_port

Arrange = Callable[[Daemon], None]


class Refusal(NamedTuple):
    """What is arranged, the exit status (sysexits.h), and a pattern that the line must match."""

    arrange: Arrange
    status: int
    pattern: str


def configured(text: str) -> Arrange:
    return lambda daemon: daemon.configure(text) and None


def socket_in_file(daemon: Daemon) -> None:
    (daemon.directory / "file").touch()
    daemon.configure("", socket=f'"{daemon.directory}/file/portd.sock"')


def store_in_file(daemon: Daemon) -> None:
    (daemon.directory / "file").touch()
    daemon.store = daemon.directory / "file" / "portd.db"
    daemon.configure("")


def socket_where_others_write(daemon: Daemon) -> None:
    shared = daemon.directory / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    daemon.configure("", socket=f'"{shared}/portd.sock"')


def file_at_the_socket(daemon: Daemon) -> None:
    daemon.socket.write_text("not a socket")


def damaged_store(daemon: Daemon) -> None:
    daemon.store.write_bytes(b"no database" * 1000)


def no_module(name: str) -> Arrange:
    def arrange(daemon: Daemon) -> None:
        daemon.prelude = f"sys.modules[{name!r}] = None"

    return arrange


REFUSALS = {
    "configuration": Refusal(
        configured("[leases]\ncooldwn = 1"), os.EX_CONFIG, r"portd.toml:2: leases.cooldwn: unknown"
    ),
    "nested TOML": Refusal(configured("x = " + "[" * 5000), os.EX_CONFIG, r"portd.toml: not TOML: .*nested too deeply"),
    "incomplete section": Refusal(
        configured("[cluster]\nengine = 'etcd'"), os.EX_CONFIG, r"portd.toml:1: cluster.endpoints: needs"
    ),
    "certificate": Refusal(
        lambda daemon: (
            daemon.configure("", tls="") or daemon.configure("", socket='"s"\ntls_cert = "/x"\ntls_key = "/y"')
        ),
        os.EX_CONFIG,
        r"listen.tls_cert: /x .* can't be loaded",
    ),
    "socket directory": Refusal(socket_in_file, os.EX_CANTCREAT, r"/file/portd.sock can't be .*set \[listen\] socket"),
    "shared directory": Refusal(socket_where_others_write, os.EX_CANTCREAT, r"/shared can be written by other users"),
    "file at the socket": Refusal(
        file_at_the_socket, os.EX_CANTCREAT, r"portd.sock can't be served: a file that is no"
    ),
    "store directory": Refusal(
        store_in_file, os.EX_CANTCREAT, r"/file.* can't be used for the store: .*\[store\] path"
    ),
    "damaged store": Refusal(damaged_store, os.EX_DATAERR, r"portd.db is not a SQLite database; .*Restore a copy"),
    "missing module": Refusal(
        no_module("aiosqlite"), os.EX_UNAVAILABLE, r"'aiosqlite' is missing.*install portd again"
    ),
}


def refused(daemon: Daemon, **environ: str) -> tuple[int, str]:
    """Start a daemon that refuses; returns its exit status and the one line."""
    done = subprocess.run(
        daemon.command, env={**daemon.environ, **environ}, capture_output=True, text=True, timeout=DEADLINE_S
    )
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1, done.stdout + done.stderr
    return done.returncode, lines[0]


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_start_says_why_in_one_line(make_daemon: MakeDaemon, case: str) -> None:
    arrange, status, pattern = REFUSALS[case]
    daemon = make_daemon()
    arrange(daemon)
    code, line = refused(daemon)
    assert re.search(pattern, line), line
    assert code == status


def test_a_taken_port_is_named(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    with socket.create_server(daemon.tcp):
        code, line = refused(daemon)
    assert f"http://127.0.0.1:{daemon.tcp[1]} can't be served: Address already in use; set [listen] http" in line
    assert code == os.EX_UNAVAILABLE


def test_second_daemon_on_same_socket_is_refused_in_one_line(make_daemon: MakeDaemon, own_daemon: Daemon) -> None:
    second = make_daemon()
    second.configure("", socket=f'"{own_daemon.socket}"', http=f'"127.0.0.1:{free_tcp_port()}"')
    code, line = refused(second)
    assert f"another daemon answers at {own_daemon.socket}: stop it" in line
    assert code == os.EX_UNAVAILABLE


def user_daemon(place: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a user's daemon as nobody with these variables and no others."""
    command = [sys.executable, "-c", "import sys; from portd.__main__ import main; sys.exit(main(['serve', '--user']))"]
    if os.geteuid() == 0:
        command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", *command]
    return subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{Path(__file__).parents[2]}", **environ},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize(
    ("environ", "pattern"),
    [
        ({"XDG_RUNTIME_DIR": "/nowhere/at/all"}, r"/nowhere.* can't be made for the socket: .*set \[listen\] socket"),
        ({"XDG_STATE_HOME": "/nowhere/at/all"}, r"/nowhere.* can't be used for the store: .*\[store\] path"),
    ],
    ids=["no runtime directory", "no home"],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_user_without_directories_gets_a_one_line_error(place: Path, environ: dict[str, str], pattern: str) -> None:
    place.chmod(0o777)
    (place / "config/portd").mkdir(parents=True)
    (place / "config/portd/portd.toml").write_text("[mdns]\nenabled = false\n[dns]\nlisten = ''")
    usual = {f"XDG_{name}": f"{place}/{name.lower()}" for name in ("STATE_HOME", "RUNTIME_DIR")}
    done = user_daemon(place, **{**usual, "XDG_CONFIG_HOME": f"{place}/config", **environ})
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert re.search(pattern, lines[0]), lines[0]
    assert done.returncode == os.EX_CANTCREAT


def test_silent_name_server_delays_neither_start_nor_stop(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(prelude="import socket, time; socket.getfqdn = lambda *_: time.sleep(60)")
    began = time.monotonic()
    daemon.start()
    assert daemon.stop() == 0
    assert time.monotonic() - began < 10.0


def test_without_uvloop_the_daemon_serves_and_warns(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(prelude="sys.modules['uvloop'] = None").start()
    assert "asyncio's slower event loop is used" in daemon.log()
    assert daemon.lease("orders", ttl=60)["port"]
    assert daemon.stop() == 0
