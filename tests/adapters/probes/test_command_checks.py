"""Command checks, with real programs."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from portd.adapters.probes.launching import rights_of
from portd.adapters.probes.results import ProbeFailed
from portd.core.model import CommandCheck, Owner

SHELL = "/bin/sh"
ROOT = os.geteuid() == 0
MINE = Owner(uid=os.getuid(), known_by="peercred")


def sh(script: str, **timing: Any) -> CommandCheck:
    """Make a check of a shell's script (a shell that the configuration allows)."""
    return CommandCheck(command=(SHELL, "-c", script), **timing)


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(pid: int) -> None:
    """Wait until a process is gone."""
    async with asyncio.timeout(10):
        while is_running(pid):
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("script", "result", "note"),
    [
        ("echo fine", "passing", "fine"),
        ("exit 0", "passing", ""),
        ("echo careful >&2; exit 1", "warning", "careful"),
        ("echo broken; exit 2", "critical", "exit status 2: broken"),
        ("exit 77", "critical", "exit status 77"),
        ("kill -TERM $$", "critical", "killed by signal 15 (Terminated)"),
        ("kill -35 $$", "critical", "killed by signal 35 (Real-time signal 1)"),
        ("read line && echo got $line", "warning", ""),  # stdin is empty
        ("printf '\\033[31mred\\0'", "passing", "\N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_the_exit_status_decides(run: Any, bed: Any, script: str, result: str, note: str) -> None:
    async def scenario() -> None:
        async with bed(allow_commands=[SHELL]) as prober:
            assert await prober.result(sh(script), 4711, owner=MINE) == (result, note)

    run(scenario())


@pytest.mark.parametrize("command", ["/bin/true", "sh", "/bin/../bin/sh", "/bin/sh "])
def test_program_that_is_not_allowed_to_letter_is_not_run(run: Any, bed: Any, command: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    async def scenario() -> None:
        async with bed(allow_commands=[SHELL]) as prober:
            check = CommandCheck(command=(command, "-c", f"echo > {trace}"))
            result, note = await prober.result(check, 4711, owner=MINE)
            assert result == "critical"
            assert "not among allow_commands" in note

    run(scenario())
    assert not trace.exists()


def test_arguments_are_no_script(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed(allow_commands=["/bin/echo"]) as prober:
            check = CommandCheck(command=("/bin/echo", "$(id)", ";", "id", "`id`"))
            assert await prober.result(check, 4711, owner=MINE) == ("passing", "$(id) ; id `id`")

    run(scenario())


def test_a_program_that_is_not_there_is_critical(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed(allow_commands=["/nonexistent"]) as prober:
            result, note = await prober.result(CommandCheck(command=("/nonexistent",)), 4711, owner=MINE)
            assert result == "critical"
            assert note == "/nonexistent can't be started: No such file or directory"

    run(scenario())


def test_environment_is_service_s_and_nothing_of_daemon_s(run: Any, bed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTD_TOKEN", "secret")

    async def scenario() -> None:
        async with bed(allow_commands=["/usr/bin/env"]) as prober:
            check = CommandCheck(command=("/usr/bin/env",))
            _, note = await prober.result(
                check, 4711, owner=MINE, address="0.0.0.0", service="orders", instance="orders-7"
            )
            assert set(note.splitlines()) == {
                "PATH=/usr/local/bin:/usr/bin:/bin",
                "LANG=C.UTF-8",
                "HOST=127.0.0.1",
                "PORT=4711",
                "SERVICE=orders",
                "INSTANCE=orders-7",
            }

    run(scenario())


def test_no_descriptor_of_the_daemon_s_is_passed_on(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed(allow_commands=[SHELL]) as prober:
            _, note = await prober.result(sh("ls /proc/self/fd"), 4711, owner=MINE)
            assert note.split() == ["0", "1", "2", "3"]  # 3 is the directory itself

    run(scenario())


@pytest.mark.skipif(not ROOT, reason="only root can become somebody else")
@pytest.mark.parametrize(
    ("uid", "said"), [(65534, "65534 65534 65534"), (4_242_424, "4242424 65534 65534"), (0, "0 0")]
)
def test_root_runs_a_command_as_the_lease_s_owner(run: Any, bed: Any, uid: int, said: str) -> None:
    async def scenario() -> None:
        async with bed(allow_commands=[SHELL]) as prober:
            owner = Owner(uid=uid, known_by="peercred")
            result, note = await prober.result(sh("echo $(id -u) $(id -g) $(id -G)"), 4711, owner=owner)
            assert result == "passing"
            assert note.startswith(said)

    run(scenario())


@pytest.mark.skipif(not ROOT, reason="only root has rights to lend")
def test_root_runs_no_command_for_an_owner_whom_nobody_knows(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed(allow_commands=[SHELL]) as prober:
            result, note = await prober.result(sh("id"), 4711, owner=Owner(known_by="token"))
            assert result == "critical"
            assert "only as the user of the lease" in note

    run(scenario())


@pytest.mark.skipif(not ROOT, reason="only root can change its user")
def test_program_has_no_privilege_of_the_daemon(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed(allow_commands=[SHELL]) as prober:
            script = sh("grep -E '^(Uid|Gid|Groups|NoNewPrivs|Cap(Inh|Prm|Eff|Amb)):' /proc/self/status")
            result, note = await prober.result(script, 4711, owner=Owner(uid=65534, known_by="peercred"))
            assert result == "passing", note
            status = dict(line.split(":", 1) for line in note.splitlines())
            assert status["NoNewPrivs"].split() == ["1"]
            assert set(status["Uid"].split()) == {"65534"}
            assert "0" not in status["Groups"].split()
            assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Amb")} == {0}

    run(scenario())


FORBID_CAPSET = """
import ctypes, struct
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 126), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]  # capset: EPERM, others: allowed
text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
libc = ctypes.CDLL(None)
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(Program(4, ctypes.addressof(text))), 0, 0) == 0
"""
"""A seccomp filter as systemd makes it of SystemCallFilter=~@privileged (x86-64)."""
STATUS_OF_CHILD = """
import asyncio
from portd.adapters.probes.launching import Launcher, Rights
async def main():
    process = await Launcher().start(["/bin/cat", "/proc/self/status"], {}, Rights())
    print(process.stdout.read().decode(), "daemon", open("/proc/self/status").read())
asyncio.run(main())
"""


@pytest.mark.skipif(not ROOT, reason="only root can give capabilities")
@pytest.mark.parametrize(
    "sandbox",
    [
        "",
        pytest.param(FORBID_CAPSET, marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's number")),
    ],
    ids=["plain", "capset forbidden"],
)
def test_program_of_an_unprivileged_daemon_has_no_capability(sandbox: str) -> None:
    changed = ["--reuid=65534", "--clear-groups", "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    run = subprocess.run(
        ["setpriv", *changed, sys.executable, "-c", sandbox + STATUS_OF_CHILD],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    child, daemon = run.stdout.split("daemon")
    assert {int(each, 16) for each in re.findall(r"Cap(?:Prm|Eff|Amb):\s+(\w+)", child)} == {0}
    assert "NoNewPrivs:\t1" in child
    assert "CapAmb:\t0000000000000004" in daemon  # what the thread gave up, the daemon still has


@pytest.mark.parametrize("uid", [None, 4242])
def test_daemon_runs_nothing_for_a_user_that_it_cannot_become(uid: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1004)
    with pytest.raises(ProbeFailed, match="only as the user of the lease"):
        rights_of(uid)


def test_output_is_cut_at_4_kb(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed(allow_commands=[sys.executable]) as prober:
            check = CommandCheck(command=(sys.executable, "-c", "print('ü' * 100_000)"), timeout=30)
            result, note = await prober.result(check, 4711, owner=MINE)
            assert (result, note) == ("passing", "ü" * 2048)

    run(scenario())


def test_output_without_end_is_cut_off_long_before_time_out(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed(allow_commands=["/usr/bin/yes"]) as prober:
            check = CommandCheck(command=("/usr/bin/yes",), timeout=3600)
            assert await prober.result(check, 4711, owner=MINE) == ("critical", "the program's output does not end")

    run(scenario())


def test_a_time_out_kills_the_program_and_its_children(run: Any, bed: Any, tmp_path: Path) -> None:
    pids = open_to_all(tmp_path / "pids")

    async def scenario() -> None:
        async with bed(allow_commands=[SHELL]) as prober:
            # Both ignore the polite signals; 1000 s are long past the test's own patience.
            check = sh(f"trap '' TERM HUP INT; sleep 1000 & echo $$ $! > {pids}; wait; sleep 1000", timeout=0.5)
            assert await prober.result(check, 4711, owner=MINE) == ("critical", "no answer within 0.5 s")
            for pid in pids.read_text().split():
                await gone(int(pid))

    run(scenario())


def test_program_s_end_is_end_of_what_it_left_behind(run: Any, bed: Any, tmp_path: Path) -> None:
    pids = open_to_all(tmp_path / "pids")

    async def scenario() -> None:
        async with bed(allow_commands=[SHELL]) as prober:
            result, _ = await prober.result(sh(f"sleep 1000 & echo $! > {pids}"), 4711, owner=MINE)
            assert result == "passing"
            await gone(int(pids.read_text()))

    run(scenario())


def test_a_stopped_daemon_leaves_no_program_behind(run: Any, bed: Any, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def scenario() -> int:
        async with bed(allow_commands=[SHELL]) as prober:
            prober.bind(sh(f"echo $$ > {fifo}; sleep 1000", timeout=3600), 4711, owner=MINE)
            return int(await asyncio.to_thread(fifo.read_text))

    pid = run(scenario())
    assert not is_running(pid)


def test_programs_are_reaped_and_their_descriptors_closed(run: Any, bed: Any) -> None:
    async def scenario() -> None:
        async with bed(allow_commands=[SHELL]) as prober:
            await prober.result(sh("exit 0"), 4711, owner=MINE)
            before = len(os.listdir("/proc/self/fd"))
            for script in ("exit 0", "exit 3", "sleep 1000 & exit 0", "sleep 1000"):
                await prober.result(sh(script, timeout=0.3), 4711, owner=MINE)
            assert len(os.listdir("/proc/self/fd")) == before

    run(scenario())
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def open_to_all(path: Path) -> Path:
    """Make a file that any user may write."""
    path.touch()
    path.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IWOTH)
    return path
