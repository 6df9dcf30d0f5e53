"""`portd run`: leases for itself, then becomes the command. The same pid goes on, so the lease goes with it."""

from __future__ import annotations

import os
import sys

from portd._client import calls
from portd._client.client import Client
from portd.cli import wishing
from portd.cli.options import Command, Option, UsageError, port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

FIRST_FD = 3
"""Where passed sockets start (sd_listen_fds(3), SD_LISTEN_FDS_START)."""


def endpoint(text: str) -> tuple[str, int | None]:
    """Read NAME or NAME:WISH."""
    name, colon, wish = text.partition(":")
    if not name or name == "main":
        raise ValueError("another name than 'main' is wanted: that is the first port's")
    return name, port(wish) if colon else None


def run(values: dict[str, Any]) -> int:
    """Lease, prepare, and become the command; returns only when that is impossible."""
    names = ["main", *(name for name, _ in values["endpoint"])]
    _check_placeholders(values["command"], names)
    client = Client()
    leases = client.call(calls.grant(_wishes(values)))  # type: ignore[arg-type]
    by_name = dict(zip(names, leases, strict=True))
    try:
        environ = {**os.environ, **_environment(by_name, client.url)}
        command = [_filled(word, by_name) for word in values["command"]]
        if values["confine"]:
            from portd.cli.confining import confine

            confine([lease["port"] for lease in leases if lease["protocol"] != "udp"])
        if values["socket"]:
            _pass_sockets(client, leases, environ)
        _restore_signals()
        sys.stdout.flush()
        os.execvpe(command[0], command, environ)
    except OSError as error:
        for lease in leases:
            client.call(calls.release(lease["id"], lease.get("token")))
        print(
            f"portd: can't run {values['command'][0]}: {error.strerror or error}; its leases are released",
            file=sys.stderr,
        )
        return 1
    except BaseException:
        for lease in leases:
            client.call(calls.release(lease["id"], lease.get("token")))
        raise


def _wishes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Make one wish for each endpoint. The check and the announcement are the main endpoint's alone."""
    main = wishing.wish(values)
    shared = {key: value for key, value in main.items() if key not in {"port", "exact", "check", "announce"}}
    others = [
        {**shared, "endpoint": name, **({} if wish is None else {"port": wish})} for name, wish in values["endpoint"]
    ]
    return [main, *others]


def _environment(leases: dict[str, Any], url: str) -> dict[str, str]:
    """Make the variables that tell the command what it has; other endpoints get theirs with _NAME."""
    made = {"PORTD_URL": url, "HOST": leases["main"]["address"]}
    for name, lease in leases.items():
        suffix = "" if name == "main" else "_" + name.upper().replace("-", "_")
        made[f"PORT{suffix}"] = str(lease["port"])
        made[f"PORTD_LEASE{suffix}"] = lease["id"]
        made[f"PORTD_TOKEN{suffix}"] = lease.get("token", "")
    return made


def _filled(word: str, leases: dict[str, Any]) -> str:
    """Put ports and address where a word of the command asks for them."""
    word = word.replace("{port}", str(leases["main"]["port"])).replace("{host}", leases["main"]["address"])
    for name, lease in leases.items():
        word = word.replace(f"{{port:{name}}}", str(lease["port"]))
    return word


def _check_placeholders(command: Sequence[str], names: Sequence[str]) -> None:
    for word in command:
        for part in word.split("{port:")[1:]:
            name = part.partition("}")[0]
            if name not in names:
                raise UsageError(f"{{port:{name}}} has no endpoint: add --endpoint {name}")


def _pass_sockets(client: Client, leases: Sequence[Any], environ: dict[str, str]) -> None:
    """Have the sockets handed over, listening, and lay them from descriptor 3 on (sd_listen_fds(3))."""
    from portd._client.handoff import receive

    sockets: list[int] = []
    names: list[str] = []
    for lease in leases:
        _, received = receive(client.endpoint, {"lease": lease["id"], "listen": True})
        sockets += received
        names += [lease["endpoint"]] * len(received)
    import fcntl

    end = FIRST_FD + len(sockets)
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, end) for fd in sockets]  # out of the way of the places to fill
    for place, fd in enumerate(above, FIRST_FD):
        os.dup2(fd, place, inheritable=True)
        os.set_blocking(place, True)  # as the command expects, whatever the daemon had them at
    environ["LISTEN_PID"] = str(os.getpid())
    environ["LISTEN_FDS"] = str(len(sockets))
    environ["LISTEN_FDNAMES"] = ":".join(names)


def _restore_signals() -> None:
    """Give the command the signals that it would have had without Python in between (exec keeps what is ignored)."""
    import _signal  # type: ignore[import-not-found]  # the C half: signal itself costs 3 ms

    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


COMMANDS = (
    Command(
        "run",
        ["SERVICE", "-- COMMAND"],
        "Start a service on a leased port",
        run,
        (
            *(option for option in wishing.OPTIONS if option.key != "pid"),
            Option(
                "--endpoint",
                "NAME[:WISH]",
                "one more port, for metrics or the like: PORT_NAME, {port:NAME}",
                endpoint,
                many=True,
            ),
            Option(
                "--socket", "", "pass the listening sockets from file descriptor 3 on (LISTEN_FDS, as systemd does)"
            ),
            Option("--confine", "", "let COMMAND and its children bind their leased TCP ports and no others"),
            Option("--json", "", "errors as problem documents"),
        ),
        """
COMMAND replaces portd (same pid), so the lease ends when the service does, however it ends.
In COMMAND {port} and {host} are filled in; its environment has PORT, HOST, PORTD_LEASE, PORTD_TOKEN and PORTD_URL.

    portd run orders -- python3 -m http.server {port}
    portd run orders --check http:/healthz --endpoint metrics -- ./orders --listen {port} --metrics {port:metrics}
    portd run orders --socket -- gunicorn orders:app

--confine is Landlock (Linux 6.7 and up; an error where it is missing). It covers bind() of TCP sockets only: not UDP,
not MPTCP, not listen() on a socket that was never bound, and it does not tell addresses apart. COMMAND can gain no
privileges then (no setuid programs, no sudo).""",
    ),
)
