"""Other programs at a port: sockets bound as theirs would be, and servers that die with connections."""

from __future__ import annotations

import errno
import socket


def foreign(
    address: str, port: int, *, reuse: bool = False, listen: bool = False, udp: bool = False, v6only: bool | None = None
) -> socket.socket:
    """Bind as another program would."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    one = socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::" if v6only is None else v6only)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        one.bind((address, port))
        if listen:
            one.listen()
    except BaseException:
        one.close()
        raise
    return one


def can_bind(address: str, port: int, **options) -> bool:
    """Return whether a foreign process gets the port; EADDRINUSE is the only refusal."""
    try:
        foreign(address, port, **options).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


SERVER = """
import socket, sys
address, port, reuse, leave = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "reuse", sys.argv[4]
server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
server.bind((address, port)); server.listen(); print("listens", flush=True)
connection, _ = server.accept()
if leave == "TIME_WAIT":
    connection.close()
print("accepted", flush=True)
sys.stdin.read()
"""


def leave_behind(spawn, address: str, port: int, leave: str, *, reuse: str) -> socket.socket:
    """Let a server die with a connection that it has closed (TIME_WAIT), or with an open one. Returns the client."""
    server = spawn(address, str(port), reuse, leave, python=SERVER)
    assert server.stdout.readline() == "listens\n"
    client = socket.create_connection((address, port))
    assert server.stdout.readline() == "accepted\n"
    if leave == "TIME_WAIT":
        assert client.recv(1) == b""
        client.close()
    server.kill()
    server.wait()
    return client
