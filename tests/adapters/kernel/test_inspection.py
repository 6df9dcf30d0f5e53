"""The inspector and its client: a real inspector behind a real socket, and what a hostile client gets of it."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd import inspector
from portd.adapters.kernel import inspection
from portd.core.ownership import Credential

NOBODY = pwd.getpwnam("nobody")
PROGRAM = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"


class Inspector:
    """An inspector as systemd starts it, on a socket that `uid` owns."""

    def __init__(self, directory: Path, uid: int) -> None:
        self.path = str(directory / "inspector.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen()
        os.chmod(self.path, 0o666)  # who may open it is systemd's part; here everybody reaches the inspector
        os.chown(self.path, uid, -1)
        code = (
            "import os, runpy; os.environ['LISTEN_PID'] = str(os.getpid()); "
            "runpy.run_module('portd.inspector', run_name='__main__')"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self._listener.fileno()), "-c", code],
            pass_fds=[self._listener.fileno()],
            env={**os.environ, "LISTEN_FDS": "1"},
            stderr=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._listener.close()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(10)
        connection.connect(self.path)
        return connection


@pytest.fixture
def served(tmp_path, as_root):
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents[:3]:
        os.chmod(parent, 0o755)
    started = Inspector(tmp_path, NOBODY.pw_uid)
    yield started
    started.stop()


@pytest.fixture
def client(served):
    asking = inspection.InspectorClient(served.path, 10.0)
    asking.connect()
    yield asking
    asking.close()


@pytest.fixture
def server(spawn):
    """A process of root's with a listening socket and a lease's id and token in its environment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = spawn(
            "/usr/bin/sleep",
            "60",
            pass_fds=[listener.fileno()],
            env={"PORTD_LEASE": "lease-1", "PORTD_TOKEN": "secret", "HIDDEN": "a password"},
        )
        inode = os.fstat(listener.fileno()).st_ino
        yield child.pid, inode


def test_another_users_process_is_seen_through_the_inspector(client, server, as_nobody):
    pid, inode = server
    with as_nobody():
        assert inspection.DIRECT.find_sockets({inode}, [pid]) == {}
        assert client.find_sockets({inode}, [os.getppid(), pid]) == {inode: pid}
        assert client.exe(pid) == os.path.realpath("/usr/bin/sleep")
        assert client.credentials(pid) == (Credential("lease-1", hashlib.sha256(b"secret").digest()),)
        assert client.pid_namespace(pid) == os.readlink("/proc/self/ns/pid")
    assert client.problem is None


def test_without_inspector_others_are_hidden_and_problem_says_so(tmp_path, server, as_nobody):
    pid, inode = server
    client = inspection.InspectorClient(str(tmp_path / "missing.sock"), 1.0)
    with as_nobody():
        answers = client.find_sockets({inode}, [pid]), client.exe(pid), client.credentials(pid)
    assert answers == ({}, None, ())
    assert "portd-inspector.socket" in client.problem


def test_a_search_finds_every_socket_over_many_batches(client, server):
    pid, inode = server
    others = [*range(1 << 23, (1 << 23) + 5000)]
    assert client.find_sockets({inode, *range(1 << 40, (1 << 40) + 5000)}, [*others, pid]) == {inode: pid}


def test_a_silent_inspector_delays_a_caller_once_a_second(served, server, as_nobody):
    pid, _ = server
    os.kill(served.process.pid, signal.SIGSTOP)
    client = inspection.InspectorClient(served.path, 0.05)
    with as_nobody():
        client.exe(pid)
        began = time.process_time()
        assert [client.exe(pid) for _ in range(100)] == [None] * 100
    assert client.problem is not None
    assert time.process_time() - began < 5  # a hundred answers without a connection


def test_the_client_connects_again_after_the_inspector_restarts(
    tmp_path, client, served, server, as_nobody, wait_until
):
    served.process.kill()
    served.process.wait()
    os.unlink(served.path)
    with as_nobody():
        assert client.exe(server[0]) is None
    after = Inspector(tmp_path, NOBODY.pw_uid)
    try:
        with as_nobody():
            wait_until(lambda: client.exe(server[0]) is not None)
        assert client.problem is None
    finally:
        after.stop()


