"""The Node client as its users meet it: packed, installed, typed, and in real services that others look up."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

import portd_client
from clients.conformance.bed import Daemon, end, wait_for

PACKAGE = Path(__file__).parents[1]
SERVICE, LOOK_UP, MOVING = re.findall(r"```js\n(.*?)```", (PACKAGE / "README.md").read_text(), re.DOTALL)
DEADLINE_S = 60.0
pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="not installed: node and npm")

HTTP = """
import http from "node:http";
import { listen } from "portd-client";
await listen(http.createServer((request, response) => response.end("ok")), SERVICE, { check: "http:/healthz" });
"""
EXPRESS = """
import http from "node:http";
import express from "express";
import { listen } from "portd-client";
const app = express();
app.get("/{*any}", (request, response) => response.send("ok"));
await listen(http.createServer(app), SERVICE, { check: "http:/healthz" });
"""
BY_PYTHON = """
import http.server, portd_client

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")

listener = portd_client.listen("by-python", check="http:/healthz")
server = http.server.ThreadingHTTPServer(listener.getsockname(), Answer, bind_and_activate=False)
server.socket.close()
server.socket = listener
server.serve_forever()
"""
PORTS_OF = """
import { watch } from "portd-client";
const [service, count] = process.argv.slice(2);
for await (const instances of watch(service)) {
  if (instances.length !== Number(count)) continue;
  const bodies = await Promise.all(instances.map(async (one) => (await fetch(`http://${one.authority}/`)).text()));
  if (bodies.some((body) => body !== "ok")) throw new Error(bodies.join());
  console.log(JSON.stringify(instances.map(({ port }) => port)));
  break;
}
"""


def put(project: Path, name: str, source: str) -> list[str]:
    """Put a program into the project, and return the words that start it."""
    path = project / name
    path.write_text(source)
    return ["node", str(path)]


def output(daemon: Daemon, words: Sequence[str]) -> str:
    """Run a program to its end, and return what it wrote; it must end well."""
    program = daemon.start_program(words)
    try:
        written, _ = program.communicate(timeout=DEADLINE_S)
    finally:
        end(program)
    assert program.returncode == 0, written
    return written


def first_line(program: subprocess.Popen[str]) -> str:
    """Return the next line that a program writes."""
    assert program.stdout is not None
    line = program.stdout.readline()
    assert line, f"it ended with {program.wait()}"
    return line.strip()


def ports_seen_by_node(daemon: Daemon, project: Path, service: str, count: int) -> set[int]:
    """Have the Node client watch until so many instances pass; each of them answers it."""
    return set(json.loads(output(daemon, [*put(project, "ports_of.mjs", PORTS_OF), service, str(count)])))


# --- the package ---


def test_the_archive_has_the_client_and_nothing_else() -> None:
    packed = subprocess.run(
        ["npm", "pack", "--dry-run", "--json"],
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    files = {file["path"] for file in json.loads(packed.stdout)[0]["files"]}
    assert files == {
        "LICENSE",
        "README.md",
        "index.d.ts",
        "package.json",
        *(f"lib/{path.name}" for path in (PACKAGE / "lib").glob("*.js")),
    }


def test_the_types_name_just_what_there_is(project: Path) -> None:
    names = put(project, "names.mjs", 'console.log(Object.keys(await import("portd-client")).join("\\n"));')
    there = subprocess.run(names, capture_output=True, text=True, timeout=DEADLINE_S, check=True).stdout.split()
    types = (PACKAGE / "index.d.ts").read_text()
    assert set(there) == set(re.findall(r"^export (?:class|function) (\w+)", types, re.MULTILINE))


def test_a_typed_program_compiles_and_its_mistakes_do_not(project: Path) -> None:
    shutil.copy(PACKAGE / "test/usage.ts", project / "usage.mts")
    compiled = subprocess.run(
        [
            "node",
            "node_modules/typescript/bin/tsc",
            "--noEmit",
            "--strict",
            "--target",
            "es2022",
            "--module",
            "nodenext",
            "--lib",
            "es2023,esnext.disposable",
            "usage.mts",
        ],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert compiled.returncode == 0, compiled.stdout


# --- what only Node has ---


@pytest.mark.parametrize("name", sorted(path.name for path in Path(__file__).parent.glob("*.test.mjs")))
def test_what_only_node_has(daemon: Daemon, name: str) -> None:
    with subprocess.Popen(
        ["node", "--test", "--test-reporter=tap", str(PACKAGE / "test" / name)],
        env=daemon.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as tests:
        try:
            written, _ = tests.communicate(timeout=DEADLINE_S)
        finally:
            with suppress(ProcessLookupError):  # its programs, too, should it hang
                os.killpg(tests.pid, signal.SIGKILL)
    assert tests.returncode == 0, written
    assert not re.search(r"^# (pass|tests) 0$", written, re.MULTILINE), written


# --- the README ---


def test_the_readmes_service_is_found_by_its_look_up(daemon: Daemon, project: Path) -> None:
    service = daemon.start_program(put(project, "service.mjs", SERVICE))
    try:
        assert re.fullmatch(r"orders is on port \d+", first_line(service))
        wait_for(lambda: portd_client.resolve_all("orders", client=daemon.client), "the service passes its check")
        assert output(daemon, put(project, "look_up.mjs", LOOK_UP)) == "ok\n\n"
    finally:
        end(service)


def test_a_listening_server_gets_its_own_port_back(own_daemon: Daemon, project: Path) -> None:
    service = own_daemon.start_program(
        put(project, "keeping.mjs", SERVICE.replace("check:", "ttl: 0.9, check:") + MOVING)
    )
    try:
        port = int(first_line(service).split()[-1])
        own_daemon.stop()
        own_daemon.forget()
        own_daemon.start()
        [kept] = wait_for(lambda: portd_client.resolve_all("orders", client=own_daemon.client), "it passes its check")
        assert kept.port == port
        with urlopen(f"http://{kept.authority}/", timeout=10) as answer:
            assert answer.read() == b"ok\n"
    finally:
        end(service)


# --- sockets that were passed ---

PASSED = """
import { execFileSync } from "node:child_process";
import { createServer } from "node:net";
import { readlinkSync } from "node:fs";
import { listen } from "portd-client";
const server = createServer();
const socket = readlinkSync("/proc/self/fd/3");
const { isAdopted, isPassed, port } = await listen(server, "passed");
const inherited = execFileSync("/bin/ls", ["-l", "/proc/self/fd"], { encoding: "utf8" }).includes(socket);
console.log(JSON.stringify([isAdopted, isPassed, port === server.address().port, inherited]));
server.close();
"""


@pytest.mark.parametrize("hold", ["shared", "exclusive"])
def test_socket_passed_by_portd_run_is_not_inherited(daemon: Daemon, project: Path, hold: str) -> None:
    words = put(project, "passed.mjs", PASSED)
    written = daemon.portd("run", "passed", "--socket", "--hold", hold, "--", *words)
    assert json.loads(written.stdout) == [True, True, True, False], written.stderr
    assert not list(daemon.client.leases(service="passed"))


FORKED = """
import { fork } from "node:child_process";
import { createServer } from "node:net";
import { listen } from "portd-client";
try {
  const { port } = await listen(createServer(), "family");
  console.log(port);
  fork(process.argv[1]).on("exit", () => process.exit());
} catch (error) {
  console.log(error.code);
}
"""


def test_what_parent_listens_on_child_does_not_give_back(daemon: Daemon, project: Path) -> None:
    program = daemon.start_portd("run", "family", "--", *put(project, "family.mjs", FORKED))
    written, _ = program.communicate(timeout=DEADLINE_S)
    port, code = written.split()
    assert code == "EADDRINUSE"
    [lease] = wait_for(lambda: list(daemon.client.leases(service="family", state="ended")), "it ends with its owner")
    assert lease["port"] == int(port)


@pytest.mark.parametrize("options", [["run", "crew", "--"], ["run", "crew", "--socket", "--"]])
def test_the_workers_of_a_cluster_share_what_portd_run_leased(daemon: Daemon, options: list[str]) -> None:
    program = daemon.start_portd(*options, "node", str(PACKAGE / "test/crew.mjs"))
    try:
        [lease] = wait_for(lambda: list(daemon.client.leases(service="crew", state="bound")), "the crew listens")
        answered = set()

        def both_answer() -> bool:
            with urlopen(f"http://127.0.0.1:{lease['port']}/", timeout=10) as answer:
                answered.add(int(answer.read()))
            return len(answered) == 2

        wait_for(both_answer, "both workers answer on the one port")
        assert len(list(daemon.client.leases(service="crew"))) == 1
    finally:
        end(program)


def test_workers_of_cluster_on_its_own_are_instance_each(daemon: Daemon) -> None:
    program = daemon.start_program(["node", str(PACKAGE / "test/crew.mjs")])
    try:
        leases = wait_for(
            lambda: len(now := list(daemon.client.leases(service="crew", state="bound"))) == 2 and now,
            "both workers listen",
        )
        assert leases
        assert len({lease["port"] for lease in leases}) == 2
        assert len({lease["owner"]["pid"] for lease in leases} - {program.pid}) == 2
    finally:
        end(program)
    wait_for(lambda: not list(daemon.client.leases(service="crew")), "the workers end with their primary")


# --- real services ---


def serves_three(daemon: Daemon, project: Path, service: str, start: Callable[[], subprocess.Popen[str]]) -> None:
    """Start three instances, find all by both clients, kill one, and see it leave by both."""
    programs = [start() for _ in range(3)]
    try:

        def passing() -> list[portd_client.Instance]:
            for program in programs:
                assert program.poll() is None or program is programs[0], program.communicate()[0]
            return portd_client.resolve_all(service, client=daemon.client)

        found = wait_for(lambda: len(now := passing()) == 3 and now, "all three pass their checks")
        assert found
        ports = {one.port for one in found}
        for one in found:
            with urlopen(f"http://{one.authority}/", timeout=10) as answer:
                assert answer.read() == b"ok"
        assert ports_seen_by_node(daemon, project, service, 3) == ports
        [gone] = [lease for lease in daemon.client.leases(service=service) if lease["owner"]["pid"] == programs[0].pid]
        end(programs[0])
        wait_for(lambda: {one.port for one in passing()} == ports - {gone["port"]}, "the killed one leaves")
        assert ports_seen_by_node(daemon, project, service, 2) == ports - {gone["port"]}
    finally:
        for program in programs:
            end(program)


@pytest.mark.parametrize("run", [False, True], ids=["on its own", "under portd run"])
@pytest.mark.parametrize(("kind", "source"), [("http", HTTP), ("express", EXPRESS)])
def test_three_instances_are_found_and_the_killed_one_leaves(
    daemon: Daemon, project: Path, kind: str, source: str, run: bool
) -> None:
    service = f"by-{kind}{'-run' if run else ''}"
    words = put(project, f"{service}.mjs", source.replace("SERVICE", json.dumps(service)))
    serves_three(
        daemon,
        project,
        service,
        lambda: (
            daemon.start_portd("run", service, "--check", "http:/healthz", "--", *words)
            if run
            else daemon.start_program(words)
        ),
    )


def test_services_in_python_are_found_by_the_node_client(daemon: Daemon, project: Path) -> None:
    serves_three(daemon, project, "by-python", lambda: daemon.start_program([sys.executable, "-u", "-c", BY_PYTHON]))


# --- the figure ---


@pytest.mark.parametrize("mode", ["bare", "portd"])
def test_the_start_is_measured(daemon: Daemon, mode: str) -> None:
    measured: dict[str, Any] = json.loads(output(daemon, ["node", str(PACKAGE / "test/start_bench.mjs"), mode]))
    assert measured["ms"] > measured["listen_ms"] > 0
    assert measured["rss_kib"] > 1024
