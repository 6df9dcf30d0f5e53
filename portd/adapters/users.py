"""The users that `[services.NAME] users` lists, looked up in the host's user database.

A look-up may ask a directory server, so answers are kept for a while. This module must not know what a listing means.
"""

from __future__ import annotations

import grp
import pwd
import time
from collections.abc import Mapping, Sequence
from typing import Final

KEEP_S: Final = 60.0
"""Seconds that members of groups and the uids of names are kept: a change of a group counts after that time."""


class ListedUsers:
    """Which users each service lists, by name, uid, `@GROUP` or `token:NAME`."""

    def __init__(self, services: Mapping[str, Sequence[str]]) -> None:
        self._services = {service: tuple(users) for service, users in services.items() if users}
        self._kept: dict[str, tuple[float, frozenset[int | str]]] = {}

    def lists(self, service: str, user: int | str | None) -> bool | None:
        """Return whether the service lists the user; None where it lists nobody."""
        users = self._services.get(service)
        if users is None:
            return None
        return any(user in self._members(entry) or self._is_of_group(entry, user) for entry in users)

    def _members(self, entry: str) -> frozenset[int | str]:
        now = time.monotonic()
        kept = self._kept.get(entry)
        if kept is None or now - kept[0] > KEEP_S:
            kept = self._kept[entry] = (now, _members(entry))
        return kept[1]

    @staticmethod
    def _is_of_group(entry: str, user: int | str | None) -> bool:
        """Return whether the group is the user's primary one, which does not list its members."""
        if not entry.startswith("@") or not isinstance(user, int):
            return False
        try:
            return pwd.getpwuid(user).pw_gid == grp.getgrnam(entry[1:]).gr_gid
        except KeyError:
            return False


def _members(entry: str) -> frozenset[int | str]:
    if entry.startswith("token:"):
        return frozenset({entry})
    if entry.isdecimal():
        return frozenset({int(entry)})
    names = [entry]
    if entry.startswith("@"):
        try:
            names = grp.getgrnam(entry[1:]).gr_mem
        except KeyError:
            names = []
    found = set()
    for name in names:
        try:
            found.add(pwd.getpwnam(name).pw_uid)
        except KeyError:
            continue  # no such user: the entry lets nobody in
    return frozenset(found)
