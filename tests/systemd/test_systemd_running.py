"""portd under a real systemd: start, crash, hang, restart under load, reload, stop, reboot."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from box import wait_for

pytestmark = pytest.mark.systemd


def lease(box, service="orders", **fields):
    return box.api("/v1/leases", {"service": service, "ttl": 600, **fields})


def leases(box):
    return {one["id"]: one["port"] for one in box.leases()}


def restarted(box, pid):
    """Wait until another process than `pid` has said that it is ready; returns its pid."""
    return wait_for(
        lambda: box.show("ActiveState") == "active" and box.show("MainPID") not in (pid, "0") and box.show("MainPID"),
        "portd is ready again",
    )


def test_ready_is_said_only_when_it_answers(box):
    box.run("systemctl stop portd.service portd.socket")
    box.run("systemctl start portd.socket")
    box.run("systemctl start --no-block portd.service")
    assert box.api("/healthz") == {"status": "ok"}  # whoever comes while it starts waits in the socket's line
    box.run("systemctl restart portd.service")
    status, out, _ = box.ask("curl -sS -m 1 http://127.0.0.1:7783/healthz")
    assert (status, json.loads(out)) == (0, {"status": "ok"})


def test_a_caller_starts_a_portd_that_is_not_running(box):
    box.run("systemctl stop portd.service")
    assert box.api("/healthz") == {"status": "ok"}
    assert box.show("ActiveState") == "active"


def test_crash_is_followed_by_a_restart_with_every_lease(box):
    before = lease(box)
    pid = box.show("MainPID")
    box.run(f"kill -KILL {pid}")
    assert leases(box)[before["id"]] == before["port"]  # asked in the gap: the socket's line, no refusal
    restarted(box, pid)


def test_watchdog_restarts_a_daemon_whose_loop_hangs(box):
    box.run(
        "mkdir -p /run/systemd/system/portd.service.d && printf '[Service]\\nWatchdogSec=1\\nTimeoutAbortSec=1\\n' "
        ">/run/systemd/system/portd.service.d/hang.conf && systemctl daemon-reload && systemctl restart portd"
    )
    pid = box.show("MainPID")
    before = lease(box)
    box.run(f"kill -STOP {pid}")
    restarted(box, pid)
    assert leases(box)[before["id"]] == before["port"]
    box.run("rm -r /run/systemd/system/portd.service.d && systemctl daemon-reload")
    assert "watchdog" in box.run("journalctl -b -u portd.service --no-pager -o cat").lower()


def test_restarts_under_load_lose_no_request_and_no_held_port(box):
    held = [lease(box, "held", instance=f"held-{n}")["port"] for n in range(60)]
    pid = box.show("MainPID")
    load, grabber = box.load("grants", 1200, 200), box.load("grab", 6, *held)
    for _ in range(3):
        box.run("systemctl restart portd.service")
    grants, grabs = load.result(), grabber.result()
    assert box.show("MainPID") != pid
    assert grants["lost"] == []
    assert len(set(grants["granted"])) == 1200
    assert set(grants["granted"]) <= {one["port"] for one in box.leases("load")}
    assert grabs["tries"] > 1000
    assert grabs["grabbed"] == []


def test_restarts_under_load_lose_no_handoff(box):
    load = box.load("handoffs", 300, 100)
    for _ in range(2):
        box.run("systemctl restart portd.service")
    handed = load.result()
    assert handed["lost"] == []
    assert len(set(handed["granted"])) == 300


def test_disabled_socket_is_not_served_though_systemd_opens_it(box):
    box.run(
        "cp /etc/portd/portd.toml /etc/portd/before.toml && printf '[listen]\\nhttp = \"\"\\n' "
        ">/etc/portd/portd.toml && systemctl restart portd.service"
    )
    answer = box.ask("curl -sS -m 20 http://127.0.0.1:7783/healthz")
    said = [line["MESSAGE"] for line in box.journal("PRIORITY=4")]
    box.run("mv /etc/portd/before.toml /etc/portd/portd.toml && systemctl restart portd.service")
    assert answer[0] in (52, 56), answer  # hung up on at once (curl(1)): nobody waits in the socket's line for ever
    assert any("127.0.0.1:7783 is disabled" in line for line in said)
    assert box.ask("curl -sS -m 20 http://127.0.0.1:7783/healthz")[0] == 0


def test_unheld_port_is_grabbed_at_once(box):
    assert set(box.load("grab", 0.1, 31999).result()["grabbed"]) == {31999}


def test_hold_of_lease_that_ended_meanwhile_does_not_come_back(box):
    owner = box.start("exec portd run brief -- sleep 1000")
    kept = wait_for(lambda: box.leases("brief"), "it has its port")[0]
    box.run(f"systemctl restart --no-block portd.service; kill {kept['owner']['pid']}")
    owner.wait(10)
    wait_for(lambda: box.api(f"/v1/leases/{kept['id']}")["state"] == "ended", "its lease has ended")
    assert kept["port"] in box.load("grab", 0.1, kept["port"]).result()["grabbed"]


def test_reload_applies_what_can_change_and_names_the_rest(box):
    pid = box.show("MainPID")
    box.run(
        "cp /etc/portd/portd.toml /etc/portd/before.toml && printf '[leases]\\nmax_ttl = 700\\n[pools.default]\\n"
        'ranges = ["21000-21999"]\\n\' >/etc/portd/portd.toml && systemctl reload portd.service'
    )
    warning = wait_for(
        lambda: [line for line in box.journal("PRIORITY=4") if "need a restart" in line["MESSAGE"]],
        "what needs a restart is said",
    )
    assert warning[-1]["MESSAGE"].endswith(": pools")
    status, out, _ = box.ask("portd lease orders --ttl 701")
    box.run("mv /etc/portd/before.toml /etc/portd/portd.toml && systemctl reload portd.service")
    assert (status, out) == (2, "")
    assert box.show("MainPID") == pid


def test_a_broken_configuration_stops_the_tries_and_says_where(box):
    box.run("cp /etc/portd/portd.toml /etc/portd/before.toml && echo 'rubbish = 1' >/etc/portd/portd.toml")
    status, _, _ = box.ask("systemctl restart portd.service")
    tries = box.show("NRestarts")
    box.run("mv /etc/portd/before.toml /etc/portd/portd.toml")
    assert (status, tries) == (1, "0")
    assert "/etc/portd/portd.toml:1: rubbish" in box.run("journalctl -b -u portd.service --no-pager -o cat")


def test_stop_ends_long_polls_within_two_seconds(box):
    before = lease(box)
    revision = box.api("/v1/services/orders")["revision"]
    poll = box.start(
        "curl -sS -o /dev/null -w '%{http_code}' --unix-socket /run/portd/portd.sock "
        f"'http://portd/v1/services/orders?after={revision}&wait=60'",
        stdout=subprocess.PIPE,
    )
    wait_for(lambda: box.api("/v1/status")["counts"]["connections"] >= 2, "the poll is under way")
    took_us = stop_us(box)
    with poll:
        assert poll.communicate(timeout=10)[0] == "200"
    assert took_us < 2_000_000
    assert leases(box)[before["id"]] == before["port"]


def stop_us(box):
    """Stop the service; returns the microseconds from the signal to the exit, by the kernel's clock."""
    box.run("systemctl stop portd.socket portd.service")
    assert box.show("Result") == "success"
    box.run("systemctl start portd.socket")
    return int(box.show("InactiveEnterTimestampMonotonic")) - int(box.show("ActiveExitTimestampMonotonic"))


