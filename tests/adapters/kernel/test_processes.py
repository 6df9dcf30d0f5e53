"""Who a process is, and that a later one with its pid is another: real processes, on both event loops."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess

import pytest

from portd.adapters.kernel import procfs
from portd.adapters.kernel.processes import LIVENESS_CACHE_S, KernelProcesses
from portd.core.model import ProcessId
from portd.leasing.seams import ForeignNetwork, ProcessGone
from tests.adapters.kernel.lives import Exits, born_with, end, is_zombie, turns


def is_foreign(processes: KernelProcesses, pid: int) -> bool:
    try:
        processes.find(pid, "peercred")
    except ForeignNetwork:
        return True
    return False


# --- who it is ---


def test_process_is_found_with_what_tells_it_from_all_others(run, spawn):
    child = spawn("sleep", "60")

    async def main():
        processes = KernelProcesses()
        found, again = processes.find(child.pid, "peercred"), processes.find(child.pid, "peercred")
        assert found == again
        assert found.id.pid == child.pid
        assert found.id.start_ticks == procfs.start_ticks(child.pid)
        assert found.id.boot_id == procfs.boot_id()
        assert found.owner.cmdline == ("sleep", "60")
        assert processes.is_alive(found.id)
        assert processes.find(os.getpid(), "peercred").id.inode != found.id.inode or found.id.inode == 0

    run(main())


def test_no_process_is_found_where_there_is_none(run):
    child = subprocess.Popen(["true"])
    child.wait()

    async def main():
        processes = KernelProcesses()
        for pid in (child.pid, 0, -1, 2**22 + 1, 2**31 - 1):
            with pytest.raises(ProcessGone):
                processes.find(pid, "token")

    run(main())


def test_the_id_of_a_thread_is_no_process(run, spawn):
    child = spawn(python="import threading as t; x = t.Thread(target=input); x.start(); print(x.native_id, flush=True)")
    thread = int(child.stdout.readline())

    async def main():
        assert thread != child.pid
        with pytest.raises(ProcessGone):
            KernelProcesses().find(thread, "token")

    run(main())


def test_a_zombie_is_gone_before_its_parent_has_taken_note(run, spawn, wait_until):
    child = spawn("sleep", "60")

    async def main():
        processes = KernelProcesses()
        identity = processes.find(child.pid, "peercred").id
        child.send_signal(signal.SIGKILL)
        wait_until(lambda: is_zombie(child.pid))
        assert not processes.is_alive(identity)
        with pytest.raises(ProcessGone):
            processes.find(child.pid, "peercred")
        with pytest.raises(ProcessGone):
            processes.watch(identity, print)

    run(main())


def test_a_process_whose_first_thread_has_ended_lives_on(run, spawn, wait_until):
    child = spawn(
        python="""
import ctypes, threading
threading.Thread(target=input).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""
    )
    child.stdout.readline()
    wait_until(lambda: is_zombie(child.pid))  # so /proc says

    async def main():
        processes, exits = KernelProcesses(), Exits()
        identity = processes.find(child.pid, "peercred").id
        processes.watch(identity, exits)
        await turns()
        assert processes.is_alive(identity)
        assert exits.seen == []
        child.communicate("the last thread ends\n")
        assert await exits.wait() == [identity]

    run(main())


@pytest.mark.parametrize(
    "program",
    [
        "import os; input(); os.execvp('sleep', ['sleep', '61'])",
        "import os, threading as t; input(); t.Thread(target=os.execvp, args=('sleep', ['sleep', '61'])).start()",
    ],
    ids=["main thread", "another thread"],
)
def test_exec_keeps_the_identity_and_is_described_anew(run, spawn, wait_until, program):
    child = spawn(python=program)

    async def main():
        processes, exits = KernelProcesses(), Exits()
        before = processes.find(child.pid, "peercred")
        processes.watch(before.id, exits)
        assert processes.find(child.pid, "peercred") == before
        child.stdin.write("\n")
        child.stdin.flush()
        wait_until(lambda: processes.find(child.pid, "peercred").owner.cmdline == ("sleep", "61"))
        after = processes.find(child.pid, "peercred")
        assert after.id == before.id
        assert after.owner.exe == os.path.realpath("/usr/bin/sleep") != before.owner.exe
        await turns()
        assert exits.seen == []
        assert processes.is_alive(before.id)
        processes.close()

    run(main())


def test_watched_process_is_described_again_after_setuid(run, spawn, wait_until, as_root):
    child = spawn(python="import os; input(); os.setuid(65534); print(flush=True); input()")

    async def main():
        processes, clock = KernelProcesses(), asyncio.get_running_loop().time
        before = processes.find(child.pid, "peercred")
        processes.watch(before.id, print)
        assert processes.find(child.pid, "peercred").owner.uid == 0
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        changed_at = clock()
        wait_until(lambda: clock() > changed_at + LIVENESS_CACHE_S)
        assert processes.find(child.pid, "peercred").owner.uid == 65534
        assert processes.find(child.pid, "socket").owner.known_by == "socket"
        processes.close()

    run(main())


