"""What the doctor makes of a host's own words: each finding, and its absence where all is well."""

from __future__ import annotations

from typing import Any

import pytest

from portd._client.errors import DaemonUnavailable
from portd.cli import doctor
from portd.config import Dns, Mdns, Settings, Static, system_paths

POOL = range(20000, 30000)
LINUX_RANGE = "32768\t60999\n"


def view(port: int, protocol: str, verdict: str, exe: str, pid: int | None = 7) -> dict[str, Any]:
    listener = {"address": "0.0.0.0", "pid": pid, "uid": 0, "user": "root", "exe": exe, "cmdline": None, "unit": None}
    return {"port": port, "protocol": protocol, "verdict": verdict, "lease": None, "listeners": [listener]}


def one(findings: Any) -> doctor.Finding:
    found = list(findings)
    assert len(found) == 1
    return found[0]


def test_a_pool_inside_the_ephemeral_range_is_a_problem_with_the_exact_sysctl_as_mend() -> None:
    found = one(doctor.ephemeral([32766, 32767, 32768, 32769, 40000], LINUX_RANGE, "8080,9148-9149\n", "portd.toml"))
    assert found.severity == "problem"
    assert "32768-32769,40000" in found.what
    assert "ip_local_reserved_ports=8080,9148-9149,32768-32769,40000" in found.mend  # a write replaces the list


@pytest.mark.parametrize(("pool", "reserved"), [(POOL, ""), ([40000, 40001], "1,40000-40100")])
def test_a_pool_outside_of_the_ephemeral_range_or_reserved_is_none(pool: Any, reserved: str) -> None:
    assert not list(doctor.ephemeral(pool, LINUX_RANGE, reserved, "portd.toml"))


def test_what_cannot_be_read_is_not_found_wanting() -> None:
    assert not list(doctor.ephemeral(POOL, "", "", "portd.toml"))
    assert not list(doctor.descriptors(10_000, ""))
    assert not list(doctor.capabilities("", Settings(), is_system=True))
    assert not list(doctor.clock(None))


def test_only_strangers_inside_the_pool_are_told_with_their_process_and_the_line_to_write() -> None:
    ports = [
        view(20005, "tcp", "unmanaged", "/usr/bin/node"),
        view(20006, "tcp", "bound", "/usr/bin/python3"),
        view(80, "tcp", "unmanaged", "/usr/sbin/nginx"),
    ]
    found = one(doctor.foreign(POOL, ports, "portd.toml"))
    assert "20005/tcp (node[7] root)" in found.what
    assert "exclude = [20005]" in found.mend
    assert not list(doctor.foreign(POOL, ports[1:], "portd.toml"))


def test_a_file_limit_below_what_a_full_pool_takes_is_told_with_the_number_to_write() -> None:
    limits = "Max open files            1024                 {}               files     \n"
    found = one(doctor.descriptors(10_000, limits.format(4096)))
    assert "LimitNOFILE=21024" in found.mend
    assert not list(doctor.descriptors(10_000, limits.format(524288)))
    assert not list(doctor.descriptors(10_000, limits.format("unlimited")))


def test_a_static_port_that_the_daemon_may_not_bind_is_a_problem() -> None:
    settings = Settings(static={"web": Static(port=80)})
    found = one(doctor.capabilities("CapEff:\t0000000000000000\n", settings, is_system=False))
    assert "80" in found.what
    assert "CAP_NET_BIND_SERVICE" in found.mend
    assert not list(doctor.capabilities("CapEff:\t000001ffffffffff\n", settings, is_system=True))


def test_only_a_system_daemon_is_told_that_it_cannot_see_others_processes() -> None:
    blind = "CapEff:\t0000000000000400\n"
    assert "CAP_SYS_PTRACE" in one(doctor.capabilities(blind, Settings(), is_system=True)).mend
    assert not list(doctor.capabilities(blind, Settings(), is_system=False))


def test_another_mdns_responder_is_told_but_neither_the_daemon_itself_nor_an_avahi_that_it_speaks_through() -> None:
    resolved = view(5353, "udp", "unmanaged", "/usr/lib/systemd/systemd-resolved")
    avahi = view(5353, "udp", "unmanaged", "/usr/sbin/avahi-daemon")

    def told(ports: list[dict[str, Any]], responder: Any = "auto", pid: int = 1) -> list[doctor.Finding]:
        settings = Settings(mdns=Mdns(responder=responder))
        return list(doctor.responders(ports, {"pid": pid}, settings, system_paths()))

    assert "systemd-resolved" in one(told([resolved])).what
    assert not told([resolved], pid=7)
    assert not told([avahi])
    assert told([avahi], responder="embedded")


def test_the_daemons_own_guardian_is_no_other_responder() -> None:
    guardian = view(5353, "udp", "unmanaged", "/usr/bin/python3")
    for guardian_pid, is_other in ((7, False), (8, True), (None, True)):
        status = {"pid": 1, "mdns": {"guardian": guardian_pid}}
        assert bool(list(doctor.responders([guardian], status, Settings(), system_paths()))) is is_other


@pytest.mark.parametrize(
    "forwarders", ["[Resolve]\nDNS=127.0.0.1:8600\nDomains=~portd.internal", "server=/portd.internal/127.0.0.1#8600"]
)
def test_a_resolver_that_asks_portd_is_fine_and_another_is_told_what_to_write(forwarders: str) -> None:
    resolv = "# made by hand\nnameserver 192.0.2.1\noptions edns0\n"
    assert not list(doctor.resolver(Settings(), resolv, forwarders))
    found = one(doctor.resolver(Settings(), resolv, ""))
    assert found.severity == "advice"
    assert "192.0.2.1" in found.what
    assert "Domains=~portd.internal" in found.mend
    at_port_53 = Settings(dns=Dns(listen="192.0.2.1:53"))
    assert not list(doctor.resolver(at_port_53, resolv, ""))


def test_a_socket_that_nobody_listens_behind_is_told_apart_from_one_that_is_missing() -> None:
    error = DaemonUnavailable(
        [
            ("unix:///run/user/1/portd/portd.sock", "connection refused"),
            ("unix:///run/portd/portd.sock", "no such file or directory"),
        ]
    )
    missing, stale = doctor.unreachable(error)
    assert "no daemon answers" in missing.what
    assert "rm /run/user/1/portd/portd.sock" in stale.mend


def test_port_lists_are_read_and_written_as_the_kernel_does() -> None:
    assert doctor.expand("8080,9148-9150\n") == {8080, 9148, 9149, 9150}
    assert doctor.expand("\n") == set()
    assert doctor.spans([8080, 9148, 9149, 9150]) == "8080,9148-9150"