def test_the_journal_finds_what_happened_to_a_port(box):
    server = box.start(
        "exec portd run life --instance life-7 -- python3 -m http.server --bind {host} {port} 2>&1",
        stdout=subprocess.DEVNULL,
    )
    port = wait_for(lambda: bound_port(box, "life"), "it listens")
    life = box.leases("life")[0]
    box.run(f"kill {life['owner']['pid']}")
    server.wait(10)
    found = wait_for(
        lambda: (
            (lines := box.journal(f"PORT={port}", f"LEASE={life['id']}")) and lines[-1]["EVENT"] == "ended" and lines
        ),
        "the journal has it",
    )
    assert {key: found[-1][key] for key in ("SERVICE", "INSTANCE", "PRIORITY", "SYSLOG_IDENTIFIER")} == {
        "SERVICE": "life",
        "INSTANCE": "life-7",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "portd",
    }
    owner = f"pid {life['owner']['pid']} ({life['owner']['exe']})"
    messages = [line["MESSAGE"].removeprefix(f"life-7 (main) on port {port}: ") for line in found]
    for message, expected in zip(
        (messages[0], messages[1], messages[-1]),
        (f"leased to {owner}; uid 0 (root)", "its owner listens", "ended: owner_exited"),
        strict=True,
    ):
        assert message.startswith(expected)


def test_foreign_process_on_a_leased_port_is_a_warning(box):
    taken = lease(box, "taken", hold="none")
    foreign = box.start(
        "exec setpriv --reuid foreign --regid foreign --clear-groups "
        f"/usr/bin/python3 -m http.server --bind 127.0.0.1 {taken['port']} 2>/dev/null"
    )
    found = wait_for(lambda: box.journal(f"LEASE={taken['id']}", "EVENT=conflict"), "the journal has it")
    box.run(f"pkill -u foreign -f 'http.server --bind 127.0.0.1 {taken['port']}'")
    foreign.wait(10)
    assert found[0]["PRIORITY"] == "4"
    assert "listened on by a foreign process, pid" in found[0]["MESSAGE"]


