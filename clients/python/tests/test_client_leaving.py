"""How programs leave: SIGTERM releases their leases, also where a program has a handler of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from clients.conformance.bed import DEADLINE_S, Daemon, end, wait_for

HOLDS = """
import asyncio
from portd_client import aio, release_on_signal

async def main():
    {before}
    release_on_signal()
    async with aio.lease("{service}", drain_s={drain_s}) as lease:
        {inside}
        server = await asyncio.start_server(lambda _, writer: writer.close(), sock=await lease.listen())
        print(lease.id, flush=True)
        await server.serve_forever()

{run}
"""
PLAIN = "asyncio.run(main())"
UVLOOP = "import uvloop; uvloop.run(main())"
OWN_HANDLER = "asyncio.get_running_loop().add_signal_handler(15, lambda: print('mine', flush=True))"
RUN_APP = """
from aiohttp import web
from portd_client import aio

async def hold(app):
    async with aio.lease("run-app") as lease:
        leases.append(lease.id)
        yield
        print("cleaned up", flush=True)

leases = []
app = web.Application()
app.cleanup_ctx.append(hold)
web.run_app(app, host="127.0.0.1", port=0, print=lambda _: print(leases[0], flush=True))  # it serves by then
"""


@contextmanager
def running(daemon: Daemon, source: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a program, and read the id of its lease."""
    program = daemon.start_python(source)
    try:
        assert program.stdout is not None
        yield program, program.stdout.readline().strip()
    finally:
        end(program)


def program(service: str, *, before: str = "pass", inside: str = "pass", run: str = PLAIN, drain_s: float = 0) -> str:
    """Write a program that holds a lease until it is ended."""
    return HOLDS.format(service=service, before=before, inside=inside, run=run, drain_s=drain_s)


@pytest.mark.parametrize("run", [PLAIN, UVLOOP], ids=["asyncio", "uvloop"])
def test_asyncio_program_releases_its_lease_at_sigterm_and_ends(daemon: Daemon, run: str) -> None:
    with running(daemon, program("leaves", run=run)) as (running_program, lease_id):
        running_program.send_signal(signal.SIGTERM)
        assert running_program.communicate(timeout=DEADLINE_S)[0] == ""
        assert running_program.returncode == -signal.SIGTERM
        assert daemon.client.lease(lease_id)["ended_because"] == "released"


def test_so_do_the_blocking_leases_of_the_same_program(daemon: Daemon) -> None:
    inside = "import portd_client; other = portd_client.lease('leaves-too')"
    with running(daemon, program("leaves", inside=inside)) as (running_program, lease_id):
        [other] = daemon.client.leases(service="leaves-too")
        running_program.send_signal(signal.SIGTERM)
        assert running_program.wait(DEADLINE_S) == -signal.SIGTERM
        assert [daemon.client.lease(one)["ended_because"] for one in (lease_id, other["id"])] == ["released"] * 2


@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_program_that_minds_sigterm_itself_keeps_its_own_handler(daemon: Daemon, where: str) -> None:
    source = program("minds", before=OWN_HANDLER) if where == "before" else program("minds", inside=OWN_HANDLER)
    with running(daemon, source) as (running_program, lease_id):
        running_program.send_signal(signal.SIGTERM)
        assert running_program.stdout is not None
        assert running_program.stdout.readline() == "mine\n"
        assert daemon.client.lease(lease_id)["state"] != "ended"


def test_sigterm_drains_while_serving_and_a_second_one_ends(daemon: Daemon) -> None:
    with running(daemon, program("drains", drain_s=600)) as (running_program, lease_id):
        running_program.send_signal(signal.SIGTERM)
        wait_for(lambda: daemon.client.lease(lease_id)["drain"], "it is drained")
        lease = daemon.client.lease(lease_id)
        with socket.create_connection((lease["address"], lease["port"]), DEADLINE_S) as caller:
            assert caller.recv(1) == b""
        running_program.send_signal(signal.SIGTERM)
        assert running_program.wait(DEADLINE_S) == -signal.SIGTERM
        wait_for(lambda: daemon.client.lease(lease_id)["ended_because"] == "owner_exited", "the daemon sees it")


@pytest.mark.parametrize("module", ["portd_client", "portd_client.aio"])
def test_no_signal_handler_is_installed_unasked(daemon: Daemon, module: str) -> None:
    source = (
        f"import asyncio, signal, {module}\n"
        "before = [signal.getsignal(one) for one in signal.valid_signals()]\n"
        "async def hold():\n    async with portd_client.aio.lease('quiet'): pass\n"
        + ("asyncio.run(hold())\n" if "aio" in module else "portd_client.lease('quiet').release()\n")
        + "print([signal.getsignal(one) for one in signal.valid_signals()] == before)\n"
    )
    assert daemon.start_python(source).communicate(timeout=DEADLINE_S)[0] == "True\n"


def test_undone_release_on_signal_leaves_the_default_handler(daemon: Daemon) -> None:
    source = (
        "import portd_client, signal\n"
        "undo = portd_client.release_on_signal(signal.SIGTERM, signal.SIGUSR2)\n"
        "print(signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL); undo()\n"
        "print([signal.getsignal(one) == signal.SIG_DFL for one in (signal.SIGTERM, signal.SIGUSR2)])\n"
    )
    assert daemon.start_python(source).communicate(timeout=DEADLINE_S)[0] == "False\n[True, True]\n"


def test_a_framework_that_ends_cleanly_at_sigterm_still_does(daemon: Daemon) -> None:
    with running(daemon, RUN_APP) as (running_program, lease_id):
        running_program.send_signal(signal.SIGTERM)
        assert running_program.communicate(timeout=DEADLINE_S)[0] == "cleaned up\n"
        assert running_program.returncode == 0
        assert daemon.client.lease(lease_id)["ended_because"] == "released"
