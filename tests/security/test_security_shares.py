"""Whoever uses up a share is refused; every other user is served, and the daemon stays within its bounds."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.harness import Daemon, wait_for
from tests.e2e.puppet import Puppet
from tests.security.conftest import ATTACKER, VICTIM, MakeUser

LIMIT = 4
LIMITS = f"""
import portd.adapters.http.events, portd.adapters.http.front, portd.adapters.http.leases, portd.adapters.http.services
portd.adapters.http.events.USER_FOLLOWERS_MAX = {LIMIT}
portd.adapters.http.front.USER_CONNECTIONS_MAX = {5 * LIMIT}
portd.adapters.http.leases.USER_WAITING_MAX = {LIMIT}
portd.adapters.http.services.USER_POLLS_MAX = {LIMIT}
"""
QUOTA = f"[leases]\nquota_per_uid = {LIMIT}\ncooldown = 600\n"


def get(path: str) -> str:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"


def post(path: str, body: str) -> str:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}"


OPEN = {
    "event streams": (get("/v1/events"), LIMIT),
    "long polls": (get("/v1/services/never?min=1&wait=60"), LIMIT),
    "waiting requests": (post("/v1/leases?wait=60", '{"service":"wait","ttl":60,"port":PORT,"exact":true}'), LIMIT),
    "silent connections": ("", 5 * LIMIT),
}
"""What a user can keep open: the request, and how many of it one user may have."""


@pytest.fixture
def bounded(make_daemon) -> Daemon:
    return make_daemon(prelude=LIMITS, extra=QUOTA).start()


def is_served(user: Puppet) -> bool:
    """Lease, follow and look up as a user who does nothing else."""
    lease = user.lease("orders", ttl=60)
    assert user.call("GET", "/v1/services/orders?held=true").body["instances"][0]["id"] == lease["id"]
    assert user.do("count_open", place=str(user.socket), text=get("/v1/events"), count=1) == 1
    return user.call("DELETE", f"/v1/leases/{lease['id']}").status == 204


@pytest.mark.parametrize("share", OPEN)
def test_what_one_user_keeps_open_keeps_no_other_out(bounded: Daemon, make_user: MakeUser, share: str) -> None:
    attacker, victim = make_user(bounded, ATTACKER), make_user(bounded, VICTIM)
    taken = bounded.lease("taken", ttl=600)
    text, limit = OPEN[share]
    text = text.replace("PORT", str(taken["port"]))
    if "Content-Length" in text:
        text = post("/v1/leases?wait=60", text.partition("\r\n\r\n")[2])
    assert attacker.do("count_open", place=str(bounded.socket), text=text, count=3 * limit) == limit
    assert is_served(victim)


def declines(attacker: Puppet) -> str | None:
    """Decline one port after the other until that is refused; returns the code."""
    lease = attacker.lease("declined", ttl=60)
    for _ in range(10 * LIMIT):
        reply = attacker.call("POST", f"/v1/leases/{lease['id']}/decline")
        if reply.status != 200:
            return reply.code
    return None


def leases(attacker: Puppet) -> str | None:
    """Lease until that is refused; returns the code."""
    replies = [attacker.call("POST", "/v1/leases", {"service": "hoard", "ttl": 60}) for _ in range(LIMIT + 1)]
    return replies[-1].code


def churn(attacker: Puppet) -> str | None:
    """Lease under ever new names and release, so that ports cool down; returns the code of a refusal, if any."""
    code = None
    for number in range(10 * LIMIT):
        reply = attacker.call("POST", "/v1/leases", {"service": f"churn{number}", "ttl": 60})
        if reply.status != 201:
            code = reply.code
            continue
        attacker.call("DELETE", f"/v1/leases/{reply.body['id']}")
    return code


@pytest.mark.parametrize("attack", [declines, leases, churn])
def test_ports_that_one_user_uses_up_are_bounded(bounded: Daemon, make_user: MakeUser, attack: Any) -> None:
    attacker, victim = make_user(bounded, ATTACKER), make_user(bounded, VICTIM)
    assert attack(attacker) in ("quota_exceeded", None)
    pool = bounded.get("/v1/status")["pools"]["default"]
    assert pool["size"] - pool["free"] <= LIMIT
    assert is_served(victim)


def test_a_share_is_free_again_when_its_user_lets_go(bounded: Daemon, make_user: MakeUser) -> None:
    attacker = make_user(bounded, ATTACKER)
    text, limit = OPEN["event streams"]
    assert attacker.do("count_open", place=str(bounded.socket), text=text, count=2 * limit) == limit
    attacker.end()
    again = make_user(bounded, ATTACKER)
    wait_for(
        lambda: again.do("count_open", place=str(bounded.socket), text=text, count=1) == 1, "the share is free again"
    )
