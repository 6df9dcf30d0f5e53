"""Where the client looks for a daemon."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from clients.conformance.bed import DEADLINE_S, Daemon
from portd_client import endpoints
from portd_client.client import Client
from portd_client.errors import DaemonUnavailable, ProtocolError


def test_portd_url_is_the_only_place_where_it_is_set() -> None:
    for url in ("unix:///tmp/x/portd.sock", "http://127.0.0.1:7783", "http://[::1]:80", "https://ports.example:443"):
        assert [place.url for place in endpoints.candidates({"PORTD_URL": url}, 1000)] == [url]


def test_without_it_users_socket_comes_before_systems_and_loopback() -> None:
    assert [place.url for place in endpoints.candidates({"XDG_RUNTIME_DIR": "/run/user/7"}, 7)] == [
        "unix:///run/user/7/portd/portd.sock",
        "unix:///run/portd/portd.sock",
        "http://127.0.0.1:7783",
    ]


def test_daemon_and_client_meet_without_a_session_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from portd.config import user_paths

    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    looked_at = [place.path for place in endpoints.candidates({"TMPDIR": str(tmp_path)}, os.getuid())]
    assert user_paths().socket in looked_at
    assert looked_at[:2] == [
        f"/run/user/{os.getuid()}/portd/portd.sock",
        f"{tmp_path}/portd-runtime-{os.getuid()}/portd/portd.sock",
    ]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "portd.sock",
        "unix:relative",
        "ftp://x:1",
        "http://",
        "http://x:y",
        "http://x:0",
        "http://x:65536",
        "http://a/b:80",
        "http://u@x:80",
    ],
)
def test_a_url_that_cannot_be_read_says_how_one_looks(url: str) -> None:
    with pytest.raises(ValueError, match=r"unix:///path/portd\.sock"):
        endpoints.parse(url)


def test_the_first_that_answers_is_taken(daemon: Daemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "portd").mkdir()
    (tmp_path / "portd" / "portd.sock").symlink_to(daemon.directory / "portd.sock")
    monkeypatch.delenv("PORTD_URL", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    client = Client()
    next(client.leases(), None)
    assert client.url == f"unix://{tmp_path}/portd/portd.sock"


def test_daemon_unavailable_names_every_endpoint_that_was_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(endpoints, "SYSTEM_SOCKET", str(tmp_path / "none.sock"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(endpoints, "LOOPBACK_PORT", port)
    monkeypatch.delenv("PORTD_URL", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(DaemonUnavailable) as caught:
        next(Client().leases(), None)
    assert [url for url, _ in caught.value.tried] == [
        f"unix://{tmp_path}/portd/portd.sock",
        f"unix://{tmp_path}/none.sock",
        f"http://127.0.0.1:{port}",
    ]


def test_something_else_that_listens_there_is_not_taken_for_daemon() -> None:
    source = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True);"
        "c, _ = s.accept(); c.recv(9); c.sendall(b'220 mail ready\\r\\n\\r\\n'); c.close()"
    )
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        url = f"http://127.0.0.1:{other.stdout.readline().strip()}"
        with pytest.raises(ProtocolError):
            next(Client(url).leases(), None)
        other.wait(DEADLINE_S)


def test_daemon_that_hangs_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DaemonUnavailable, match=r"0\.2 s"):
        next(Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2).leases(), None)


def test_importing_client_and_asking_for_port_imports_nothing_heavy(daemon: Daemon) -> None:
    source = (
        "import sys, portd_client; portd_client.Client().grant({'service': 'light', 'ttl': 60});"
        "print(sorted({'re', 'json', 'socket', 'typing', 'enum', 'asyncio', 'threading', 'ssl', 'logging'}"
        " & set(sys.modules)))"
    )
    # -S: an installed environment's .pth files may import re and more before the first line of ours
    done = subprocess.run(
        [sys.executable, "-S", "-c", source],
        env=daemon.environ,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert done.stdout == "[]\n"
