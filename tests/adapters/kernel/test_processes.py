"""Who a process is, and when it is gone: real processes, on both event loops."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess

import pytest

from portd.adapters.kernel import procfs
from portd.adapters.kernel.processes import AT_ONCE_S, KernelProcesses
from portd.core.model import ProcessId
from portd.seams import ForeignNetwork, ProcessGone

DEADLINE_S = 20.0


class Exits:
    """Notes who is gone, and lets a test wait for it."""

    def __init__(self) -> None:
        self.seen: list[ProcessId] = []
        self._more = asyncio.Event()

    def __call__(self, process: ProcessId) -> None:
        self.seen.append(process)
        self._more.set()

    async def wait(self, count: int = 1) -> list[ProcessId]:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.seen) < count:
                self._more.clear()
                await self._more.wait()
        return self.seen


async def turns(count: int = 5) -> None:
    """Let the loop look at its descriptors some times: whatever was ready has been called then."""
    for _ in range(count):
        await asyncio.sleep(0)


def is_zombie(pid: int) -> bool:
    return procfs.stat(pid).state == "Z"


def is_foreign(processes: KernelProcesses, pid: int) -> bool:
    try:
        processes.find(pid, "peercred")
    except ForeignNetwork:
        return True
    return False


def born_with(pid: int) -> subprocess.Popen:
    """Start a process that has a given pid, which is free: the kernel gives the number after the last one."""
    for _ in range(200):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(pid - 1))
        child = subprocess.Popen(["sleep", "60"])
        if child.pid == pid:
            return child
        end(child)
    pytest.fail(f"another process always came before us to pid {pid}")


def end(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()


# --- who it is ---


def test_a_process_is_found_with_what_tells_it_from_all_others(run, spawn):
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
    child = spawn(python="""
import ctypes, threading
threading.Thread(target=input).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
""")
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


@pytest.mark.parametrize("program", [
    "import os; input(); os.execvp('sleep', ['sleep', '61'])",
    "import os, threading as t; input(); t.Thread(target=os.execvp, args=('sleep', ['sleep', '61'])).start()",
], ids=["main thread", "another thread"])
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


def test_a_watched_process_that_changes_its_user_is_described_anew_at_once(run, spawn, wait_until, as_root):
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
        wait_until(lambda: clock() > changed_at + AT_ONCE_S)
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


def test_a_watched_process_that_leaves_our_network_is_refused_before_long(run, spawn, wait_until, as_root):
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


def test_a_process_whose_network_is_hidden_is_taken_for_ours(run, spawn, as_nobody):
    child = spawn("unshare", "-n", "sh", "-c", "echo; read x")
    child.stdout.readline()

    async def main():
        processes = KernelProcesses()
        with as_nobody():
            found = processes.find(child.pid, "peercred")
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


def test_a_pid_that_was_reused_before_the_loop_heard_of_the_exit_is_told_apart(run, as_root):
    first = subprocess.Popen(["sleep", "60"])

    async def main():
        processes, exits = KernelProcesses(), Exits()
        old = processes.find(first.pid, "peercred").id
        processes.watch(old, exits)
        end(first)
        second = born_with(first.pid)  # no await since: the exit is still to be heard of
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


def test_an_exit_is_told_once_though_a_later_process_with_the_pid_has_come_and_is_not_watched_any_more(run, as_root):
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
def test_the_start_the_boot_and_the_inode_each_tell_processes_apart(run, spawn, change):
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


# --- the moment that it is gone ---


@pytest.mark.parametrize("start", ["echo $$; exec sleep 60", "sleep 60 & echo $!"], ids=["child", "stranger"])
def test_an_exit_is_told_once_and_its_pidfd_closed(run, spawn, descriptors, start):
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


def test_a_process_that_is_not_watched_any_more_ends_unheard(run, spawn, descriptors):
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


def test_a_child_that_goes_on_does_not_keep_its_parent_alive(run, spawn):
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


def test_a_thousand_that_end_together_are_all_told(run, descriptors):
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


def test_one_pidfd_at_the_most_stays_open_for_those_that_were_found_and_are_not_watched(run, spawn, descriptors):
    children = [spawn("sleep", "60") for _ in range(3)]

    async def main():
        processes = KernelProcesses()
        await turns()
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
        assert descriptors() == before

    run(main())


def test_closing_gives_every_descriptor_back_and_tells_nobody(run, spawn, descriptors):
    children = [spawn("sleep", "60") for _ in range(3)]

    async def main():
        processes, exits = KernelProcesses(), Exits()
        await turns()
        before = descriptors()
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


def test_at_the_file_limit_nobody_is_watched_and_nobody_is_dead(run, spawn, no_descriptor_left, descriptors):
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
