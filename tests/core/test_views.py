"""What a caller sees: everything of its own, and no secrets of another user's."""

from __future__ import annotations

import msgspec
import pytest

from portd.core.model import CommandCheck, Event, HttpCheck, Lease, Owner, TcpCheck
from portd.core.rights import Caller
from portd.core.views import LeaseView, view_event, view_lease

MINE = Owner(
    pid=41, uid=1000, user="alice", exe="/home/alice/app", cmdline=("app", "--key=s3cret"), known_by="peercred"
)
THEIRS = Owner(pid=42, uid=1001, user="bob", exe="/home/bob/app", cmdline=("app", "s3cret"), known_by="peercred")
CHECK = HttpCheck(path="/healthz?key=s3cret", headers={"Authorization": "Bearer s3cret"})
LEASE = Lease(
    id="lease-1",
    service="orders",
    instance="orders-1",
    endpoint="main",
    protocol="tcp",
    address="127.0.0.1",
    port=20000,
    pool="default",
    hold="shared",
    lifetime="process",
    owner=MINE,
    uid=1000,
    check=CHECK,
    host="testhost",
    created_at=1_700_000_000.0,
    token_hash=b"t" * 32,
)
MAY_SEE = [Caller(uid=1000), Caller(uid=0, admin=True), Caller(admin=True), Caller(uid=1001, token_hash=b"t" * 32)]
MAY_NOT = [Caller(uid=1001), Caller(), Caller(uid=1001, token_hash=b"x" * 32), Caller(token_name="ci")]


@pytest.mark.parametrize("caller", MAY_SEE)
def test_owner_admin_and_token_holder_see_the_whole_check(caller):
    assert view_lease(LEASE, caller).check == CHECK


@pytest.mark.parametrize("caller", MAY_NOT)
@pytest.mark.parametrize("check", [CHECK, CommandCheck(command=("/bin/check", "s3cret"))])
def test_others_see_no_secret_of_a_lease(caller, check):
    lease = msgspec.structs.replace(LEASE, check=check)
    event = Event(7, "conflict", 1_700_000_001.0, msgspec.structs.replace(lease, state="conflict", foreign=MINE))
    for shown in (view_lease(lease, caller), view_event(event, caller)):
        text = msgspec.json.encode(shown)
        assert b"s3cret" not in text
        assert b"/home/alice" not in text


def test_others_still_see_what_a_check_does():
    view = view_lease(LEASE, Caller(uid=1001))
    assert (view.check.path, view.check.interval) == ("/healthz", 10.0)
    assert view_lease(msgspec.structs.replace(LEASE, check=TcpCheck()), Caller()).check == TcpCheck()


def test_process_that_changed_user_is_shown_by_its_uid():
    lease = msgspec.structs.replace(LEASE, owner=THEIRS)
    assert view_lease(lease, Caller(uid=1000)).owner.cmdline is None
    assert view_lease(lease, Caller(uid=1000)).check == CHECK
    assert view_lease(lease, Caller(uid=1001)).owner.cmdline == THEIRS.cmdline


def test_view_has_no_field_that_never_leaves_the_daemon():
    hidden = {"process", "token_hash", "ttl", "exact", "own_address", "token_name", "foreign", "passed_from"}
    assert not hidden & {field.encode_name for field in msgspec.structs.fields(LeaseView)}


def test_passed_event_names_both_owners():
    lease = msgspec.structs.replace(LEASE, passed_from=MINE, owner=THEIRS)
    shown = msgspec.json.decode(msgspec.json.encode(view_event(Event(7, "passed", 1.0, lease), Caller(admin=True))))
    assert (shown["from"]["pid"], shown["to"]["pid"]) == (41, 42)
    other = msgspec.json.decode(msgspec.json.encode(view_event(Event(8, "bound", 1.0, lease), Caller(admin=True))))
    assert not {"from", "to"} & other.keys()
