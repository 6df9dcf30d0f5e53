"""Whose a lease of `portd lease` is: the rule on made-up process trees, and idioms of scripts with a real daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from portd.cli import callers
from portd.cli.callers import Process
from tests.cli.bed import DEADLINE_S, Daemon, wait_for

ALICE, BOB = 1000, 1001


def tree(*lineage: tuple[str, ...], uid: int = ALICE) -> dict[int, Process]:
    """Make processes from the outermost to the parent of `portd lease`: (argv…), or ("fork",) of the one before."""
    made: dict[int, Process] = {}
    for pid, argv in enumerate(lineage, 100):
        above = made.get(pid - 1)
        if argv == ("fork",):
            assert above is not None
            made[pid] = Process(pid, pid - 1, uid, above.exe, above.argv, above.image)
        else:
            made[pid] = Process(pid, pid - 1 if above else 1, uid, "/usr/bin/" + argv[0], argv, (str(pid),))
    return made


def chosen(processes: dict[int, Process], uid: int = ALICE) -> tuple[int, str]:
    """Return the place in the lineage that was chosen, counted from the outermost, and the surprise."""
    pid, surprise = callers.choose(max(processes), uid, processes.get)
    return pid - 100, surprise


BASH = ("bash",)
SCRIPT = ("bash", "build.sh")
PYTHON = ("python3", "hub.py")


@pytest.mark.parametrize(
    ("lineage", "place"),
    [
        pytest.param([BASH], 0, id="interactive shell"),
        pytest.param([BASH, SCRIPT], 1, id="script"),
        pytest.param([BASH, SCRIPT, ("fork",)], 1, id="subshell of a pipe"),
        pytest.param([BASH, SCRIPT, ("fork",), ("fork",)], 1, id="function in a substitution"),
        pytest.param([BASH, SCRIPT, ("timeout", "5", "portd", "lease", "x")], 1, id="wrapper"),
        pytest.param([BASH, SCRIPT, ("fork",), ("timeout", "5", "portd")], 1, id="wrapper in a subshell"),
        pytest.param([BASH, ("bash",)], 1, id="a nested interactive shell is no fork"),
        pytest.param([PYTHON, ("sh", "-c", "portd lease x; true")], 0, id="sh -c of a program"),
        pytest.param([PYTHON, ("sh", "-c", "portd lease x | tail -1")], 0, id="sh -c with a filter"),
        pytest.param([PYTHON, ("sh", "-c", "portd lease x 2>&1 || exit 1")], 0, id="sh -c with exit"),
        pytest.param([PYTHON, ("sh", "-c", "P=$(portd lease x); server $P")], 1, id="sh -c is the script"),
        pytest.param([PYTHON, ("sh", "-c", "P=`portd lease x`; true")], 1, id="backticks are read by the shell"),
        pytest.param([PYTHON, ("bash", "-euc", "read P < <(portd lease x); true")], 1, id="process substitution"),
        pytest.param([PYTHON, ("sh", "-c", "portd lease x; server")], 1, id="sh -c goes on"),
        pytest.param([PYTHON, ("sh", "-c", "portd lease x & true")], 1, id="sh -c with a job"),
        pytest.param([PYTHON, ("fork",)], 1, id="a fork of a program is a worker of its own"),
        pytest.param([BASH, ("direnv", "export", "bash"), ("bash", "-c", "eval ...")], 0, id="direnv"),
        pytest.param([("make",), ("sh", "-c", "portd lease x | tail -1")], 0, id="make"),
    ],
)
def test_the_owner_is_who_goes_on_to_use_the_port(lineage: list[tuple[str, ...]], place: int) -> None:
    assert chosen(tree(*lineage))[0] == place


def test_a_shell_that_may_end_at_once_is_a_surprise() -> None:
    assert "sh[101]" in chosen(tree(PYTHON, ("sh", "-c", "portd lease x; server")))[1]
    assert "sh[101]" in chosen(tree(PYTHON, ("sh", "-c", ". ./ports.sh")))[1]
    for text in (
        "P=$(portd lease x); server $P",
        "f() { P=$(portd lease x); }; f",
        "( P=$(portd lease x) ); portd lease y",
    ):
        assert not chosen(tree(PYTHON, ("sh", "-c", text)))[1]
    assert not chosen(tree(BASH, SCRIPT, ("fork",)))[1]
    assert not chosen(tree(PYTHON))[1]


def test_only_root_climbs_to_another_users_process() -> None:
    processes = tree(BASH, SCRIPT, uid=BOB) | {102: Process(102, 101, ALICE, "/usr/bin/su", ("su", "-c", "…"), ("2",))}
    assert chosen(processes) == (2, "su[102], and ends with it")
    assert chosen(processes, uid=0)[0] == 1


def test_a_parent_that_is_gone_is_left_as_it_is() -> None:
    assert callers.choose(4711, ALICE, lambda pid: None) == (4711, "")


PORTD = f"{sys.executable} -m portd"
IDIOMS = {
    "substitution": "P=$(portd lease NAME)",
    "pipe": "P=$(portd lease NAME | tail -1)",
    "change of directory": "P=$(cd /tmp && portd lease NAME || exit)",
    "timeout": "P=$(timeout 5 portd lease NAME)",
    "function": 'f() { local Q; Q=$(portd lease NAME); echo "$Q"; }; P=$(f)',
    "backticks": "P=`portd lease NAME`",
    "here": "P=$(FOO=1 env portd lease NAME)",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a PATH in which `portd` is this tree's."""
    program = tmp_path_factory.mktemp("bin") / "portd"
    program.write_text(f'#!/bin/sh\nexec {PORTD} "$@"\n')
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize("idiom", list(IDIOMS))
@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_a_script_keeps_its_lease_until_it_ends(daemon: Daemon, path: str, idiom: str, shell: str) -> None:
    name = f"{shell}-{idiom.replace(' ', '-')}"
    text = IDIOMS[idiom].replace("NAME", name).replace("local Q; ", "" if shell == "dash" else "local Q; ")
    script = subprocess.Popen(
        [shell, "-c", f'{text}; echo "$P"; read REST'],
        env={**daemon.environ, "PATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    port = int(script.stdout.readline())
    [lease] = daemon.client.leases(service=name)
    assert (lease["port"], lease["owner"]["pid"]) == (port, script.pid)
    script.communicate("\n", timeout=DEADLINE_S)
    wait_for(lambda: daemon.client.lease(lease["id"])["state"] == "ended", "the lease ends with its script")


def test_shell_started_by_program_leaves_lease_to_it(daemon: Daemon, path: str) -> None:
    for at, command in enumerate(["portd lease NAME", "portd lease NAME; true", "portd lease NAME | tail -n 1"]):
        name = f"hub-{at}"
        done = subprocess.run(
            command.replace("NAME", name),
            shell=True,
            env={**daemon.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
        )
        [lease] = daemon.client.leases(service=name)
        assert (f"{lease['port']}\n", os.getpid(), "") == (done.stdout, lease["owner"]["pid"], done.stderr)


def test_a_surprising_owner_is_named_on_stderr(daemon: Daemon, path: str) -> None:
    done = subprocess.run(
        ["sh", "-c", "portd lease short; cat"],
        env={**daemon.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert done.stdout.strip().isdecimal()
    assert "short-1 belongs to sh[" in done.stderr
    assert "--pid PID or --ttl SECONDS" in done.stderr


def test_export_prints_what_eval_accepts(daemon: Daemon, path: str) -> None:
    text = 'eval "$(portd lease exported --ttl 60 --export)"; echo "$PORT $HOST $PORTD_LEASE $PORTD_URL"; env'
    done = subprocess.run(
        ["sh", "-c", text], env={**daemon.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    [lease] = daemon.client.leases(service="exported")
    assert done.stdout.splitlines()[0] == f"{lease['port']} 127.0.0.1 {lease['id']} {daemon.url}"
    assert "PORTD_TOKEN=" in done.stdout


def test_env_file_sets_variables_and_keeps_the_rest(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("# mine\nSECRET='a b'\nPORT=1\n")
    file.chmod(0o640)
    port = daemon.portd("lease", "filed", "--ttl", "60", "--env-file", str(file)).stdout.strip()
    lines = file.read_text().splitlines()
    assert lines[:2] == ["# mine", "SECRET='a b'"]
    assert [line for line in lines if line.startswith("PORT=")] == [f"PORT={port}"]
    assert file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


def test_an_env_file_that_cannot_be_written_leaves_no_lease(daemon: Daemon, tmp_path: Path) -> None:
    done = daemon.portd("lease", "unfiled", "--ttl", "60", "--env-file", str(tmp_path / "no" / ".env"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert not list(daemon.client.leases(service="unfiled"))


@pytest.mark.netns
def test_another_pid_namespace_needs_a_ttl(daemon: Daemon) -> None:
    words = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "portd", "lease", "boxed"]
    if os.getuid() != 0:
        pytest.skip("needs root to make a PID namespace")
    done = subprocess.run(words, env=daemon.environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--ttl" in done.stderr
    with_ttl = subprocess.run([*words, "--ttl", "60"], env=daemon.environ, capture_output=True, text=True, check=False)
    assert with_ttl.returncode == 0
