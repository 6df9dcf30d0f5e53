"""The sockets that portd listens on: those that the service manager has passed, and those that it opens itself.

This module must not know their protocols.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from portd.config import Paths, Settings, dns_addresses, http_addresses
from portd.core.errors import StateInUse, StateUnusable


def open_listeners(settings: Settings, paths: Paths, passed: Sequence[socket.socket]) -> list[socket.socket]:
    """Open every socket of the configuration that has not been passed; all of them or none.

    Raises StateInUse where another daemon or program has one, StateUnusable where one can't be made.
    """
    has = {(one.family, one.type) for one in passed if one.family == socket.AF_UNIX}
    addresses = {one.getsockname()[:2] for one in passed if one.family != socket.AF_UNIX}
    listen = settings.listen
    with ExitStack() as undo:
        opened = []
        for kind, setting, configured, usual in (
            (socket.SOCK_STREAM, "socket", listen.socket, paths.socket),
            (socket.SOCK_SEQPACKET, "handoff", listen.handoff, paths.handoff),
        ):
            path = configured if configured is not None else usual
            if path and (socket.AF_UNIX, kind) not in has:
                opened.append(undo.enter_context(open_unix(path, kind, paths.socket_mode, setting)))
        opened += [
            undo.enter_context(open_tcp(*address))
            for address in http_addresses(settings, paths)
            if address not in addresses
        ]
        undo.pop_all()
    return opened


def split_dns(settings: Settings, passed: Sequence[socket.socket]) -> tuple[list[socket.socket], list[socket.socket]]:
    """Split passed sockets into those of DNS and all others.

    DNS has the datagram sockets, and the TCP sockets at the address of one of these or at one of [dns] listen.
    """
    internet = [one for one in passed if one.family != socket.AF_UNIX]
    addresses = {one.getsockname()[:2] for one in internet if one.type == socket.SOCK_DGRAM}
    addresses.update(dns_addresses(settings))
    of_dns = [one for one in internet if one.getsockname()[:2] in addresses]
    return of_dns, [one for one in passed if one not in of_dns]


def is_off(settings: Settings, listener: socket.socket) -> bool:
    """Return whether the configuration disables what this socket, a passed one, is for."""
    listen = settings.listen
    if listener.family != socket.AF_UNIX:
        return listen.http in ("", ())
    return (listen.handoff if listener.type == socket.SOCK_SEQPACKET else listen.socket) == ""


def describe_listener(listener: socket.socket, scheme: str = "http") -> str:
    """Return the address of a socket as people write it."""
    if listener.family == socket.AF_UNIX:
        return str(listener.getsockname())
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def open_unix(path: str, kind: socket.SocketKind, mode: int, setting: str = "socket") -> socket.socket:
    """Listen on a unix socket, replacing one that a dead daemon left.

    `setting` is the key in [listen] that the path comes from. Raises StateInUse where a live daemon answers there,
    StateUnusable where the directory is not safe or the socket can't be made.
    """
    remedy = f"set [listen] {setting}"
    _make_directory(Path(path).parent, 0o755 if mode == 0o666 else 0o700, remedy)
    try:
        listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise StateUnusable(f"{path} can't be served: {error.strerror}") from error
    with ExitStack() as undo:
        undo.callback(listener.close)
        try:
            with suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX, kind) as probe:
                probe.settimeout(1.0)
                probe.connect(path)
                raise StateInUse(f"another daemon answers at {path}: stop it, or {remedy}")
            if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise StateUnusable(f"{path} can't be served: a file that is not a socket has this name; {remedy}")
            Path(path).unlink(missing_ok=True)
            listener.bind(path)
            Path(path).chmod(mode)
            listener.listen(1024)
        except OSError as error:
            raise StateUnusable(f"{path} can't be served: {error.strerror or error}; {remedy}") from error
        undo.pop_all()
    return listener


def open_tcp(host: str, port: int) -> socket.socket:
    """Listen on a TCP address; raises StateInUse when it is taken, StateUnusable when it is not to be had here."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as undo:
        try:
            listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            undo.callback(listener.close)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, True)
            listener.bind((host, port))
        except OSError as error:
            kind = StateInUse if error.errno == errno.EADDRINUSE else StateUnusable
            raise kind(f"{url} can't be served: {error.strerror}; set [listen] http") from error
        undo.pop_all()
    return listener


def _make_directory(directory: Path, mode: int, remedy: str) -> None:
    """Make a directory for sockets, parents included, and refuse one in which another user could replace them.

    Raises StateUnusable.
    """
    missing = [one for one in (directory, *directory.parents) if not one.exists()]
    try:
        for one in reversed(missing):
            one.mkdir(mode=mode, exist_ok=True)
    except OSError as error:
        raise StateUnusable(f"{error.filename} can't be made for the socket: {error.strerror}; {remedy}") from error
    try:
        unsafe = next(filter(None, (_danger(one, directory) for one in (directory, *directory.parents))), None)
    except OSError as error:
        raise StateUnusable(f"{error.filename} can't be checked: {error.strerror}; {remedy}") from error
    if unsafe:
        raise StateUnusable(f"{unsafe}: others could put their socket in the place of portd's; {remedy}")


def _danger(directory: Path, innermost: Path) -> str | None:
    """Say how another user could replace what is in a directory; None where nobody but root can.

    A sticky directory is safe as a parent, since only a directory's owner can rename it there (unlink(2)).
    """
    status = directory.stat()
    if status.st_uid not in (0, os.geteuid()) and directory.parent != directory:
        return f"{directory} belongs to {_user(status.st_uid)}"
    writable = status.st_mode & (stat.S_IWOTH | (0 if _is_private(status.st_gid) else stat.S_IWGRP))
    if writable and (directory == innermost or not status.st_mode & stat.S_ISVTX):
        return f"{directory} can be written by other users"
    return None


def _is_private(gid: int) -> bool:
    """Return whether a group is the process's own alone (a user private group)."""
    try:
        members = set(grp.getgrgid(gid).gr_mem)
    except KeyError:
        members = set()
    return gid == os.getegid() and members <= {_user(os.geteuid())}


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
