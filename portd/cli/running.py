"""`portd run`: leases for itself, then becomes the command. The pid stays, so the lease stays with it."""

from __future__ import annotations

import os
import sys

from portd._client import calls
from portd._client.client import Client
from portd.cli import assignments, lease_options, placeholders, urls
from portd.cli.leasing import grant
from portd.cli.options import Command, Option, UsageError, label, pair, port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, NoReturn

FIRST_FD = 3
"""Number of the first passed socket (sd_listen_fds(3), SD_LISTEN_FDS_START)."""
NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""Exit statuses of env(1), nohup(1) and the shell."""
BUILTINS = {"cd", "export", "source", ".", "alias", "set", "unset", "ulimit", "umask", "eval", "exec", "trap", "read"}
"""Commands that only a shell has."""


def endpoint(text: str) -> tuple[str, dict[str, Any]]:
    """Read NAME, NAME:PORT or NAME:+OFFSET into a name and the fields that it adds to the request."""
    name, colon, rest = text.partition(":")
    if name == "main":
        raise ValueError("'main' is the endpoint that --port is for")
    label(name)
    if not colon:
        return name, {}
    sign, digits = rest[:1], rest[1:]
    if sign in {"+", "-"}:
        offset = port(digits)
        return name, {"offset": offset if sign == "+" else -offset}
    return name, {"port": lease_options.ports(rest)}


def variable(text: str) -> str:
    """Read the name of an environment variable."""
    if not text or "=" in text or text[0].isdecimal() or not text.replace("_", "a").isalnum():
        raise ValueError("expected the name of an environment variable")
    return text


def assignment(text: str) -> tuple[str, str]:
    """Read NAME=VALUE."""
    name, value = pair(text)
    return variable(name), value


def run(values: dict[str, Any]) -> int:
    """Lease, prepare, and become the command; returns only when that is impossible."""
    _infer(values)
    requests = _requests(values)
    names = [request.get("endpoint", "main") for request in requests]
    texts = [*values["command"], *(value for _, value in values["env"])]
    if missing := placeholders.missing_endpoint(texts, names):
        raise UsageError(f"{missing} has no endpoint: add --endpoint {missing.strip('{}').partition(':')[2]}")
    if values["hold"] == "exclusive" and not values["socket"]:
        raise UsageError("--hold exclusive needs --socket: nobody can bind that port, portd hands the socket over")
    if found := placeholders.suspicious(texts):
        _note(f"{found} is not filled in; the placeholders are {placeholders.SHOWN}")
    client = Client()
    leases = grant(client, requests, values["wait"])
    by_name = dict(zip(names, leases, strict=True))
    try:
        gateway = urls.find_gateway(client)
        environ = _environment(by_name, client.url, values)
        environ["PORTD_PUBLIC_URL"] = public_url = urls.public_url(gateway, leases[0], values["instance"])
        command = [placeholders.fill(word, by_name) for word in values["command"]]
        if sys.stderr.isatty():
            from portd.cli import startup_report

            startup_report.begin(client, leases[0], values["port"], public_url if gateway.is_running else None)
        if values["confine"]:
            from portd.cli.confining import confine

            confine([lease["port"] for lease in leases if lease["protocol"] != "udp"])
        if values["socket"]:
            _pass_sockets(client, leases, environ)
        _restore_signals()
        sys.stdout.flush()
        _execute(command, environ)
    except OSError as error:
        _release(client, leases)
        reason, status = _failure(values["command"][0], error)
        _note(f"{reason}; its leases are released")
        return status
    except BaseException:
        _release(client, leases)
        raise


def _infer(values: dict[str, Any]) -> None:
    """Fill in what the work tree says: the service where none is given, and the instance in a second work tree."""
    from portd.cli import work_trees

    tree = work_trees.find(os.getcwd())
    values["work_tree"] = tree.fields
    if values["service"] is None:
        values["service"] = work_trees.infer_service(tree, os.getcwd())
        if values["instance"] is None:
            values["instance"] = tree.instance


def _requests(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Make one request for each endpoint; check and announcement are the main endpoint's unless said otherwise."""
    main = lease_options.request(values)
    own = {"port", "exact", "check", "announce"}
    main.update(values["work_tree"])
    shared = {key: value for key, value in main.items() if key not in own}
    requests = {"main": main}
    for name, fields in values["endpoint"]:
        if name in requests:
            raise UsageError(f"--endpoint {name} is given twice")
        exact = {"exact": True} if values["exact"] and "port" in fields else {}
        requests[name] = {**shared, "endpoint": name, **fields, **exact}
    for name, check in values["check_endpoint"]:
        if name not in requests:
            raise UsageError(f"--check-endpoint {name}: there is no such endpoint; add --endpoint {name}")
        requests[name]["check"] = check
    return list(requests.values())


