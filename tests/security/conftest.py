"""Two users without privileges, each a process that does what a test asks, beside a real daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.conftest import MakeDaemon, make_daemon, place  # noqa: F401  (fixtures)
from tests.e2e.harness import NOBODY, Daemon
from tests.e2e.puppet import Puppet

ATTACKER, VICTIM = NOBODY, NOBODY - 1

MakeUser = Callable[[Daemon, int], Puppet]


@pytest.fixture
def make_user() -> Iterator[MakeUser]:
    """Make processes of users; all end with the test."""
    with ExitStack() as stack:
        yield lambda daemon, uid: stack.enter_context(Puppet(daemon, uid=uid))


@pytest.fixture
def guarded(make_daemon: MakeDaemon) -> Daemon:  # noqa: F811
    """A running daemon with static ports, and names that are listed for one user."""
    extra = f"""
    own_addresses = "127.83.0.0/24"
    [static.https]
    port = 443
    address = "127.0.0.9"
    [services.https]
    users = ["{VICTIM}"]
    [services.team]
    users = ["{VICTIM}", "{ATTACKER}"]
    [leases]
    cooldown = 600
    """
    return make_daemon(extra=extra.replace("    ", "")).start()


@pytest.fixture
def attacker(guarded: Daemon, make_user: MakeUser) -> Puppet:
    """A process of the user who attacks."""
    return make_user(guarded, ATTACKER)


@pytest.fixture
def victim(guarded: Daemon, make_user: MakeUser) -> Puppet:
    """A process of the user who is attacked."""
    return make_user(guarded, VICTIM)