def test_a_process_of_another_network_namespace_is_refused(run, spawn, as_root):
    child = spawn("unshare", "-n", "sh", "-c", "echo; read x")
    child.stdout.readline()

    async def main():
        with pytest.raises(ForeignNetwork):
            KernelProcesses().find(child.pid, "peercred")

    run(main())


def test_pid_of_a_lower_namespace_is_translated(run, spawn, as_root):
    shell = spawn("unshare", "-p", "-f", "--mount-proc", "sh", "-c", "sleep 60 & echo $!; wait")
    inner = int(shell.stdout.readline())
    caller = procfs.children(shell.pid)[0]
    sleeping = procfs.children(caller)[0]

    async def main():
        processes = KernelProcesses()
        assert processes.translate(inner, caller) == sleeping
        assert processes.translate(1, caller) == caller
        assert processes.translate(os.getpid(), os.getpid()) == os.getpid()
        with pytest.raises(ProcessGone):
            processes.translate(os.getpid(), caller)

    try:
        run(main())
    finally:
        os.kill(caller, 9)  # init of the namespace: everybody in it ends


def test_watched_process_that_leaves_our_network_is_refused_before_long(run, spawn, wait_until, as_root):
    child = spawn(python="import ctypes; input(); print(ctypes.CDLL(None).unshare(0x40000000), flush=True); input()")

    async def main():
        processes = KernelProcesses()
        processes.watch(processes.find(child.pid, "peercred").id, print)
        processes.find(child.pid, "peercred")
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "0\n"
        wait_until(lambda: is_foreign(processes, child.pid))
        processes.close()

    run(main())


def test_another_users_process_of_another_network_is_refused_without_privilege(run, spawn, as_nobody):
    child, inside = spawn("unshare", "-n", "sh", "-c", "echo; read x"), spawn("sleep", "60")
    child.stdout.readline()

    async def main():
        processes = KernelProcesses()
        with as_nobody():
            with pytest.raises(ForeignNetwork):
                processes.find(child.pid, "peercred")
            found = processes.find(inside.pid, "peercred")
        assert (found.owner.uid, found.owner.exe) == (0, None)

    run(main())


# --- a pid that is somebody else's by now ---


def test_a_later_process_with_the_same_pid_is_another_one(run, as_root):
    first = subprocess.Popen(["sleep", "60"])

    async def main():
        processes = KernelProcesses()
        identity = processes.find(first.pid, "peercred").id
        end(first)
        second = born_with(first.pid)
        try:
            assert processes.find(second.pid, "peercred").id != identity
            assert not processes.is_alive(identity)
            with pytest.raises(ProcessGone):
                processes.watch(identity, print)
            assert processes.watched_count == 0
        finally:
            end(second)

    run(main())


def test_pid_reused_before_the_exit_was_seen_is_distinguished(run, as_root):
    first = subprocess.Popen(["sleep", "60"])

    async def main():
        processes, exits = KernelProcesses(), Exits()
        old = processes.find(first.pid, "peercred").id
        processes.watch(old, exits)
        end(first)
        second = born_with(first.pid)  # no await since: the exit was not reported yet
        try:
            new = processes.find(second.pid, "peercred").id
            assert new != old
            processes.watch(new, exits)
            assert not processes.is_alive(old)
            assert await exits.wait() == [old]
            assert processes.is_alive(new)
            assert processes.find(second.pid, "peercred").id == new
            assert processes.watched_count == 1
        finally:
            end(second)
        assert await exits.wait(2) == [old, new]

    run(main())


def test_exit_is_reported_once_although_its_pid_was_reused(run, as_root):
    first = subprocess.Popen(["sleep", "60"])

    async def main():
        processes, exits = KernelProcesses(), Exits()
        old = processes.find(first.pid, "peercred").id
        processes.watch(old, exits)
        end(first)
        second = born_with(first.pid)
        try:
            new = processes.find(second.pid, "peercred").id
            processes.watch(new, exits)
            processes.unwatch(new)
            await exits.wait()
            await turns()
            assert exits.seen == [old]
            assert processes.find(second.pid, "peercred").id == new
            assert processes.watched_count == 0
        finally:
            end(second)
            processes.close()

    run(main())


@pytest.mark.parametrize("change", [{"start_ticks": 1}, {"boot_id": "another boot"}, {"inode": 1}])
def test_start_boot_and_inode_each_distinguish_processes(run, spawn, change):
    child = spawn("sleep", "60")

    async def main():
        processes = KernelProcesses()
        identity = processes.find(child.pid, "peercred").id
        other = ProcessId(**{name: getattr(identity, name) for name in identity.__struct_fields__} | change)
        assert processes.is_alive(identity)
        assert not processes.is_alive(other)
        with pytest.raises(ProcessGone):
            processes.watch(other, print)

    run(main())
