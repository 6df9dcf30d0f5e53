"""The sockets that portd listens on: those that the service manager has passed, and those that it opens itself.

This module must not know what is spoken on them.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from portd.config import Paths, Settings, http_addresses
from portd.core.errors import StateInUse


def open_listeners(settings: Settings, paths: Paths, passed: Sequence[socket.socket]) -> list[socket.socket]:
    """Open every socket of the configuration that has not been passed; all of them or none.

    Raises StateInUse when one can't be had; it says which.
    """
    has = {(one.family, one.type) for one in passed if one.family == socket.AF_UNIX}
    addresses = {one.getsockname()[:2] for one in passed if one.family != socket.AF_UNIX}
    listen = settings.listen
    with ExitStack() as undo:
        opened = []
        for kind, place, usual in (
            (socket.SOCK_STREAM, listen.socket, paths.socket),
            (socket.SOCK_SEQPACKET, listen.handoff, paths.handoff),
        ):
            path = place if place is not None else usual
            if path and (socket.AF_UNIX, kind) not in has:
                opened.append(undo.enter_context(open_unix(path, kind, paths.socket_mode)))
        opened += [
            undo.enter_context(open_tcp(*address))
            for address in http_addresses(settings, paths)
            if address not in addresses
        ]
        undo.pop_all()
    return opened


def is_off(settings: Settings, listener: socket.socket) -> bool:
    """Tell whether the configuration turns off what this socket, a passed one, is for."""
    listen = settings.listen
    if listener.family != socket.AF_UNIX:
        return listen.http in ("", ())
    return (listen.handoff if listener.type == socket.SOCK_SEQPACKET else listen.socket) == ""


def describe_listener(listener: socket.socket, scheme: str = "http") -> str:
    """Say where a socket listens, as people write it."""
    if listener.family == socket.AF_UNIX:
        return str(listener.getsockname())
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def open_unix(path: str, kind: socket.SocketKind, mode: int) -> socket.socket:
    """Listen on a unix socket, over one that a dead daemon left; raises StateInUse when a live one answers there."""
    place = Path(path)
    place.parent.mkdir(mode=0o755 if mode == 0o666 else 0o700, parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX, kind) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
            raise StateInUse(f"another daemon answers at {path}: stop it, or set [listen] socket")
        place.unlink(missing_ok=True)
        listener.bind(path)
        place.chmod(mode)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise StateInUse(f"{path} can't be served: {error}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def open_tcp(host: str, port: int) -> socket.socket:
    """Bind a TCP address; raises StateInUse when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, True)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StateInUse(f"http://{host}:{port} can't be served: {error.strerror}; set [listen] http") from error
    return listener
