"""Whose listener it is: every rule of its own, and what comes of several listeners together."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from portd.core.model import Lease, Listener, Owner, ProcessId
from portd.core.ownership import KIN_MAX, Credential, Holder, inherit, judge, kin_of, vouch
from portd.core.rights import hash_token

GRANTED_AT = 1000.0
OWNER = (41, 7)
WEB = "/system.slice/web.service"


def make_lease(**fields) -> Lease:
    lease = Lease(
        id="lease-1",
        service="web",
        instance="web-1",
        endpoint="main",
        protocol="tcp",
        address="127.0.0.1",
        port=20000,
        pool="default",
        hold="shared",
        lifetime="process",
        owner=Owner(pid=OWNER[0], uid=1000, known_by="peercred"),
        uid=1000,
        host="here",
        created_at=GRANTED_AT,
        process=ProcessId(*OWNER, "boot"),
        token_hash=hash_token("secret"),
    )
    return replace(lease, **fields)


def make_holder(*ancestors, uid=1000, unit_path=None, started_at=0.0, credentials=()) -> Holder:
    line = ancestors or ((99, 9), (1, 1))
    owner = Owner(pid=line[0][0], uid=uid, unit_path=unit_path, started_at=started_at, known_by="socket")
    return Holder(owner, line, credentials)


def listen(inode=1, address="127.0.0.1", uid=1000, protocol="tcp", v6only=True) -> Listener:
    return Listener(protocol, address, 20000, uid, inode, v6only)


def rule_of(holder: Holder, lease: Lease | None = None):
    return vouch(lease or make_lease(), listen(), holder)


# --- one listener ---


def test_the_owner_and_its_descendants_are_the_leases_own():
    assert rule_of(make_holder(OWNER, (1, 1))) == "owner"
    assert rule_of(make_holder((50, 8), OWNER, (1, 1))) == "descendant"


def test_a_later_process_with_the_owners_pid_is_foreign():
    assert rule_of(make_holder((OWNER[0], 8))) is None


def test_a_descendant_stays_one_when_the_process_between_has_exited():
    lease = make_lease()
    own = judge(lease, [listen()], {1: make_holder((60, 9), (50, 8), OWNER, (1, 1))}).own
    remembered = replace(lease, kin=kin_of(lease, own))
    assert rule_of(make_holder((60, 9), (1, 1)), remembered) == "descendant"
    assert rule_of(make_holder((70, 9), (50, 8), (1, 1)), remembered) == "descendant"
    assert rule_of(make_holder((60, 10), (1, 1)), remembered) is None
    assert rule_of(make_holder((70, 9), (1, 1)), remembered) is None, "init is nobody's kin"


def test_ancestors_of_a_lease_are_bounded():
    ancestors = tuple((pid, 1) for pid in range(100, 200))
    lease = make_lease(process=ProcessId(*ancestors[-1], "boot"))
    assert len(kin_of(lease, judge(lease, [listen()], {1: make_holder(*ancestors)}).own)) == KIN_MAX


@pytest.mark.parametrize(
    ("unit", "path", "expected"),
    [
        ("web.service", WEB, "unit"),
        ("web.service", "/user.slice/user-1000.slice/user@1000.service/app.slice/web.service", None),
        ("web.service", None, None),
        ("session-3.scope", WEB, None),
        ("user@1000.service", WEB, None),
    ],
)
def test_only_the_same_service_unit_counts_as_the_owner(unit, path, expected):
    owner = Owner(pid=41, uid=0, unit=unit, unit_path=WEB if path else None, known_by="peercred")
    assert rule_of(make_holder(uid=33, unit_path=path), make_lease(owner=owner)) == expected


def test_credential_counts_for_any_user_with_its_token():
    for lease_id, token, expected in (
        ("lease-1", "secret", "token"),
        ("lease-1", "guess", None),
        ("lease-2", "secret", None),
    ):
        credential = Credential(lease_id, hash_token(token))
        assert rule_of(make_holder(uid=65534, credentials=(credential,))) == expected


@pytest.mark.parametrize(
    ("uid", "started_at", "expected"),
    [(1000, GRANTED_AT + 1, "uid"), (1000, GRANTED_AT - 1, None), (1001, GRANTED_AT + 1, None)],
)
def test_uid_of_lease_counts_for_processes_started_after_grant(uid, started_at, expected):
    assert rule_of(make_holder(uid=uid, started_at=started_at)) == expected


def test_a_hidden_process_counts_by_the_uid_of_its_socket():
    assert vouch(make_lease(), listen(uid=1000), Holder(None)) == "uid"
    assert vouch(make_lease(), listen(uid=1001), Holder(None)) is None


def test_a_tokens_lease_is_bound_by_its_credential_alone():
    lease = make_lease(uid=None, process=None, lifetime="ttl", owner=Owner(known_by="token"))
    assert rule_of(make_holder(uid=0, started_at=GRANTED_AT + 1), lease) is None
    assert vouch(lease, listen(), Holder(None)) is None
    assert rule_of(make_holder(credentials=(Credential("lease-1", hash_token("secret")),)), lease) == "token"


def test_whoever_got_an_own_socket_inherits_the_kinship():
    old, new = make_holder(OWNER, (1, 1)), make_holder((80, 9), (1, 1))
    assert rule_of(inherit(new, old)) == "descendant"
    assert rule_of(inherit(new, Holder(old.owner, old.ancestors, is_portd=True))) is None


# --- listeners together ---


def test_the_users_other_processes_count_while_nobody_closer_listens():
    by_uid, owner = make_holder(started_at=GRANTED_AT + 1), make_holder(OWNER)
    alone = judge(make_lease(), [listen(1)], {1: by_uid})
    assert ([own.vouched_by for own in alone.own], alone.foreign) == (["uid"], ())
    beside = judge(make_lease(), [listen(1), listen(2)], {1: by_uid, 2: owner})
    assert [own.vouched_by for own in beside.own] == ["owner"]
    assert [listener.inode for listener, _ in beside.foreign] == [1]


def test_a_socket_that_only_portd_has_is_nobodys():
    judgement = judge(make_lease(), [listen()], {1: Holder(Owner(known_by="socket"), ((1, 1),), is_portd=True)})
    assert judgement == ((), (), True, (1,))


@pytest.mark.parametrize(
    ("leased", "listens", "own_address", "counts"),
    [
        ("127.0.0.1", "::1", False, True),
        ("127.0.0.1", "127.0.0.2", False, True),
        ("127.0.0.1", "0.0.0.0", False, True),
        ("127.0.0.1", "::", False, True),
        ("127.0.0.1", "192.0.2.1", False, False),
        ("localhost", "::1", False, True),
        ("localhost", "127.0.0.1", False, True),
        ("192.0.2.1", "127.0.0.1", False, False),
        ("127.77.0.1", "127.77.0.2", True, False),
    ],
)
def test_an_own_listener_counts_at_the_addresses_that_callers_try(leased, listens, own_address, counts):
    lease = make_lease(address=leased, own_address=own_address)
    judgement = judge(lease, [listen(address=listens, v6only=False)], {1: make_holder(OWNER)})
    assert judgement.listening == ((listens,) if counts else ())


def test_a_listener_on_another_leases_address_is_that_leases():
    lease, other = make_lease(), make_lease(id="lease-2", address="::1")
    judgement = judge(lease, [listen(address="::1")], {1: make_holder(OWNER)}, others=[lease, other])
    assert judgement.own == ()


def test_a_foreign_listener_at_another_address_is_no_conflict():
    assert judge(make_lease(), [listen(address="::1")], {1: make_holder(uid=1001)}).foreign == ()
    assert judge(make_lease(), [listen(address="::", v6only=False)], {1: make_holder(uid=1001)}).foreign
