"""What the doctor makes of what it read: each diagnosis, its fix, and its absence where all is well."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from portd._client.errors import DaemonUnavailable
from portd.cli import diagnoses
from tests.cli.bed import Daemon, serving, wait_for

POOL = range(20000, 30000)
LINUX_RANGE = "32768\t60999\n"
NOTHING_GRANTED = "CapEff:\t0000000000000000\n"
DNS = {"enabled": True, "listen": ["127.0.0.1:8600"], "zone": "portd.internal.", "problem": None}


def view(port: int, protocol: str, verdict: str, exe: str, pid: int | None = 7) -> dict[str, Any]:
    listener = {"address": "0.0.0.0", "pid": pid, "uid": 0, "user": "root", "exe": exe, "cmdline": None, "unit": None}
    return {"port": port, "protocol": protocol, "verdict": verdict, "lease": None, "listeners": [listener]}


def lease(**fields: Any) -> dict[str, Any]:
    return {
        "id": "0" * 24,
        "service": "web",
        "instance": "web-1",
        "endpoint": "main",
        "address": "127.0.0.1",
        "port": 20000,
        "state": "bound",
        "listening": ["127.0.0.1"],
        "elsewhere": [],
        **fields,
    }


def one(found: Any) -> diagnoses.Diagnosis:
    made = list(found)
    assert len(made) == 1
    return made[0]


def test_pool_ports_in_the_ephemeral_range_get_the_exact_sysctl() -> None:
    ports = [32766, 32767, 32768, 32769, 40000]
    found = one(diagnoses.ephemeral(ports, {}, LINUX_RANGE, "8080,9148-9149\n", "portd.toml"))
    assert found.severity == "problem"
    assert "32768-32769,40000" in found.what
    assert "ip_local_reserved_ports=8080,9148-9149,32768-32769,40000" in found.fix  # a write replaces the list


def test_a_static_port_in_the_ephemeral_range_names_its_service() -> None:
    found = one(diagnoses.ephemeral(POOL, {50051: "grpc", 5432: "postgres"}, LINUX_RANGE, "", "portd.toml"))
    assert "50051 (grpc)" in found.what
    assert "5432" not in found.what
    assert "ip_local_reserved_ports=50051" in found.fix


@pytest.mark.parametrize(("pool", "reserved"), [(POOL, ""), ([40000, 40001], "1,40000-40100")])
def test_ports_outside_the_ephemeral_range_or_reserved_are_fine(pool: Any, reserved: str) -> None:
    assert not list(diagnoses.ephemeral(pool, {40000: "web"} if reserved else {}, LINUX_RANGE, reserved, "portd.toml"))


def test_what_cannot_be_read_is_not_diagnosed() -> None:
    assert not list(diagnoses.ephemeral(POOL, {}, "", "", "portd.toml"))
    assert not list(diagnoses.descriptors(10_000, ""))
    assert not list(diagnoses.capabilities("", [80], ""))
    assert not list(diagnoses.clock(None))
    assert not list(diagnoses.resolver(None, "ns.portd.internal", DNS, ""))


def test_only_listeners_inside_the_pool_need_a_lease() -> None:
    ports = [
        view(20005, "tcp", "unmanaged", "/usr/bin/node"),
        view(20006, "tcp", "bound", "/usr/bin/python3"),
        view(80, "tcp", "unmanaged", "/usr/sbin/nginx"),
    ]
    found = one(diagnoses.unleased(POOL, ports, "portd.toml"))
    assert "20005/tcp (node[7] root)" in found.what
    assert "portd adopt SERVICE 20005" in found.fix
    assert "exclude = [20005]" in found.fix
    assert not list(diagnoses.unleased(POOL, ports[1:], "portd.toml"))


def test_an_owner_that_listens_elsewhere_is_a_problem() -> None:
    found = one(diagnoses.listeners([lease(state="held", elsewhere=[{"address": "::1", "port": 5173}])]))
    assert "leased port 20000, and its owner listens on [::1]:5173" in found.what
    assert "{port}" in found.fix


def test_a_loopback_lease_open_to_the_lan_is_advice() -> None:
    found = one(diagnoses.listeners([lease(listening=["0.0.0.0"])]))
    assert (found.severity, "open to the LAN" in found.what) == ("advice", True)
    assert not list(diagnoses.listeners([lease(), lease(address="0.0.0.0", listening=["0.0.0.0"])]))


def test_a_foreign_process_on_a_leased_port_is_a_problem() -> None:
    assert "portd who 20000" in one(diagnoses.listeners([lease(state="conflict")])).fix


def test_a_file_limit_too_low_gets_the_number_needed() -> None:
    limits = "Max open files            1024                 {}               files     \n"
    found = one(diagnoses.descriptors(10_000, limits.format(4096)))
    assert "LimitNOFILE=21024" in found.fix
    assert not list(diagnoses.descriptors(10_000, limits.format(524288)))
    assert not list(diagnoses.descriptors(10_000, limits.format("unlimited")))


def test_an_unbindable_static_port_is_a_problem() -> None:
    found = one(diagnoses.capabilities(NOTHING_GRANTED, [80], "1024\n"))
    assert "80" in found.what
    assert "CAP_NET_BIND_SERVICE" in found.fix
    assert not list(diagnoses.capabilities("CapEff:\t000001ffffffffff\n", [80], "1024\n"))
    assert not list(diagnoses.capabilities(NOTHING_GRANTED, [80], "80\n"))  # as the kernel says


def test_a_pool_below_the_unprivileged_ports_is_a_problem() -> None:
    found = one(diagnoses.capabilities(NOTHING_GRANTED, [], "30000\n", POOL))
    assert "20000-29999" in found.what
    assert not list(diagnoses.capabilities(NOTHING_GRANTED, [], "1024\n", POOL))


@pytest.mark.parametrize(("port", "is_warned"), [(50051, True), (5432, False)])
def test_check_config_warns_of_static_port_in_ephemeral_range(tmp_path: Path, port: int, is_warned: bool) -> None:
    (tmp_path / "portd.toml").write_text(f"[static.grpc]\nport = {port}\n")
    command = [sys.executable, "-m", "portd", "serve", "--check-config", "--config", str(tmp_path / "portd.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert (f"{port} (grpc)" in done.stderr) is is_warned


def test_check_config_of_a_wrong_file_is_a_clear_no(tmp_path: Path) -> None:
    (tmp_path / "portd.toml").write_text("[leases]\ncooldwn = 1\n")
    command = [sys.executable, "-m", "portd", "serve", "--check-config", "--config", str(tmp_path / "portd.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "portd.toml:2: leases.cooldwn" in done.stderr


def test_only_a_foreign_mdns_responder_is_a_problem() -> None:
    resolved = view(5353, "udp", "unmanaged", "/usr/lib/systemd/systemd-resolved")
    avahi = view(5353, "udp", "unmanaged", "/usr/sbin/avahi-daemon")

    def found(ports: list[dict[str, Any]], responder: str = "embedded", **status: Any) -> list[diagnoses.Diagnosis]:
        mdns = {"enabled": True, "responder": responder, "guardian": status.get("guardian")}
        return list(diagnoses.responders(ports, {"pid": status.get("pid", 1), "mdns": mdns}, "portd.toml"))

    assert "systemd-resolved" in one(found([resolved])).what
    assert not found([resolved], pid=7)
    assert not found([resolved], guardian=7)
    assert not found([avahi], responder="avahi")
    assert found([avahi])
    assert not list(diagnoses.responders([avahi], {"pid": 1, "mdns": {"enabled": False}}, "portd.toml"))


@pytest.mark.parametrize(
    ("program", "fix"),
    [
        ("systemd-resolved", "Domains=~portd.internal"),
        ("dnsmasq", "server=/portd.internal/127.0.0.1#8600"),
        ("unbound", "stub-addr: 127.0.0.1@8600"),
        ("", "dnsmasq: in /etc/dnsmasq.d"),
    ],
)
def test_resolver_that_does_not_find_portd_gets_its_own_lines(program: str, fix: str) -> None:
    assert fix in one(diagnoses.resolver(False, "ns.portd.internal", DNS, program)).fix
    assert not list(diagnoses.resolver(True, "ns.portd.internal", DNS, program))


def test_a_socket_file_without_a_listener_is_diagnosed_apart() -> None:
    error = DaemonUnavailable(
        [
            ("unix:///run/user/1/portd/portd.sock", "connection refused"),
            ("unix:///run/portd/portd.sock", "no such file or directory"),
        ]
    )
    missing, stale = diagnoses.unreachable(error, 1)
    assert "no daemon answers" in missing.what
    assert "rm /run/user/1/portd/portd.sock" in stale.fix


def test_port_lists_are_read_and_written_as_the_kernel_does() -> None:
    assert diagnoses.expand("8080,9148-9150\n") == {8080, 9148, 9149, 9150}
    assert diagnoses.expand("\n") == set()
    assert diagnoses.spans([8080, 9148, 9149, 9150]) == "8080,9148-9150"


def test_the_running_daemons_settings_are_examined(daemon: Daemon) -> None:
    found = json.loads(daemon.portd("doctor", "--json").stdout)["diagnoses"]
    said = " ".join(f"{one['what']} {one['fix']}" for one in found)
    assert "other pools" not in said
    assert "10000 ports" not in said
    assert "8600" not in said  # this daemon has no DNS
    assert "mDNS" not in said


def test_changed_pools_in_the_file_are_noticed(own_daemon: Daemon) -> None:
    own_daemon.start()
    config = own_daemon.directory / "portd.toml"
    pool = f"{own_daemon.first_port}-{own_daemon.last_port}"
    smaller = f"{own_daemon.first_port}-{own_daemon.first_port + 50}"
    config.write_text(config.read_text().replace(pool, smaller))
    found = json.loads(own_daemon.portd("doctor", "--json").stdout)["diagnoses"]
    assert any(f"default 100 ports) than {config} has (default 51)" in one["what"] for one in found)


def test_a_listener_inside_the_pool_is_found_on_this_host(daemon: Daemon) -> None:
    port = daemon.last_port - 1
    with serving(daemon, "examined"), socket.create_server(("127.0.0.1", port)):
        done = wait_for(lambda: daemon.portd("doctor"), "the doctor answers")
    assert done.returncode == 1
    assert f"[{os.getpid()}]" in done.stdout
    assert f"portd adopt SERVICE {port}" in done.stdout
