"""The moment that a process is gone: real processes, on both event loops."""

from __future__ import annotations

import asyncio
import errno
import os
import signal

import pytest

from portd.adapters.kernel.processes import KernelProcesses
from portd.core.model import ProcessId
from tests.adapters.kernel.lives import Exits, is_zombie, turns

# --- which exits are reported ---


@pytest.mark.parametrize("start", ["echo $$; exec sleep 60", "sleep 60 & echo $!"], ids=["child", "foreign"])
def test_exit_is_reported_once_and_its_pidfd_closed(run, spawn, descriptors, start):
    pid = int(spawn("sh", "-c", start).stdout.readline())

    async def main():
        processes, exits = KernelProcesses(), Exits()
        await turns()
        before = descriptors()
        identity = processes.find(pid, "peercred").id
        processes.watch(identity, exits)
        processes.watch(identity, exits)
        assert (descriptors() - before, processes.watched_count) == (1, 1)
        await turns()
        assert exits.seen == []
        os.kill(pid, signal.SIGKILL)
        assert await exits.wait() == [identity]
        await turns()
        assert exits.seen == [identity]
        assert (descriptors(), processes.watched_count) == (before, 0)

    run(main())


def test_exit_of_an_unwatched_process_is_not_reported(run, spawn, descriptors):
    kept, left = spawn("sleep", "60"), spawn("sleep", "60")

    async def main():
        processes, exits = KernelProcesses(), Exits()
        await turns()
        before = descriptors()
        identities = [processes.find(child.pid, "peercred").id for child in (kept, left)]
        for identity in identities:
            processes.watch(identity, exits)
        processes.unwatch(identities[1])
        processes.unwatch(identities[1])
        left.kill()
        left.wait()
        kept.kill()
        assert await exits.wait() == [identities[0]]
        assert descriptors() == before
        processes.close()

    run(main())


def test_child_that_goes_on_does_not_keep_its_parent_alive(run, spawn):
    parent = spawn("sh", "-c", "sleep 60 & echo $!; read x")
    child = int(parent.stdout.readline())

    async def main():
        processes, exits = KernelProcesses(), Exits()
        identity = processes.find(parent.pid, "peercred").id
        processes.watch(identity, exits)
        parent.kill()
        assert await exits.wait() == [identity]
        assert processes.is_alive(processes.find(child, "peercred").id)
        os.kill(child, signal.SIGKILL)

    run(main())


def test_simultaneous_exits_skip_a_watch_that_ended_meanwhile(run, spawn, wait_until):
    children = [spawn("sleep", "60") for _ in range(4)]

    async def main():
        processes, exits = KernelProcesses(), Exits()
        identities = {processes.find(child.pid, "peercred").id for child in children}

        def on_exit(process: ProcessId) -> None:
            if not exits.seen:
                left_out.add(next(iter(identities - {process})))
                processes.unwatch(*left_out)
            exits(process)

        left_out: set[ProcessId] = set()
        for identity in identities:
            processes.watch(identity, on_exit)
        for child in children:
            child.kill()
        wait_until(lambda: all(is_zombie(child.pid) for child in children))
        assert set(await exits.wait(3)) == identities - left_out
        await turns()
        assert (len(exits.seen), processes.watched_count) == (3, 0)
        processes.close()

    run(main())


def test_failing_exit_callback_does_not_stop_the_others(run, spawn, wait_until):
    children = [spawn("sleep", "60") for _ in range(3)]

    async def main():
        processes, exits, failures = KernelProcesses(), Exits(), []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context["exception"]))
        identities = [processes.find(child.pid, "peercred").id for child in children]

        def on_exit(process: ProcessId) -> None:
            exits(process)
            if len(exits.seen) == 1:
                raise RuntimeError("the first one")

        for identity in identities:
            processes.watch(identity, on_exit)
        for child in children:
            child.kill()
        wait_until(lambda: all(is_zombie(child.pid) for child in children))
        assert set(await exits.wait(3)) == set(identities)
        assert (len(exits.seen), [str(one) for one in failures]) == (3, ["the first one"])
        processes.close()

    run(main())


def test_a_thousand_simultaneous_exits_are_all_reported(run, descriptors):
    reading, writing = os.pipe()
    silent = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0), (os.POSIX_SPAWN_DUP2, reading, 0)]
    pids = [os.posix_spawn("/bin/cat", ["cat"], {}, file_actions=silent) for _ in range(1000)]
    os.close(reading)

    async def main():
        processes, exits = KernelProcesses(), Exits()
        await turns()
        before = descriptors()
        identities = {processes.find(pid, "peercred").id for pid in pids}
        for identity in identities:
            processes.watch(identity, exits)
        assert (len(identities), descriptors() - before) == (1000, 1000)
        os.close(writing)  # the end of everybody's input
        assert set(await exits.wait(1000)) == identities
        assert (len(exits.seen), processes.watched_count) == (1000, 0)
        assert descriptors() == before - 1

    try:
        run(main())
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_at_most_one_pidfd_stays_open_for_unwatched_processes(run, spawn, descriptors):
    children = [spawn("sleep", "60") for _ in range(3)]

    async def main():
        await turns()
        without = descriptors()
        processes = KernelProcesses()
        before = descriptors()
        found = [processes.find(child.pid, "peercred").id for child in children]
        assert descriptors() == before + 1
        processes.watch(found[2], print)
        assert descriptors() == before + 1
        processes.find(children[0].pid, "peercred")
        processes.watch(found[1], print)
        assert descriptors() == before + 2
        processes.find(children[0].pid, "peercred")
        processes.close()
        assert descriptors() == without

    run(main())


def test_closing_gives_every_descriptor_back_and_tells_nobody(run, spawn, descriptors):
    children = [spawn("sleep", "60") for _ in range(3)]

    async def main():
        await turns()
        before = descriptors()
        processes, exits = KernelProcesses(), Exits()
        for child in children:
            processes.watch(processes.find(child.pid, "peercred").id, exits)
        processes.close()
        assert descriptors() == before
        for child in children:
            child.kill()
            child.wait()
        await turns()
        assert exits.seen == []

    run(main())


# --- the file limit ---


def test_at_file_limit_nobody_is_watched_and_nobody_is_dead(run, spawn, no_descriptor_left, descriptors):
    child, other = spawn("sleep", "60"), spawn("sleep", "60")

    async def main():
        processes = KernelProcesses()
        identity, watched = (processes.find(one.pid, "peercred").id for one in (child, other))
        processes.watch(watched, print)
        before = descriptors()
        for left in (0, 1):  # with one left the pidfd opens, and /proc does not
            with no_descriptor_left(left):
                for attempt in (processes.find, processes.watch):
                    with pytest.raises(OSError, match="Too many open files") as raised:
                        attempt(*((child.pid, "peercred") if attempt == processes.find else (identity, print)))
                    assert raised.value.errno == errno.EMFILE
                assert processes.is_alive(identity)
                assert processes.is_alive(watched)
        assert descriptors() == before
        processes.close()

    run(main())
