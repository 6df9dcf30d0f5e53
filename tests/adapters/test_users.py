"""ListedUsers: who may lease a service, by the host's own user database."""

from __future__ import annotations

import grp
import pwd

from portd.adapters.users import ListedUsers

NOBODY = pwd.getpwnam("nobody")


def test_a_service_without_a_list_has_no_answer():
    assert ListedUsers({"orders": ()}).lists("orders", 1000) is None
    assert ListedUsers({}).lists("orders", 1000) is None


def test_names_uids_primary_groups_and_tokens_are_listed():
    group = grp.getgrgid(NOBODY.pw_gid).gr_name
    for entry, user in (
        ("nobody", NOBODY.pw_uid),
        ("4711", 4711),
        (f"@{group}", NOBODY.pw_uid),
        ("token:ci", "token:ci"),
    ):
        users = ListedUsers({"orders": (entry,)})
        assert users.lists("orders", user), entry
        assert users.lists("orders", 0) is False, entry
        assert users.lists("orders", None) is False, entry


def test_an_unknown_user_or_group_lets_nobody_in():
    assert ListedUsers({"orders": ("no-such-user", "@no-such-group")}).lists("orders", 1000) is False
