"""Which process a lease of `portd lease` belongs to: the shell or script that goes on to use the port.

The parent often ends at once: a subshell of `$(…)`, a wrapper like timeout, a `sh -c` that a program started. They are
climbed over. `choose` is a pure function of what /proc says; this module must not know the daemon.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SHELLS = {"sh", "dash", "bash", "rbash", "zsh", "ksh", "ksh93", "mksh", "ash", "busybox", "fish", "yash"}
WRAPPERS = {
    "timeout", "sudo", "doas", "su", "runuser", "flock", "setsid", "strace", "ltrace", "unbuffer", "chronic", "direnv",
    "uv", "npx", "systemd-inhibit", "dbus-run-session",
}  # fmt: skip
"""Programs that start one command and end with it."""
BRIEF = {":", "true", "false", "echo", "printf", "exit", "return"}
"""Commands after which a `sh -c` has nothing left to do."""
FILTERS = {"tail", "head", "tr", "cut", "sed", "awk", "grep", "cat", "tee", "sort", "uniq", "xargs"}
"""Programs at the end of a pipe that end with their input."""
LEASE = "portd lease"
SEPARATORS = ("&&", "||", ";", "\n", "|")
IMAGE_FIELDS = (26, 27, 28, 45, 48, 50)
"""Fields of /proc/PID/stat that exec sets at random and fork copies: code, stack, data, arguments, environment."""
CLIMB_MAX = 64


class Process:
    """What /proc says of a process. `image` is the same in a fork and its parent, and differs after every exec."""

    __slots__ = ("argv", "exe", "image", "pid", "ppid", "uid")

    def __init__(self, pid: int, ppid: int, uid: int, exe: str, argv: tuple[str, ...], image: tuple[str, ...]) -> None:
        self.pid = pid
        self.ppid = ppid
        self.uid = uid
        self.exe = exe
        self.argv = argv
        self.image = image

    @property
    def name(self) -> str:
        """Return the program's name: argv[0] without its directory, or a login shell's hyphen."""
        return ((self.argv[0] if self.argv else "") or self.exe).rpartition("/")[2].lstrip("-")


def choose(parent: int, uid: int, read: Callable[[int], Process | None]) -> tuple[int, str]:
    """Return the pid that a lease belongs to, and why that may surprise ("" where it does not).

    `uid` is the caller's; a process of another user is climbed to by root alone.
    """
    process = read(parent)
    if process is None:
        return parent, ""
    for _ in range(CLIMB_MAX):
        above = read(process.ppid) if process.ppid > 0 else None
        if above is None or (uid != 0 and above.uid != uid) or not _is_passing(process, above):
            break
        process = above
    return process.pid, _surprise(process)


def read_process(pid: int) -> Process | None:
    """Read a process from /proc; None where it is gone or hidden."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().decode("utf-8", "replace").rpartition(")")[2].split()
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            argv = tuple(file.read().decode("utf-8", "replace").split("\0")[:-1])
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
    try:
        exe = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        exe = ""
    return Process(pid, int(fields[1]), uid, exe, argv, tuple(fields[field - 3] for field in IMAGE_FIELDS))


def _is_passing(process: Process, above: Process) -> bool:
    """Return whether a process ends as soon as this command has printed its port, and the one above it goes on."""
    if process.name in WRAPPERS:
        return True
    if process.name not in SHELLS:
        return False
    is_fork = (process.exe, process.argv, process.image) == (above.exe, above.argv, above.image)  # the subshell of $(…)
    return is_fork or above.name == "direnv" or _has_only_brief_rest(_script(process))


def _surprise(process: Process) -> str:
    if process.pid == 1:
        return "PID 1, and ends with this system"
    script = _script(process)
    if process.name in WRAPPERS or (process.name in SHELLS and script is not None and not _captures(script)):
        return f"{process.name}[{process.pid}], and ends with it"
    return ""


def _script(process: Process) -> str | None:
    """Return TEXT of `sh -c TEXT`; None for a script file and an interactive shell."""
    words = iter(process.argv[1:])
    for word in words:
        if word.startswith("-") and not word.startswith("--") and "c" in word:
            return next(words, None)
        if not word.startswith(("-", "+")):
            return None
    return None


def _normalized(script: str) -> str:
    """Return a script without quotes and with single spaces: enough to find commands in it."""
    lines = script.replace("'", " ").replace('"', " ").split("\n")
    return "\n".join(" ".join(line.split()) for line in lines)


def _captures(script: str) -> bool:
    """Return whether a script reads the port itself: a `portd lease` stands in `$(…)`, backticks or `<(…)`."""
    before, *others = _normalized(script).split(LEASE)
    for after in others:
        if _is_substituted(before):
            return True
        before += LEASE + after
    return False


def _is_substituted(before: str) -> bool:
    """Return whether what follows a part of a script is inside of a substitution that the part opens."""
    opened: list[bool] = []
    for at, char in enumerate(before):
        if char == "(":
            opened.append(before[at - 1 : at] in ("$", "<"))
        elif char == ")" and opened:
            opened.pop()
    return any(opened) or before.count("`") % 2 == 1


def _has_only_brief_rest(script: str | None) -> bool:
    """Return whether a `sh -c` has nothing to do after `portd lease` that lasts."""
    if script is None or _captures(script):
        return False
    _, found, rest = _normalized(script).rpartition(LEASE)
    if not found:
        return False
    while rest:
        at = min((rest.find(one) for one in SEPARATORS if one in rest), default=-1)
        if "&" in (rest if at < 0 else rest[:at]).replace(">&", "").replace("&>", ""):
            return False  # something goes on in the background
        if at < 0:
            return True
        separator = next(one for one in SEPARATORS if rest.startswith(one, at))
        rest = rest[at + len(separator) :].strip()
        word = rest.split(None, 1)[0].rstrip(";") if rest else ":"
        if word not in BRIEF and not (separator == "|" and word in FILTERS):
            return False
    return True


def shares_pid_namespace(path: str) -> bool | None:
    """Return whether the daemon behind a unix socket numbers processes as this one does; None where nobody listens.

    The kernel reports pid 0 for a peer of a namespace that can't be seen from here (pid_namespaces(7), unix(7)).
    """
    import _socket

    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.connect(path)
        credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    except OSError:
        return None
    finally:
        connection.close()
    return credentials[:4] != bytes(4)