def test_only_root_and_the_owner_of_the_socket_are_served(served, spawn):
    code = (
        "import socket, sys; c = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); c.connect(sys.argv[1]); "
        'c.settimeout(10); c.send(b\'{"question":"exe","pid":1}\'); print(len(c.recv(9999)))'
    )
    who = ("--reuid=1", "--reuid=65534", "--reuid=0")
    answers = [
        subprocess.run(
            ["setpriv", user, "--clear-groups", "/usr/bin/python3", "-c", code, served.path],
            capture_output=True,
            text=True,
            check=False,
        )
        for user in who
    ]
    assert [done.stdout.strip() not in ("", "0") for done in answers] == [False, True, True]


HOSTILE = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"question":"exe","pid":"self"}',
    b'{"question":"exe","pid":"../etc/shadow"}',
    b'{"question":"exe","pid":-1}',
    b'{"question":"exe","pid":0}',
    b'{"question":"exe","pid":true}',
    b'{"question":"exe","pid":1.0}',
    b'{"question":"exe","pid":1e400}',
    b'{"question":"exe","pid":1,"root":"/etc"}',
    b'{"question":"read","path":"/etc/shadow"}',
    b'{"question":"environ","pid":1}',
    b'{"question":"find","inodes":[1],"pids":["self"]}',
    b'{"question":"find","inodes":[1],"pids":[1],"root":"/"}',
    b'{"question":"find","inodes":1,"pids":1}',
    json.dumps({"question": "find", "inodes": [1] * 4097, "pids": [1]}).encode(),
    json.dumps({"question": "find", "inodes": [1], "pids": [1] * 4097}).encode(),
    b"[" * 100_000,
    b'{"question":"exe","pid":' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("message", HOSTILE, ids=lambda message: repr(message[:40]))
def test_what_is_no_question_ends_the_connection_alone(served, client, message):
    with served.connect() as hostile:
        hostile.send(message)
        assert hostile.recv(9999) == b""
    assert client.exe(os.getpid()) is not None
    assert served.process.poll() is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda e: (
            st.lists(e)
            | st.dictionaries(
                st.sampled_from(["question", "pid", "pids", "inodes"]),
                e | st.sampled_from(["find", "exe", "credentials"]),
            )
        ),
    )
)
def test_an_answer_has_sockets_processes_and_hashes_alone(question):
    try:
        found = json.loads(inspector.answer(json.dumps(question).encode()))
    except (ValueError, RecursionError):
        return
    assert found.keys() == {"answer"}


def test_an_environment_gives_lease_ids_and_hashes_of_tokens_only(served, server):
    with served.connect() as connection:
        connection.send(json.dumps({"question": "credentials", "pid": server[0]}).encode())
        text = connection.recv(1 << 18)
    assert b"lease-1" in text
    assert b"secret" not in text
    assert b"password" not in text


def test_credentials_are_bounded_in_count_and_length():
    many = b"\0".join(b"PORTD_LEASE_%d=a\0PORTD_TOKEN_%d=b" % (n, n) for n in range(1000))
    assert len(inspector.parse_credentials(many)) == inspector.CREDENTIALS_MAX
    assert inspector.parse_credentials(b"PORTD_LEASE=" + b"x" * 5000 + b"\0PORTD_TOKEN=b") == []


def test_more_connections_than_the_bound_are_closed(served, client):
    connections = [served.connect() for _ in range(3 * inspector.CONNECTIONS_MAX)]
    try:
        refused = 0
        for connection in connections:
            try:
                connection.send(b'{"question":"exe","pid":1}')
                refused += connection.recv(9999) == b""
            except (BrokenPipeError, ConnectionResetError):
                refused += 1
        assert refused == len(connections) - inspector.CONNECTIONS_MAX + 1
    finally:
        for connection in connections:
            connection.close()


def test_the_inspector_is_small_and_imports_the_standard_library_alone():
    text = Path(inspector.__file__).read_text()
    names = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert names <= sys.stdlib_module_names
    assert len(text.splitlines()) < 200
