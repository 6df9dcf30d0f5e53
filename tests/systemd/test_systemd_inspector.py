"""Least privilege: what the units can do and can't, under a real systemd, with the inspector and without it."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from box import wait_for

pytestmark = pytest.mark.systemd
TAKEN_OVER = (Path(__file__).parent / "taken_over.py").read_text()
VICTIM = """
import ctypes, os, time
secret = ctypes.create_string_buffer(b"a secret of root")
print(os.getpid(), ctypes.addressof(secret), flush=True)
time.sleep(1000)
"""
SERVER = "exec setpriv --reuid alice --regid alice --clear-groups /usr/bin/python3 -m http.server --bind 127.0.0.1"
BIND_SERVICE = 1 << 10


@pytest.fixture
def inspected(box):
    """Return the box with the inspector's socket open, however the test before left it."""
    box.run("systemctl start portd-inspector.socket")
    return box


@pytest.fixture
def server(box):
    """A server of alice's on a port without a lease; returns its pid and its port."""
    process = box.start(f"{SERVER} 18080 2>/dev/null")
    try:
        wait_for(lambda: box.ask("curl -s http://127.0.0.1:18080/ >/dev/null")[0] == 0, "alice's server answers")
        yield int(box.run("pgrep -u alice -f http.server").split()[0]), 18080
    finally:
        process.kill()
        box.run("pkill -u alice -f http.server", check=False)
        process.wait()


def listener(box, port):
    return box.api(f"/v1/ports/{port}")["listeners"][0]


def test_the_daemon_has_one_capability_and_the_inspector_two(inspected):
    inspected.api("/v1/status")
    masks = [
        int(inspected.run(f"awk '/^CapPrm/{{print $2}}' /proc/{inspected.show('MainPID', unit)}/status"), 16)
        for unit in ("portd.service", "portd-inspector.service")
    ]
    assert masks == [BIND_SERVICE, 1 << 19 | 1 << 2]


def test_a_process_of_another_user_is_named_through_the_inspector(inspected, server):
    pid, port = server
    found = wait_for(lambda: (one := listener(inspected, port))["exe"] and one, "the inspector answers")
    assert (found["pid"], found["user"]) == (pid, "alice")


def test_without_an_inspector_ports_are_leased_and_only_users_shown(inspected, server):
    _, port = server
    units = "portd-inspector.socket portd-inspector.service"
    inspected.run(f"systemctl stop {units} && mkdir /opt/units && cd /etc/systemd/system && mv {units} /opt/units")
    try:
        inspected.run("systemctl daemon-reload && systemctl restart portd.service")
        lease = inspected.api("/v1/leases", {"service": "orders", "ttl": 60})
        assert inspected.api(f"/v1/leases/{lease['id']}")["state"] == "held"
        found = listener(inspected, port)
        assert (found["pid"], found["user"]) == (None, "alice")
        warnings = inspected.api("/v1/status")["warnings"]
        assert any("portd-inspector.socket" in warning for warning in warnings)
        assert "portd-inspector.socket" in inspected.ask("portd doctor")[1]
        assert inspected.api("/healthz") == {"status": "ok"}
    finally:
        inspected.run("mv /opt/units/* /etc/systemd/system && rmdir /opt/units && systemctl daemon-reload")
        inspected.run("systemctl start portd-inspector.socket")
    wait_for(lambda: listener(inspected, port)["exe"], "the process is seen again")
    assert not any("inspector" in warning for warning in inspected.api("/v1/status")["warnings"])


def test_an_inspector_that_is_killed_starts_again_unnoticed(inspected, server):
    pid, port = server
    wait_for(lambda: listener(inspected, port)["pid"] == pid, "the process is seen")
    inspected.run("systemctl kill --signal=KILL portd-inspector.service")
    wait_for(lambda: listener(inspected, port)["pid"] == pid, "the process is seen again")


def test_only_the_daemons_user_opens_the_inspectors_socket(inspected):
    assert inspected.run("stat -c %U:%G:%a /run/portd-inspector.sock").strip() == "portd:portd:600"
    connect = "from socket import *; socket(AF_UNIX, SOCK_SEQPACKET).connect('/run/portd-inspector.sock')"
    as_alice = "setpriv --reuid alice --regid alice --clear-groups /usr/bin/python3 -c "
    _, _, err = inspected.ask(as_alice + shlex.quote(connect))
    assert "PermissionError" in err


def test_daemon_that_was_taken_over_reads_nothing_of_other_users(inspected):
    box = inspected
    box.run(
        "for home in /root /home/alice; do echo private >$home/private; chmod 600 $home/private; done; "
        "chown alice: /home/alice/private"
    )
    victim = box.start(f"exec /usr/bin/python3 -c {shlex.quote(VICTIM)}", stdout=subprocess.PIPE)
    alice = box.start(
        "cd /home/alice && exec setpriv --reuid alice --regid alice --clear-groups "
        "env PORTD_LEASE=lease-1 PORTD_TOKEN=secret PASSWORD=hidden sleep 1000"
    )
    try:
        root, address = victim.stdout.readline().split()
        pid = wait_for(lambda: box.ask("pgrep -u alice -x sleep")[1].strip(), "alice's process runs")
        box.run(f"cat >/opt/taken_over.py <<'EOF'\n{TAKEN_OVER}\nEOF")
        box.run(
            "mkdir -p /run/systemd/system/portd.service.d && printf '[Service]\\nType=oneshot\\nExecStart=\\n"
            f"ExecStart=/usr/bin/python3 /opt/taken_over.py {root} {address} {pid}\\nWatchdogSec=0\\nRestart=no\\n' "
            ">/run/systemd/system/portd.service.d/taken-over.conf && systemctl daemon-reload"
        )
        box.run("systemctl stop portd.service; systemctl start portd.service", check=False)
        lines = [line["MESSAGE"] for line in box.journal()]
    finally:
        box.run("rm -rf /run/systemd/system/portd.service.d && systemctl daemon-reload && systemctl restart portd")
        for process in (victim, alice):
            process.kill()
            process.wait()
        victim.stdout.close()
    found = json.loads(next(line for line in reversed(lines) if line.startswith('{"attempts"')))
    assert found["worked"] == {}
    assert found["attempts"] > 35
    assert found["uid"] > 0
    assert set(found["capabilities"]) == {BIND_SERVICE}
    assert "lease-1" in found["answer"]
    assert "secret" not in found["answer"]
    assert "hidden" not in found["answer"]
