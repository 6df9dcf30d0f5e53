"""The handoff: sockets that the daemon bound, received through its socket (SCM_RIGHTS over SOCK_SEQPACKET, unix(7))."""

from __future__ import annotations

import os
import socket

from portd_client import documents
from portd_client.errors import PortdError, ProtocolError, problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from portd_client.endpoints import Endpoint
    from portd_client.types import LeaseDocument

MESSAGE_MAX_BYTES = 65_536
SOCKETS_MAX = 4
"""A lease has two sockets at most (tcp and udp); more than this is not portd."""
ANSWER_TIMEOUT_S = 5.0
"""Seconds for the sockets to come: the daemon only binds and sends."""


class NoHandoff(PortdError):
    """Nobody hands sockets over there: no unix socket leads to that daemon, or it serves none for this."""


def receive(endpoint: Endpoint, message: Mapping[str, Any]) -> tuple[LeaseDocument, list[int]]:
    """Ask the daemon at `endpoint` for a lease's sockets; returns descriptors, bound and close-on-exec.

    Raises Problem when they are refused, NoHandoff when nobody hands over there, ProtocolError.
    """
    path = endpoint.handoff_path
    if not path:
        raise NoHandoff(f"{endpoint.url}: sockets are handed over through a unix socket only")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.connect(path)
            connection.sendall(documents.encode(dict(message)))
            data, descriptors, flags, _ = socket.recv_fds(connection, MESSAGE_MAX_BYTES, SOCKETS_MAX,
                                                          socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise NoHandoff(f"{path}: {(error.strerror or str(error)).lower()}") from error
    try:
        return _understand(data, flags), descriptors
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _understand(data: bytes, flags: int) -> LeaseDocument:
    if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise ProtocolError("the handoff's answer is cut off")
    try:
        answer = documents.decode(data)
    except ValueError:
        raise ProtocolError("the handoff's answer is not JSON") from None
    if "problem" in answer:
        raise problem(answer["problem"], int(answer["problem"].get("status", 0)))
    return answer["lease"]  # type: ignore[no-any-return]
