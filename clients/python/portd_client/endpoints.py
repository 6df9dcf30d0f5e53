"""Where a daemon may be: PORTD_URL, else the user's socket, the system's socket, loopback TCP. It opens nothing."""

from __future__ import annotations

from .errors import InvalidUrl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SYSTEM_SOCKET = "/run/portd/portd.sock"
LOOPBACK_PORT = 7783
SESSIONS = "/run/user"
"""Where systemd makes XDG_RUNTIME_DIR of each user with a session, or with lingering (pam_systemd(8))."""


class Endpoint:
    """One place. Over a unix socket `path` is set; else `host` and `port`, with TLS where `tls` says so.

    `runtime_directory` is set where no setting named the place: the directory that must be the user's alone.
    """

    __slots__ = ("host", "path", "port", "runtime_directory", "tls")

    def __init__(
        self, path: str = "", host: str = "", port: int = 0, *, tls: bool = False, runtime_directory: str = ""
    ) -> None:
        self.path = path
        self.host = host
        self.port = port
        self.tls = tls
        self.runtime_directory = runtime_directory

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
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        own = [Endpoint(user_socket(runtime))]
    else:  # cron, su, sudo, ssh without a session: the daemon may have been started in one, or just like this
        own = [
            Endpoint(user_socket(directory), runtime_directory=directory)
            for directory in (f"{SESSIONS}/{uid}", stand_in(environ, uid))
        ]
    return [*own, Endpoint(SYSTEM_SOCKET), Endpoint(host="127.0.0.1", port=LOOPBACK_PORT)]


def stand_in(environ: Mapping[str, str], uid: int) -> str:
    """Return the user's directory in the system's temporary directory, for hosts without /run/user/UID."""
    temporary = next((environ[name] for name in ("TMPDIR", "TEMP", "TMP") if environ.get(name)), "/tmp")
    return f"{temporary.rstrip('/')}/portd-runtime-{uid}"


def user_socket(runtime: str) -> str:
    """Return the path of the user daemon's socket in a runtime directory."""
    return f"{runtime}/portd/portd.sock"
