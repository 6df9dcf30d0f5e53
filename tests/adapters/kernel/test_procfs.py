"""/proc, read: literal kernel text for the parsers, real processes for the readers."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import time

import pytest

from portd import inspector
from portd.adapters.kernel import procfs

STAT = b"4711 (%s) %c 4700 4711 4700 34816 4711 4194304 120 0 0 0 1 2 0 0 20 0 1 0 987654 5000000 300 184467440737"


@pytest.mark.parametrize("name", [b"bash", b"a b", b"x) Z 1 (y", b")", b"", b"\n(", b"\xff\xfe"])
def test_a_stat_is_read_whatever_the_process_calls_itself(name):
    assert procfs.parse_stat(STAT % (name, ord("S"))) == procfs.Stat("S", 4700, 987654)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        (b"0::/system.slice/nginx.service\n", "nginx.service"),
        (b"0::/system.slice/system-getty.slice/getty@tty1.service\n", "getty@tty1.service"),
        (b"0::/system.slice/web.service/worker\n", "web.service"),
        (b"0::/user.slice/user-1000.slice/user@1000.service/app.slice/web.service\n", "web.service"),
        (b"0::/user.slice/user-1000.slice/session-3.scope\n", "session-3.scope"),
        (b"0::/user.slice/user-1000.slice/user@1000.service/init.scope\n", "init.scope"),
        (b"0::/system.slice/_cgroup.service\n", "cgroup.service"),
        (b"0::/system.slice/gone.service (deleted)\n", "gone.service"),
        (b"0::/../../system.slice/outside.service\n", "outside.service"),
        (b"0::/\n", None),
        (b"0::/docker/0123456789ab\n", None),
        (b"0::/user.slice\n", None),
        (b"", None),
        # v1: the controllers' trees say nothing of units, systemd's own does
        (
            b"12:cpu,cpuacct:/system.slice\n3:pids:/x.service\n1:name=systemd:/system.slice/cron.service\n",
            "cron.service",
        ),
        # hybrid: both trees are there; the unified one counts, unless it is empty
        (b"1:name=systemd:/system.slice/cron.service\n0::/system.slice/cron.service\n", "cron.service"),
        (b"4:memory:/\n1:name=systemd:/user.slice/session-1.scope\n0::/\n", "session-1.scope"),
        (b"0::/system.slice/a:b.service\n", "a:b.service"),
    ],
)
def test_the_unit_is_the_innermost_one_of_the_cgroup(text, unit):
    parsed = procfs.parse_unit(text)
    assert (parsed and parsed.name) == unit


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (b"sleep\x0060\x00", ("sleep", "60")),
        (b"sh\x00-c\x00\x00x\x00", ("sh", "-c", "", "x")),
        (b"postgres: writer \x00\x00\x00\x00", ("postgres: writer ",)),
        (b"caf\xe9\x00", ("caf�",)),
        (b"", None),
    ],
)
def test_a_command_line_is_split_where_the_process_did(text, arguments):
    assert procfs.parse_arguments(text) == arguments


def test_a_command_line_is_kept_up_to_a_bound():
    assert len(procfs.parse_arguments(b"x\x00" * 1000)) == procfs.ARGUMENTS_MAX


def test_a_process_is_described_as_it_was_started(spawn):
    before = time.time()
    child = spawn("sleep", "60")
    owner = procfs.describe(child.pid, "peercred")
    assert (owner.pid, owner.uid, owner.user) == (child.pid, os.geteuid(), pwd.getpwuid(os.geteuid()).pw_name)
    assert (owner.exe, owner.cmdline) == (os.path.realpath("/usr/bin/sleep"), ("sleep", "60"))
    assert before - 0.02 <= owner.started_at <= time.time() + 0.02  # the kernel counts in ticks of 10 ms
    assert owner.known_by == "peercred"


def test_a_name_made_to_deceive_changes_nothing(spawn):
    child = spawn("sh", "-c", "printf '%s' ') Z 1 (' > /proc/$$/comm; echo; read x")
    child.stdout.readline()
    assert procfs.parent(child.pid) == os.getpid()
    assert procfs.start_ticks(child.pid) is not None


def test_uid_is_effective_even_of_an_undumpable_process(spawn, as_root):
    child = spawn(python="import os; os.seteuid(65534); print(flush=True); input()")
    child.stdout.readline()
    assert os.stat(f"/proc/{child.pid}/fd").st_uid == 0  # it can't be dumped, and its other files say root
    assert procfs.uid(child.pid) == 65534


def test_what_is_gone_reads_as_nothing():
    child = subprocess.Popen(["true"])
    child.wait()
    pid = child.pid
    assert procfs.describe(pid, "socket") is None
    assert (procfs.start_ticks(pid), procfs.parent(pid), procfs.uid(pid), procfs.cmdline(pid)) == (None,) * 4
    assert (inspector.socket_inodes(pid), procfs.network_namespace(pid)) == (set(), None)


def test_a_zombie_has_no_start(spawn, wait_until):
    child = spawn("sleep", "60")
    assert procfs.start_ticks(child.pid) is not None
    child.send_signal(signal.SIGKILL)
    wait_until(lambda: procfs.stat(child.pid).state == "Z")
    assert procfs.start_ticks(child.pid) is None


def test_what_kernel_hides_is_none_and_rest_is_there(spawn, as_nobody):
    child = spawn("sleep", "60")
    with as_nobody():
        owner = procfs.describe(child.pid, "socket")
        hidden = inspector.socket_inodes(child.pid), owner.exe
    assert hidden == (set(), None)
    assert (owner.uid, owner.cmdline) == (0, ("sleep", "60"))


def test_at_file_limit_stat_raises_rather_than_reads_as_gone(spawn, no_descriptor_left):
    child = spawn("sleep", "60")
    with no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
        procfs.stat(child.pid)


def test_open_sockets_of_process_are_found_by_their_inodes(spawn):
    with socket.socket() as ours, socket.socket() as not_passed:
        child = spawn("sleep", "60", pass_fds=[ours.fileno()])
        found = inspector.socket_inodes(child.pid)
        assert os.fstat(ours.fileno()).st_ino in found
        assert os.fstat(not_passed.fileno()).st_ino not in found
        assert {os.fstat(one.fileno()).st_ino for one in (ours, not_passed)} <= inspector.socket_inodes(os.getpid())


def test_a_child_shares_our_network_unless_it_has_its_own(spawn, as_root):
    inside, outside = spawn("sleep", "60"), spawn("unshare", "-n", "sh", "-c", "echo; read x")
    outside.stdout.readline()
    ours = procfs.network_namespace("self")
    assert ours is not None
    assert procfs.network_namespace(inside.pid) == ours
    assert procfs.network_namespace(outside.pid) not in (ours, None)


def test_namespaces_of_another_users_process_are_known_without_privilege(spawn, as_nobody):
    inside, outside = spawn("sleep", "60"), spawn("unshare", "-n", "-U", "-r", "sh", "-c", "echo; read x")
    outside.stdout.readline()
    with as_nobody():
        ours = procfs.network_namespace("self"), procfs.user_map("self")
        assert (procfs.network_namespace(inside.pid), procfs.user_map(inside.pid)) == ours
        assert procfs.network_namespace(outside.pid) not in (ours[0], None)
        assert procfs.user_map(outside.pid) not in (ours[1], None)


def test_all_processes_are_listed_the_newest_pid_first(spawn):
    child = spawn("sleep", "60")
    pids = procfs.pids()
    assert {child.pid, os.getpid()} <= set(pids)
    assert pids == sorted(pids, reverse=True)


def test_this_boot_has_a_name():
    with open("/proc/sys/kernel/random/boot_id") as file:
        assert procfs.boot_id() == file.read().strip() != ""


def test_another_mount_of_proc_can_be_read(tmp_path):
    process = tmp_path / "42"
    process.mkdir()
    (process / "stat").write_bytes(STAT % (b"x", ord("S")))
    (process / "cgroup").write_bytes(b"0::/system.slice/x.service\n")
    owner = procfs.describe(42, "token", root=str(tmp_path))
    assert (owner.pid, owner.unit, owner.cmdline, owner.exe) == (42, "x.service", None, None)
    assert (procfs.parent(42, str(tmp_path)), procfs.pids(str(tmp_path))) == (4700, [42])
