"""The handoff: sockets that the daemon bound, received through its socket, so that there is no gap at all.

One message asks, one answers, on a SOCK_SEQPACKET unix socket; the sockets come with it (SCM_RIGHTS, unix(7)).
"""

from __future__ import annotations

import _socket
from array import array

from . import documents, peers
from .errors import DaemonUnavailable, PortdError, ProtocolError, problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .endpoints import Endpoint
    from .types import LeaseDocument

MESSAGE_MAX_BYTES = 256 * 1024
"""The longest answer: a lease with all the metadata that it may have. A longer one would be cut, and is refused."""
SOCKETS_MAX = 2
"""A lease of `both` protocols has two sockets; more than this is not portd."""
ANSWER_TIMEOUT_S = 10.0
"""Seconds for the sockets to come: what a call of the API may take."""


class NoHandoff(PortdError):
    """Nobody hands sockets over there: no unix socket leads to that daemon, or it serves none. Bind instead."""


def receive(endpoint: Endpoint, message: Mapping[str, Any]) -> tuple[LeaseDocument, list[int]]:
    """Ask the daemon at `endpoint` for a lease's sockets; returns descriptors, bound and close-on-exec.

    Raises Problem when they are refused, NoHandoff when nobody hands over there, ProtocolError, DaemonUnavailable.
    """
    path = endpoint.handoff_path
    if not path:
        raise NoHandoff(f"{endpoint.url}: sockets are handed over through a unix socket only")
    try:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    except PermissionError as error:  # under `portd run --confine`
        raise NoHandoff(f"{path}: this process may open no such socket") from error
    try:
        connection.settimeout(ANSWER_TIMEOUT_S)
        try:
            peers.check_directory(endpoint)
            connection.connect(path)
            peers.check_unix(connection)
        except OSError as error:
            raise NoHandoff(f"{path}: {(error.strerror or str(error)).lower()}") from error
        connection.sendall(documents.encode(dict(message)))
        data, descriptors, is_whole = _receive(connection)
    except OSError as error:  # asked, but not answered
        raise DaemonUnavailable([(f"unix://{path}", (error.strerror or str(error)).lower())]) from error
    finally:
        connection.close()
    try:
        return _understand(data, is_whole), descriptors
    except BaseException:
        for descriptor in descriptors:
            _socket.close(descriptor)
        raise


def _receive(connection: Any) -> tuple[bytes, list[int], bool]:
    """Receive one message (socket.recv_fds would do, but drops the flag that keeps descriptors from children)."""
    space = _socket.CMSG_SPACE(SOCKETS_MAX * array("i").itemsize)
    data, ancillary, flags, _ = connection.recvmsg(MESSAGE_MAX_BYTES, space, _socket.MSG_CMSG_CLOEXEC)
    descriptors = array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    return data, list(descriptors), not flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC)


def _understand(data: bytes, is_whole: bool) -> LeaseDocument:
    if not data or not is_whole:
        raise ProtocolError("the handoff's answer is cut off")
    try:
        answer = documents.decode(data)
    except ValueError:
        raise ProtocolError("the handoff's answer is not JSON") from None
    if "problem" in answer:
        raise problem(answer["problem"], int(answer["problem"].get("status", 0)))
    return answer["lease"]  # type: ignore[no-any-return]
