"""A process that becomes another user, by setpriv or a setuid program, changes neither rights nor quotas."""

from __future__ import annotations

import os
import shutil
import stat

import pytest

from tests.e2e.harness import Daemon, wait_for
from tests.e2e.puppet import Puppet
from tests.security.conftest import ATTACKER, VICTIM, MakeUser


@pytest.fixture
def setuid_sleep(place):
    """A program of root's with the setuid bit, as passwd(1) is, that stays."""
    program = place / "setuid-sleep"
    shutil.copy(shutil.which("sleep"), program)
    program.chmod(program.stat().st_mode | stat.S_ISUID | 0o755)
    if os.statvfs(place).f_flag & os.ST_NOSUID:
        pytest.skip("the temporary directory is mounted nosuid")
    return str(program)


def test_a_setuid_program_gives_its_starter_no_right_of_roots(
    guarded: Daemon, attacker: Puppet, victim: Puppet, setuid_sleep: str
) -> None:
    kept = victim.lease("orders", ttl=600)
    lease = attacker.lease("evil")
    child = attacker.fork()
    attacker.become(setuid_sleep, "1000")
    wait_for(lambda: guarded.show(lease["id"])["owner"]["uid"] == 0, "portd sees the process as root's")
    seen = guarded.show(lease["id"])
    assert seen["uid"] == ATTACKER
    assert victim.call("DELETE", f"/v1/leases/{lease['id']}").code == "not_owner"
    assert guarded.show(kept["id"])["state"] == "held"
    os.kill(child, 0)  # the child lives: the lease follows its owner alone
    attacker.end()
    wait_for(lambda: guarded.show(lease["id"])["state"] == "ended", "the lease ends with its owner")
    assert guarded.get("/v1/status")["counts"]["leases"] == 1


def test_lease_of_process_that_changed_its_user_is_released_once(
    guarded: Daemon, make_user: MakeUser, setuid_sleep: str
) -> None:
    for number in range(3):
        user = make_user(guarded, ATTACKER)
        lease = user.lease(f"evil{number}")
        user.become(setuid_sleep, "1000")
        wait_for(lambda lease=lease: guarded.show(lease["id"])["owner"]["uid"] == 0, "portd sees it as root's")
        headers = {"Authorization": f"Bearer {lease['token']}"}
        other = make_user(guarded, VICTIM)
        assert other.call("DELETE", f"/v1/leases/{lease['id']}", **headers).status == 204
        user.end()
    assert guarded.get("/v1/status")["counts"].get("leases", 0) == 0
    assert guarded.lease("after", ttl=60)["state"] == "held"
