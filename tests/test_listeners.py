"""The directories that portd serves its sockets in."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from portd.config import parse
from portd.core.errors import StateUnusable
from portd.listeners import open_unix, split_dns

ANOTHER = 4242
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")


def served(path: Path, mode: int = 0o600) -> None:
    """Open a listener and close it."""
    open_unix(str(path), socket.SOCK_STREAM, mode).close()


def test_missing_runtime_directories_are_made_private_at_every_level(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        served(tmp_path / "portd-runtime" / "portd" / "portd.sock")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "portd-runtime", tmp_path / "portd-runtime/portd")] == [
        0o700,
        0o700,
    ]


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "portd"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(StateUnusable, match=str(directory)):
        served(directory / "portd.sock")
    assert list(directory.iterdir()) == []


def test_directory_below_one_that_others_can_write_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "shared" / "portd"
    directory.mkdir(parents=True)
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(StateUnusable, match="shared"):
        served(directory / "portd.sock")
    (tmp_path / "shared").chmod(0o1777)  # sticky, as /tmp: nobody can replace what is not theirs
    served(directory / "portd.sock")


@needs_root
@pytest.mark.parametrize("level", ["portd-runtime", "portd-runtime/portd"])
def test_directory_of_another_user_is_refused(tmp_path: Path, level: str) -> None:
    directory = tmp_path / "portd-runtime" / "portd"
    directory.mkdir(parents=True)
    os.chown(tmp_path / level, ANOTHER, ANOTHER)
    with pytest.raises(StateUnusable, match="belongs to"):
        served(directory / "portd.sock")


def test_passed_sockets_of_dns_are_separated_from_those_of_http() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as http,
        socket.create_server(("127.0.0.1", 0)) as stream,
        socket.create_server(("127.0.0.1", 0)) as stream_alone,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram,
        socket.socket(socket.AF_UNIX) as local,
    ):
        datagram.bind(stream.getsockname())
        settings = parse(f'[dns]\nlisten = "127.0.0.1:{stream_alone.getsockname()[1]}"')
        of_dns, others = split_dns(settings, [http, stream, stream_alone, datagram, local])
        assert of_dns == [stream, stream_alone, datagram]
        assert others == [http, local]