def _environment(leases: Mapping[str, Any], url: str, values: dict[str, Any]) -> dict[str, str]:
    """Make the environment of the command."""
    environ = {**os.environ, **assignments.variables(leases, url)}
    _drop_coerced_locale(environ)
    for name in values["port_env"]:
        environ[name] = str(leases["main"]["port"])
    for name, value in values["env"]:
        environ[name] = placeholders.fill(value, leases)
    return environ


def _drop_coerced_locale(environ: dict[str, str]) -> None:
    """Remove the LC_CTYPE that Python sets for itself in the C locale (PEP 538)."""
    if "LC_CTYPE" not in environ:
        return
    try:
        with open("/proc/self/environ", "rb") as file:
            given = b"\0" + file.read()
    except OSError:
        return
    if b"\0LC_CTYPE=" not in given:
        del environ["LC_CTYPE"]


def _execute(command: list[str], environ: dict[str, str]) -> NoReturn:
    """Become the command; a script without `#!` runs under sh, as execvp(3) has it."""
    try:
        os.execvpe(command[0], command, environ)
    except OSError as error:
        import errno

        if error.errno != errno.ENOEXEC:
            raise
        os.execve("/bin/sh", ["sh", _path(command[0], environ), *command[1:]], environ)


def _path(program: str, environ: Mapping[str, str]) -> str:
    """Return the file that exec found for a program."""
    if "/" in program:
        return program
    found = (f"{directory}/{program}" for directory in os.get_exec_path(environ))
    return next((path for path in found if os.access(path, os.X_OK)), program)


def _failure(program: str, error: OSError) -> tuple[str, int]:
    """Explain why a command can't be run; returns the sentence and the exit status."""
    start = f"can't run {program!r}: "
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        status = NOT_EXECUTABLE if isinstance(error, PermissionError | IsADirectoryError) else 1
        is_plain = isinstance(error, PermissionError) and os.path.isfile(program)
        hint = f"; make it executable: chmod +x {program}" if is_plain else ""
        return f"{start}{(error.strerror or str(error)).lower()}{hint}", status
    if " " in program:
        hint = "leave out the quotes, or use: sh -c '…'"
    elif program in BUILTINS:
        hint = f"it is a shell builtin; use: sh -c '{program} …'"
    elif "=" in program and not program.startswith(("=", "/", ".")):
        hint = f"to set a variable, write --env {program} before '--'"
    elif os.path.exists(program):
        hint = "the interpreter that its first line names is missing"
    elif "/" in program:
        hint = "there is no such file"
    else:
        hint = "there is no such program in PATH"
    return start + hint, NOT_FOUND


def _release(client: Client, leases: Sequence[Any]) -> None:
    for lease in leases:
        client.call(calls.release(lease["id"], lease.get("token")))


