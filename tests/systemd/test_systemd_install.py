"""`portd install` and `portd uninstall`, and the units themselves, on a machine of their own."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.systemd
UNITS = Path(__file__).parents[2] / "systemd"
PUT_IN_PLACE = (
    "/etc/systemd/system/portd.service",
    "/etc/systemd/system/portd.socket",
    "/etc/systemd/system/portd-inspector.service",
    "/etc/systemd/system/portd-inspector.socket",
    "/etc/systemd/system/portd-run@.service",
    "/etc/sysusers.d/portd.conf",
    "/usr/local/share/man/man1/portd.1",
    "/usr/local/share/man/man5/portd.toml.5",
)


def is_there(box, place):
    return box.ask(f"test -e {place}")[0] == 0


@pytest.mark.parametrize("unit", ["portd.service", "user/portd.service"])
def test_shipped_unit_starts_the_installed_program(unit):
    assert "ExecStart=/opt/portd/bin/portd serve" in (UNITS / unit).read_text()


@pytest.mark.parametrize("unit", ["portd.service", "portd-inspector.service"])
def test_exposure_of_unit_is_at_most_one_and_half(unit):
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", UNITS / unit],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_systemd_finds_nothing_wrong_in_the_installed_units(box):
    for unit in (
        "portd.service",
        "portd.socket",
        "portd-inspector.service",
        "portd-inspector.socket",
        "portd-run@orders.service",
    ):
        assert box.ask(f"systemd-analyze verify --man=no {unit}") == (0, "", "")


def test_systemd_finds_nothing_wrong_in_drop_in_for_leased_port(box):
    text = (UNITS / "bind-only-leased-port.conf").read_text()  # the checkout itself may not be seen from in there
    box.run(
        "mkdir -p /run/systemd/system/portd-run@orders.service.d && "
        f"printf %s {shlex.quote(text)} >/run/systemd/system/portd-run@orders.service.d/port.conf"
    )
    status, out, err = box.ask("systemd-analyze verify --man=no portd-run@orders.service")
    box.run("rm -r /run/systemd/system/portd-run@orders.service.d && systemctl daemon-reload")
    assert (status, out, err) == (0, "", "")


def test_an_installed_portd_is_enabled_ready_and_answers(box):
    assert box.run("systemctl is-enabled portd.service portd.socket portd-inspector.socket").split() == ["enabled"] * 3
    assert box.api("/healthz") == {"status": "ok"}
    assert box.show("User") == "portd"
    assert box.run("stat -c %U:%a /var/lib/portd").strip() == "portd:750"


def test_installing_again_changes_nothing_and_disturbs_nobody(box):
    pid = box.show("MainPID")
    said = box.run("portd install")
    assert box.show("MainPID") == pid
    for place in PUT_IN_PLACE:
        assert f"{place} is up to date" in said


def test_unit_that_somebody_changed_is_put_right_and_taken_up(box):
    pid = box.show("MainPID")
    box.run("sed -i s/^WatchdogSec=.*/WatchdogSec=99/ /etc/systemd/system/portd.service")
    said = box.run("portd install")
    assert "write /etc/systemd/system/portd.service" in said
    assert box.show("WatchdogUSec") == "15s"
    assert box.show("MainPID") != pid


def test_a_python_that_the_unit_can_not_see_is_refused(box):
    box.run("cp -a /opt/portd /home/portd && sed -i 1s,/opt,/home, /home/portd/bin/portd")
    status, out, err = box.ask("/home/portd/bin/portd install")
    box.run("rm -r /home/portd")
    assert (status, out) == (1, "")
    assert "lies under /home" in err


def test_whoever_is_not_root_is_refused_before_anything_is_done(box):
    status, out, err = box.ask("setpriv --reuid foreign --regid foreign --clear-groups portd install")
    assert (status, out) == (1, "")
    assert "only root" in err


def test_a_dry_run_says_all_and_does_nothing(make_box):
    box = make_box()
    said = box.run("portd install --dry-run")
    for place in PUT_IN_PLACE:
        assert f"would write {place}" in said
        assert not is_there(box, place)
    box.run("portd install")
    said = box.run("portd uninstall --dry-run --purge")
    for place in PUT_IN_PLACE:
        assert f"would remove {place}" in said
    assert box.api("/healthz") == {"status": "ok"}
    leaves_state_without_purge(box)


def leaves_state_without_purge(box):
    """Part of the test above: each box costs a boot."""
    lease = box.api("/v1/leases", {"service": "orders", "ttl": 600})
    said = box.run("portd uninstall")
    assert "/var/lib/portd stays" in said
    assert not any(is_there(box, place) for place in (*PUT_IN_PLACE, "/run/portd"))
    assert box.ask("portd status")[0] == 3
    box.run("portd install")
    assert [one["id"] for one in box.api("/v1/leases")["leases"]] == [lease["id"]]
    box.run("portd uninstall --purge")
    assert not any(is_there(box, place) for place in (*PUT_IN_PLACE, "/run/portd", "/var/lib/portd", "/etc/portd"))
    assert box.ask("getent passwd portd; getent group portd")[1] == ""
    assert box.run("systemctl list-units --all --no-legend 'portd*'") == ""
    assert "does not exist" in box.run("portd uninstall --purge")


def test_a_program_that_another_user_can_change_is_refused(box):
    module = box.run("ls -d /opt/portd/lib/python3*/site-packages").strip()
    box.run(f"touch {module}/foreign.pth && chown foreign {module}/foreign.pth")
    status, out, err = box.ask("portd install")
    box.run(f"rm {module}/foreign.pth")
    assert (status, out) == (1, "")
    assert "can be changed by another user than root" in err
