"""A box: a real systemd, booted in namespaces over a throw-away copy of this machine's tree, or of another root.

The box has no network but its own loopback, and can't reach the host. Commands run in it as root by default.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

T = TypeVar("T")
HERE = Path(__file__).parent
LOAD = (HERE / "load.py").read_text()
ENVIRONMENT = {
    "PATH": "/opt/portd/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "dumb",
    "LC_ALL": "C.UTF-8",
    "HOME": "/",
}
DEADLINE_S = 30.0
TOOLS = (
    "/lib/systemd/systemd",
    "/usr/bin/systemd-analyze",
    "/usr/bin/nsenter",
    "/usr/bin/unshare",
    "/usr/bin/setpriv",
    "/usr/bin/python3",
    "/usr/bin/curl",
    "/usr/bin/pkill",
    "/usr/sbin/useradd",
)


def missing() -> str | None:
    """Say what this machine lacks for a box; None when it has all."""
    if os.geteuid() != 0:
        return "a box needs root"
    for tool in TOOLS:
        if not os.access(tool, os.X_OK):
            return f"a box needs {tool}"
    return None if _control_groups() else "a box needs a writable cgroup2 hierarchy"


def wait_for(condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Ask until the answer is true, and return it; fails at the deadline, and says what was waited for."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if answer := condition():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {deadline_s} s")


class Box:
    """One machine. `boot` may be called again after `power_off`: the disk is the same.

    `seed` is a shell script, run once in the new root before the first boot; `venv` becomes /opt/portd (None: nothing
    does); `root` is the tree that the box starts from.
    """

    def __init__(self, directory: Path, *, seed: str = ":", venv: Path | None = None, root: Path = Path("/")) -> None:
        self.directory = directory
        groups = _control_groups()
        assert groups is not None
        self._cgroup = groups / f"portd-box-{os.getpid()}-{directory.name}"
        if venv is not None:
            (directory / "venv").symlink_to(venv)
        (directory / "root").symlink_to(root)
        (directory / "seed").write_text(seed)
        self._cgroup.mkdir()
        self._outer = subprocess.Popen(
            [HERE / "box.sh", directory, self._cgroup], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._init = 0

    def boot(self) -> None:
        """Boot, and wait until systemd says that it is up."""
        self._tell("boot")
        outer = int(self._hear("booting"))
        wait_for(lambda: self._find_init(outer) or self._outer_is_down(outer), "systemd as PID 1 of the box")
        assert self._init, f"the box did not boot: {(self.directory / 'console').read_text()}"
        wait_for(self._is_up, f"the box's boot ({self.directory}/console says more)")

    def _find_init(self, outer: int) -> bool:
        with suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
                self._init = int(children[0])
        return self._init > 0

    @staticmethod
    def _outer_is_down(outer: int) -> bool:
        return not Path(f"/proc/{outer}").exists()

    def _is_up(self) -> bool:
        return self.run("systemctl is-system-running", check=False).strip() in {"running", "degraded"}

    def power_off(self) -> None:
        """Shut down in order, as a machine does; the disk stays."""
        self.run("systemctl poweroff", check=False)
        self._hear("down")
        self._init = 0

    def pull_the_plug(self) -> None:
        """End everything at once, as a power cut does; the disk stays."""
        os.kill(self._init, 9)  # of a PID namespace: the kernel ends all of its processes
        self._hear("down")
        self._init = 0

    def close(self) -> None:
        """Pull the plug, and leave nothing."""
        if self._init:
            with suppress(ProcessLookupError):
                os.kill(self._init, 9)
        assert self._outer.stdin is not None
        assert self._outer.stdout is not None
        self._outer.stdin.close()
        self._outer.wait(20)
        self._outer.stdout.close()
        wait_for(self._is_swept, "the box's control groups are empty")

    def _is_swept(self) -> bool:
        for group, _, _ in os.walk(self._cgroup, topdown=False):
            with suppress(OSError):
                Path(group).rmdir()
        return not self._cgroup.exists()

    # --- in the box ---

    def start(self, command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a shell command in the box."""
        words = ["/usr/bin/nsenter", "-t", str(self._init), "-a", "-r", "-w", "/bin/bash", "-c", command]
        return subprocess.Popen(words, env=ENVIRONMENT, text=True, stdin=subprocess.DEVNULL, **options)

    def run(self, command: str, *, check: bool = True) -> str:
        """Run a shell command in the box; returns what it said. `check`: it must end with status 0."""
        status, out, err = self.ask(command)
        assert status == 0 or not check, f"{command}: status {status}\n{out}{err}"
        return out

    def ask(self, command: str) -> tuple[int, str, str]:
        """Run a shell command in the box; returns status, stdout and stderr."""
        with self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def python(self, program: str, *words: str) -> str:
        """Run a Python program in the box."""
        return self.run(shlex.join(["/usr/bin/python3", "-c", program, *words]))

    def api(self, path: str, body: Any = None, method: str = "") -> Any:
        """Call the daemon over its unix socket."""
        data = f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}" if body is not None else ""
        verb = f"-X {method}" if method else ""
        url = shlex.quote(f"http://portd{path}")
        out = self.run(f"curl -sS --fail-with-body --unix-socket /run/portd/portd.sock {verb} {data} {url}")
        return json.loads(out) if out else None

    def leases(self, service: str = "") -> list[dict[str, Any]]:
        """Return all live leases, of one service or of all."""
        found: list[dict[str, Any]] = []
        cursor = ""
        for _ in range(100):
            page = self.api(f"/v1/leases?limit=1000{service and f'&service={service}'}{cursor}")
            found += page["leases"]
            if page["next"] is None:
                return found
            cursor = f"&cursor={quote(str(page['next']))}"
        raise AssertionError("the list of leases has no end")

    def show(self, name: str, unit: str = "portd.service") -> str:
        """Return a property of a unit."""
        return self.run(f"systemctl show -P {name} {unit}").strip()

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Return what portd has written to the journal in this boot."""
        self.run("journalctl --sync")
        out = self.run(shlex.join(["journalctl", "-b", "-o", "json", "--no-pager", "-u", "portd.service", *matches]))
        return [json.loads(line) for line in out.splitlines()]

    def load(self, *words: object, user: str = "foreign") -> Load:
        """Start load.py in the box as a user; returns when it is under way."""
        self.run(f"cat >/opt/load.py <<'EOF'\n{LOAD}\nEOF")
        command = f"exec setpriv --reuid {user} --regid {user} --clear-groups /usr/bin/python3 /opt/load.py"
        return Load(self.start(" ".join([command, *map(str, words)]), stdout=subprocess.PIPE))

    def written(self) -> set[str]:
        """Return the paths on the box's disk that it has written itself (or touched) and that are still there."""
        upper = Path(f"/proc/{self._outer.pid}/root{self.directory}/disk/upper")
        return {str(path.relative_to(upper)) for path in upper.rglob("*") if not path.is_char_device()}  # a whiteout

    # --- with the script outside ---

    def _tell(self, word: str) -> None:
        assert self._outer.stdin is not None
        self._outer.stdin.write(word + "\n")
        self._outer.stdin.flush()

    def _hear(self, word: str) -> str:
        assert self._outer.stdout is not None
        said = self._outer.stdout.readline().split()
        console = self.directory / "console"
        assert said[:1] == [word], f"the box said {said}: {console.read_text() if console.exists() else ''}"
        return said[-1]


class Load:
    """A load.py that runs in a box."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        assert process.stdout.readline() == "under way\n"

    def result(self) -> dict[str, Any]:
        """Wait for its end, and return what came of it."""
        with self._process as process:
            out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found


def _control_groups() -> Path | None:
    """Return the top of the cgroup2 hierarchy, also where it stands beside the older one."""
    for place in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
        if (place / "cgroup.procs").exists() and os.access(place, os.W_OK):
            return place
    return None