def _pass_sockets(client: Client, leases: Sequence[Any], environ: dict[str, str]) -> None:
    """Have the sockets handed over, listening, and place them from descriptor 3 on (sd_listen_fds(3))."""
    from portd._client.handoff import receive

    sockets: list[int] = []
    names: list[str] = []
    for lease in leases:
        _, received = receive(client.endpoint, {"lease": lease["id"], "listen": True})
        sockets += received
        names += [lease["endpoint"]] * len(received)
    import fcntl

    end = FIRST_FD + len(sockets)
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, end) for fd in sockets]  # clear of the numbers to be filled
    for number, fd in enumerate(above, FIRST_FD):
        os.dup2(fd, number, inheritable=True)
        os.set_blocking(number, True)  # as the command expects, whatever the daemon used
    environ["LISTEN_PID"] = str(os.getpid())
    environ["LISTEN_FDS"] = str(len(sockets))
    environ["LISTEN_FDNAMES"] = ":".join(names)


def _restore_signals() -> None:
    """Restore the signals that Python ignores for itself (exec keeps what is ignored)."""
    import _signal  # type: ignore[import-not-found]  # the C half: signal itself costs 3 ms

    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


def _note(text: str) -> None:
    from portd.cli.printing import clean

    print(f"portd: {clean(text)}", file=sys.stderr, flush=True)


COMMANDS = (
    Command(
        "run",
        ["[SERVICE]", "-- COMMAND"],
        "Start a service on a leased port",
        run,
        (
            *lease_options.REQUEST,
            *lease_options.SHOWN,
            Option(
                "--endpoint",
                "NAME[:PORT|:+OFFSET]",
                "one more port: PORT_NAME, {port:NAME}; +OFFSET is relative to the main port",
                endpoint,
                many=True,
            ),
            Option(
                "--check-endpoint",
                "NAME=CHECK",
                "a health check of that endpoint: admin=http:/healthz",
                lease_options.check_of_endpoint,
                many=True,
            ),
            Option("--port-env", "NAME", "set NAME to the port as well", variable, many=True),
            Option("--env", "NAME=VALUE", "set NAME; placeholders are filled in", assignment, many=True),
            Option("--socket", "", "pass the listening sockets from descriptor 3 on (LISTEN_FDS, as systemd does)"),
            Option("--confine", "", "let COMMAND and its children bind their leased TCP ports and no others"),
            Option("--json", "", "errors as problem documents"),
        ),
        """
COMMAND replaces portd (same pid), so the lease ends when the service does.
{port}, {host}, {url} and {port:NAME} are filled in; {{port}} is a literal one.
PORT, HOST, PORTD_LEASE, PORTD_TOKEN, PORTD_URL and PORTD_PUBLIC_URL (the URL
at the gateway) are set. A $PORT on the command line is expanded by your shell
before portd runs: write {port}.

Without SERVICE the name is the work tree's: from .portd.toml (service = "web"),
package.json, pyproject.toml, go.mod or the directory. In a further work tree
of a repository (git worktree) the branch is the instance.

    portd run orders -- python3 -m http.server {port}
    portd run web --port 3000,3001,8000-8010 --env VITE_URL={url} -- npm run dev
    portd run orders --check http:/healthz --endpoint metrics -- \\
        ./orders --listen {port} --metrics {port:metrics}
    portd run orders --socket -- gunicorn orders:app

If the program reports 'address in use' on its own port, it binds without
SO_REUSEADDR: use --hold none, or --socket if it accepts a passed socket.

--confine is Landlock (Linux 6.7; an error where it is missing). It covers
bind() of TCP sockets: not UDP, not MPTCP, not listen() on a socket that was
never bound, and it does not distinguish addresses. COMMAND can't gain
privileges (setuid programs, sudo), and has no io_uring and no SOCK_SEQPACKET
unix sockets: those could fetch further ports from portd's handoff socket.""",
        {
            "--ttl": "the lease of 'portd run' lasts as long as COMMAND; 'portd lease --ttl' makes one that expires",
            "--pid": "the lease of 'portd run' belongs to COMMAND; 'portd lease --pid' is for other processes",
            "--name": "the service is the first argument, and --instance names this process of it",
            "--service": "the service is the first argument: portd run SERVICE -- COMMAND",
        },
    ),
)