def test_event_burst_is_counted_and_leaves_the_journal_usable(box):
    def count_suppressed():
        said = "\n".join(str(line["MESSAGE"]) for line in box.journal("LOGGER=portd.leases"))
        return sum(map(int, re.findall(r"^rate limited.* (\d+) granted", said, re.MULTILINE)))

    before = count_suppressed()
    wanted = json.dumps([{"service": "burst", "ttl": 600}] * 250)
    box.run(
        f"echo '{wanted}' >/tmp/burst && for call in 1 2 3 4; do curl -sS -o /dev/null -H 'Content-Type: "
        "application/json' -d @/tmp/burst --unix-socket /run/portd/portd.sock http://portd/v1/leases & done; wait"
    )
    wait_for(
        lambda: len(box.journal("SERVICE=burst", "EVENT=granted")) + count_suppressed() - before == 1000,
        "all are logged or counted",
    )
    assert count_suppressed() > before


def test_a_journal_that_hangs_stops_nobody(box):
    pid = box.show("MainPID")
    box.run("systemctl kill -s STOP systemd-journald.service")
    grants = box.load("grants", 1000, 400).result()  # more lines than wait for it in line
    box.run("systemctl kill -s CONT systemd-journald.service")
    assert grants["lost"] == []
    assert box.show("MainPID") == pid


def test_service_of_template_comes_back_on_its_port_after_crash(box):
    box.run(
        "mkdir -p /etc/portd/run && echo 'COMMAND=/usr/bin/python3 -m http.server --bind {host} {port}' "
        ">/etc/portd/run/web.env && systemctl start portd-run@web.service"
    )
    port = wait_for(lambda: bound_port(box, "web"), "the service listens")
    pid = box.show("MainPID", "portd-run@web.service")
    box.run(f"kill -KILL {pid}")
    wait_for(lambda: box.show("MainPID", "portd-run@web.service") not in (pid, "0"), "systemd starts it again")
    assert wait_for(lambda: bound_port(box, "web"), "the service listens again") == port
    listed = box.api("/v1/leases?service=web")["leases"][0]
    box.run("systemctl stop portd-run@web.service")
    assert listed["owner"]["unit"] == "portd-run@web.service"


def bound_port(box, service):
    return next((one["port"] for one in box.leases(service) if one["state"] == "bound"), None)


def test_another_users_process_is_named_by_the_hardened_unit(box):
    server = box.start(
        "exec setpriv --reuid foreign --regid foreign --clear-groups /usr/bin/python3 -m http.server "
        "--bind 127.0.0.1 31888 2>/dev/null"
    )
    listener = wait_for(lambda: box.api("/v1/ports/31888")["listeners"], "the server listens")[0]
    box.run("pkill -u foreign -f 'http.server --bind 127.0.0.1 31888'")
    server.wait(10)
    assert (listener["user"], listener["exe"]) == ("foreign", box.run("readlink -f /usr/bin/python3").strip())


def test_a_user_has_a_portd_of_their_own(box):
    alice = (
        "exec setpriv --reuid alice --regid alice --init-groups env HOME=/home/alice "
        "XDG_RUNTIME_DIR=/run/user/$(id -u alice) "
    )
    box.run("systemctl start user@$(id -u alice).service")
    box.run(alice + "portd install --user")
    said = box.run(alice + "portd status")
    box.run(alice + "portd uninstall --user --purge")
    assert "/portd/portd.sock" in said
    assert "/run/user/" in said
    assert box.ask("ls /home/alice/.config/systemd/user/portd.service /home/alice/.local/state/portd")[1] == ""


@pytest.fixture(scope="module")
def rebooting(make_box):
    """Return a box with two services that are started at every boot, `web` and `api`."""
    box = make_box()
    # The unit's own /proc would show the kernel's boot id, which is the same for every boot of a box.
    box.run(
        "mkdir -p /etc/systemd/system/portd.service.d && printf '[Service]\\nBindReadOnlyPaths="
        "/run/boot_id:/proc/sys/kernel/random/boot_id\\n' >/etc/systemd/system/portd.service.d/boot-id.conf "
        "&& portd install"
    )
    box.run(
        "mkdir -p /etc/portd/run && echo 'COMMAND=/usr/bin/python3 -m http.server --bind {host} {port}' "
        "| tee /etc/portd/run/web.env >/etc/portd/run/api.env"
    )
    box.run("systemctl enable --now portd-run@web portd-run@api")
    return box


@pytest.mark.parametrize(
    ("going_down", "because"),
    [
        # In a shutdown systemd ends services and portd side by side: portd may see them go.
        ("power_off", {"host_rebooted", "owner_exited"}),
        ("pull_the_plug", {"host_rebooted"}),
    ],
)
def test_reboot_ends_process_leases_and_keeps_instances_ports(rebooting, going_down, because):
    box = rebooting
    ports = {name: wait_for(lambda name=name: bound_port(box, name), f"{name} listens") for name in ("web", "api")}
    ids = {one["id"] for name in ports for one in box.leases(name)}
    clocked = lease(box)
    getattr(box, going_down)()
    box.boot()
    assert {name: wait_for(lambda name=name: bound_port(box, name), f"{name} listens") for name in ports} == ports
    assert {box.api(f"/v1/leases/{one}")["ended_because"] for one in ids} <= because
    assert not ids & set(leases(box))
    assert leases(box)[clocked["id"]] == clocked["port"]
