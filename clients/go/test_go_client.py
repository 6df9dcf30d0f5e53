"""The Go client: its own tests, real Go services beside Python's, and the README's programs as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

import pytest

import portd_client
from clients.conformance.bed import Daemon, end, wait_for
from tests.support.ports import claim_ports

pytestmark = pytest.mark.skipif(shutil.which("go") is None, reason="not installed: go")
HERE = Path(__file__).parent
MODULE = "github.com/portd/portd/clients/go"
SERVICE, LOOK_UP = re.findall(r"```go\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
TIMEOUT_S = 240.0
"""Seconds for what compiles: with the race detector the standard library is compiled, too, the first time."""


def go(*words: str, directory: Path = HERE, **environ: str) -> str:
    """Run the go command without network, and return what it printed; fails the test when it fails."""
    done = subprocess.run(
        ["go", *words],
        cwd=directory,
        env={**os.environ, "GOFLAGS": "-mod=mod", "GOPROXY": "off", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running daemon; each test takes service names of its own."""
    with Daemon(tmp_path_factory.mktemp("portd"), 100) as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that builds a program of somebody who uses the client, and returns the binary's path."""

    def built(name: str, source: str) -> str:
        directory = tmp_path_factory.mktemp(name)
        (directory / "main.go").write_text(source)
        (directory / "go.mod").write_text(
            f"module example.org/{name}\n\ngo 1.19\n\nrequire {MODULE} v0.0.0\n\nreplace {MODULE} => {HERE}\n"
        )
        go("build", "-o", "program", ".", directory=directory)
        return str(directory / "program")

    return built


def test_the_source_is_formatted_and_vetted() -> None:
    formatted = subprocess.run(["gofmt", "-l", str(HERE)], capture_output=True, text=True, timeout=60, check=True)
    assert not formatted.stdout
    go("vet", "./...")


def test_its_own_tests_pass_under_the_race_detector() -> None:
    environ = {name: value for name, value in os.environ.items() if name.startswith(("PORT", "LISTEN_"))}
    assert not environ, "portd's variables would lead the tests to another daemon"
    raced = ["-race"] if shutil.which("gcc") else []
    root = HERE.parents[1]
    first_port, claims = claim_ports(150)
    try:
        written = go(
            "test",
            "-count=1",
            "-v",
            *raced,
            ".",
            PORTD_COMMAND=f"{sys.executable} -m portd",
            PORTD_TEST_PORT=str(first_port),
            PYTHONPATH=f"{root}:{root}/clients/python",
        )
    finally:
        for claim in claims:
            claim.close()
    assert "--- SKIP" not in written


def service_source(name: str) -> str:
    """Return the README's service under another name."""
    return SERVICE.replace('"orders"', f'"{name}"')


def port_of(program: subprocess.Popen[str]) -> int:
    """Read the port that a program says it is on."""
    assert program.stdout is not None
    line = program.stdout.readline()
    assert " is on port " in line, line
    return int(line.split()[-1])


@pytest.mark.parametrize(
    "run",
    [[], ["run", "three", "--check", "http:/healthz", "--socket", "--"]],
    ids=["by themselves", "under portd run"],
)
def test_of_three_instances_that_find_each_other_killed_one_leaves(
    daemon: Daemon, build: Callable[..., str], run: list[str]
) -> None:
    binary = build("three", service_source("three"))
    finder = build("finder", LOOK_UP.replace('"orders"', '"three"'))
    with ExitStack() as stack:
        programs = [daemon.start_portd(*run, binary) if run else daemon.start_program([binary]) for _ in range(3)]
        for program in programs:
            stack.callback(end, program)
        ports = {port_of(program): program for program in programs}
        assert len(ports) == 3

        def passing() -> set[int]:
            return {one.port for one in portd_client.resolve_all("three", client=daemon.client)}

        wait_for(lambda: passing() == set(ports), "all three pass their checks, as the Python client reports")
        for port in ports:
            with urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                assert answer.read() == b"ok\n"
        found, _ = daemon.start_program([finder]).communicate(timeout=20)
        assert int(found.rpartition(":")[2]) in ports
        gone, killed = next(iter(ports.items()))
        end(killed, signal.SIGKILL)
        wait_for(lambda: passing() == set(ports) - {gone}, "the killed one leaves")
        for program in programs:
            if program is not killed:
                end(program, signal.SIGTERM)
                assert program.returncode == -signal.SIGTERM
        because = {lease["ended_because"] for lease in daemon.client.leases(service="three", state="ended")}
        assert because == {"released", "owner_exited"}
        assert not passing()


def test_a_python_service_is_found_by_a_go_program(daemon: Daemon, build: Callable[..., str]) -> None:
    finder = build("seeker", LOOK_UP.replace('"orders"', '"by-python"'))
    with portd_client.listen("by-python", client=daemon.client) as listener:
        wait_for(lambda: portd_client.resolve_all("by-python", client=daemon.client), "the daemon sees the listener")
        found, _ = daemon.start_program([finder]).communicate(timeout=20)
        assert found == f"127.0.0.1:{listener.lease.port}\n"
    missed, _ = daemon.start_program([finder]).communicate(timeout=20)
    assert "no instance works now: of by-python" in missed


def test_the_readmes_programs_run_as_they_stand(daemon: Daemon, build: Callable[..., str]) -> None:
    service = daemon.start_program([build("orders", SERVICE)])
    try:
        port = port_of(service)
        with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
            assert answer.read() == b"ok\n"
        wait_for(lambda: portd_client.resolve_all("orders", client=daemon.client), "it passes its check")
        found, _ = daemon.start_program([build("whoever", LOOK_UP)]).communicate(timeout=20)
        assert found == f"127.0.0.1:{port}\n"
    finally:
        end(service)


def test_the_bench_program_reports_time_and_memory(daemon: Daemon, tmp_path: Path) -> None:
    go("build", "-o", str(tmp_path / "startbench"), "./internal/startbench")
    for mode in ("bare", "portd"):
        written, _ = daemon.start_program([str(tmp_path / "startbench"), mode]).communicate(timeout=20)
        report = json.loads(written)
        assert report["ms"] > 0
        assert report["rss_kib"] > 0
