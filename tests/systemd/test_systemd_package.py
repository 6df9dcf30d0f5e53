"""The Debian package: installed, upgraded, removed and purged, on a machine of its own."""

from __future__ import annotations

import pytest
from box import wait_for

pytestmark = pytest.mark.systemd
OTHERS = ("opt/", "tmp/", "var/tmp/", "var/log/", "var/cache/", "var/lib/dpkg/", "root/", "etc/.pwd.lock")
"""Where others write: dpkg is asked what it remembers."""


@pytest.fixture(scope="module")
def machine(make_box, packages):
    """Return a box in which the packages lie ready, and a portd from pip in /opt that is not installed as a unit."""
    seed = ["chroot . useradd --system --no-create-home foreign"]
    seed += [f"cp {package} opt/portd-{number}.deb" for number, package in enumerate(packages, 1)]
    return make_box(seed="\n".join(seed))


@pytest.fixture
def box(machine):
    """Return the box with the first package, installed afresh."""
    machine.run("dpkg --purge portd && dpkg --install /opt/portd-1.deb")
    return machine


def is_there(box, place):
    return box.ask(f"test -e {place}")[0] == 0


def files(box):
    return {path for path in box.written() if not path.startswith(OTHERS)}


def leases(box):
    return {one["id"]: one["port"] for one in box.leases()}


def test_an_installed_package_is_enabled_ready_and_answers(box):
    assert box.run("systemctl is-enabled portd.service portd.socket portd-inspector.socket").split() == ["enabled"] * 3
    assert box.run("systemctl is-active portd-inspector.service").strip() == "active"
    assert box.api("/healthz") == {"status": "ok"}
    assert box.show("User") == "portd"
    foreign = "setpriv --reuid foreign --regid foreign --clear-groups "
    assert box.run(foreign + "/usr/bin/portd lease orders --ttl 9").strip().isdigit()
    assert box.ask("/usr/bin/portd serve --check-config")[0] == 0
    for unit in ("portd.service", "portd.socket", "portd-inspector.service", "portd-run@orders.service"):
        assert box.ask(f"systemd-analyze verify --man=no {unit}") == (0, "", "")


def test_every_file_is_as_the_package_says(box):
    assert box.run("dpkg --verify portd") == ""
    assert box.run("find /usr/lib/portd /usr/bin/portd /etc/portd ! -user root -o ! -type l -perm /022") == ""
    assert box.run("grep -rIl /tmp/ /usr/lib/portd/bin /usr/lib/portd/pyvenv.cfg || true") == ""


def test_package_upgrade_under_load_loses_nothing(box):
    box.run("printf '[leases]\\ncooldown = 1\\n' >/etc/portd/portd.toml")
    held = [box.api("/v1/leases", {"service": "held", "instance": f"held-{n}", "ttl": 600})["port"] for n in range(60)]
    before, pid = leases(box), box.show("MainPID")
    load, grabber = box.load("grants", 800, 200), box.load("grab", 4, *held)
    box.run("dpkg --install /opt/portd-2.deb")
    grants, grabs = load.result(), grabber.result()
    assert box.run("dpkg-query -W -f '${db:Status-Abbrev}${Version}' portd").split() == ["ii", "0.9.2"]
    assert box.show("MainPID") not in (pid, "0")
    assert before.items() <= leases(box).items()
    assert grants["lost"] == []
    assert grabs["grabbed"] == []
    assert grabs["tries"] > 1000
    assert box.run("cat /etc/portd/portd.toml") == "[leases]\ncooldown = 1\n"


def test_removed_package_keeps_leases_and_configuration(box):
    before = box.api("/v1/leases", {"service": "orders", "ttl": 600})
    box.run("dpkg --remove portd")
    assert (
        box.ask("systemctl is-active portd.service portd.socket portd-inspector.service")[1].split() == ["inactive"] * 3
    )
    assert not any(is_there(box, place) for place in ("/run/portd", "/usr/bin/portd", "/usr/lib/portd"))
    assert is_there(box, "/etc/portd/portd.toml")
    box.run("dpkg --install /opt/portd-1.deb")
    assert leases(box) == {before["id"]: before["port"]}


def test_a_disabled_portd_stays_so_through_an_upgrade(box):
    box.run("systemctl disable --now portd.service portd.socket && dpkg --install /opt/portd-2.deb")
    assert box.ask("systemctl is-enabled portd.service portd.socket")[1].split() == ["disabled", "disabled"]
    assert box.ask("systemctl is-active portd.service portd.socket")[1].split() == ["inactive", "inactive"]


def test_unit_that_administrator_has_edited_stays_through_upgrade(box):
    box.run(
        "sed s/^WatchdogSec=.*/WatchdogSec=99/ /usr/lib/systemd/system/portd.service "
        ">/etc/systemd/system/portd.service && dpkg --install /opt/portd-2.deb"
    )
    seen = box.show("WatchdogUSec"), box.show("ActiveState"), box.show("FragmentPath")
    box.run("rm /etc/systemd/system/portd.service && systemctl daemon-reload")
    assert seen == ("1min 39s", "active", "/etc/systemd/system/portd.service")


def test_a_purged_package_leaves_nothing(machine):
    machine.run("dpkg --purge portd")
    before = files(machine)
    machine.run("dpkg --install /opt/portd-1.deb && mkdir /etc/portd/run && touch /etc/portd/run/orders.env")
    machine.api("/v1/leases", {"service": "orders", "ttl": 600})
    assert {"usr/bin/portd", "var/lib/portd/portd.db", "etc/portd/run/orders.env"} <= files(machine)
    machine.run("dpkg --purge portd")
    assert files(machine) - before == set()
    assert machine.ask("getent passwd portd; getent group portd")[1] == ""
    assert machine.run("systemctl list-units --all --no-legend 'portd*'") == ""
    assert machine.ask("dpkg-query -W portd")[0] == 1
    assert not wait_for(lambda: machine.ask("ss -Hltn 'sport = 7783'"), "ss answers")[1]


def test_install_and_the_package_refuse_to_stand_beside_each_other(box):
    for command in ("install", "install --dry-run", "uninstall --purge"):
        status, out, err = box.ask(f"/opt/portd/bin/portd {command}")
        assert (status, out) == (1, "")
        assert "portd from a package" in err
    box.run("dpkg --purge portd && /opt/portd/bin/portd install")
    status, _, err = box.ask("dpkg --install /opt/portd-1.deb")
    assert status != 0
    assert "'portd uninstall'" in err
    assert box.api("/healthz") == {"status": "ok"}
    box.run("dpkg --purge portd; /opt/portd/bin/portd uninstall --purge")
