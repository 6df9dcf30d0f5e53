"""Where a daemon may be: PORTD_URL, else the user's socket, the system's socket, loopback TCP. It opens nothing."""

from __future__ import annotations

import os

from .errors import InvalidUrl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SYSTEM_SOCKET = "/run/portd/portd.sock"
LOOPBACK_PORT = 7783


class Endpoint:
    """One place. Over a unix socket `path` is set; else `host` and `port`, with TLS where `tls` says so."""

    __slots__ = ("host", "path", "port", "tls")

    def __init__(self, path: str = "", host: str = "", port: int = 0, *, tls: bool = False) -> None:
        self.path = path
        self.host = host
        self.port = port
        self.tls = tls

    @property
    def url(self) -> str:
        """Return the place as PORTD_URL writes it."""
        return f"unix://{self.path}" if self.path else f"http{'s' if self.tls else ''}://{self.authority}"

    @property
    def authority(self) -> str:
        """Return what goes into the Host field; over a unix socket "localhost" stands for the daemon."""
        if self.path:
            return "localhost"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def handoff_path(self) -> str:
        """Return the path of the handoff socket, the neighbour of the unix socket; "" where there is none."""
        return self.path.rpartition("/")[0] + "/handoff.sock" if self.path else ""


def parse(url: str) -> Endpoint:
    """Read a PORTD_URL: unix:///path/portd.sock, http://host:port or https://host:port; raises InvalidUrl."""
    scheme, separator, rest = url.partition("://")
    if scheme == "unix" and rest.startswith("/"):
        return Endpoint(rest)
    authority = rest.rstrip("/")
    host, _, port = authority.rpartition(":")
    if (
        scheme in {"http", "https"}
        and separator
        and host
        and port.isdecimal()
        and 0 < int(port) < 65536
        and "/" not in authority
        and "@" not in authority
    ):
        return Endpoint(host=host.removeprefix("[").removesuffix("]"), port=int(port), tls=scheme == "https")
    raise InvalidUrl(f"{url!r} is no URL of a portd: write unix:///path/portd.sock or http://host:port")


def candidates(environ: Mapping[str, str], uid: int) -> list[Endpoint]:
    """List where to look, best first; raises InvalidUrl for a PORTD_URL that can't be read."""
    if url := environ.get("PORTD_URL"):
        return [parse(url)]
    own = user_socket(environ, uid)
    is_ours = bool(environ.get("XDG_RUNTIME_DIR")) or _is_own(own.removesuffix("/portd/portd.sock"), uid)
    return [
        *([Endpoint(own)] if is_ours else []),
        Endpoint(SYSTEM_SOCKET),
        Endpoint(host="127.0.0.1", port=LOOPBACK_PORT),
    ]


def user_socket(environ: Mapping[str, str], uid: int) -> str:
    """Return the path of the user daemon's socket (XDG Base Directory Specification)."""
    runtime = environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        temporary = next((environ[name] for name in ("TMPDIR", "TEMP", "TMP") if environ.get(name)), "/tmp")
        runtime = f"{temporary.rstrip('/')}/portd-runtime-{uid}"
    return f"{runtime}/portd/portd.sock"


def _is_own(directory: str, uid: int) -> bool:
    """Tell whether a directory under the temporary one is the user's: anybody can make one there, and pose as portd."""
    try:
        return os.stat(directory).st_uid == uid
    except OSError:
        return True  # not there: the socket is named among what was tried
