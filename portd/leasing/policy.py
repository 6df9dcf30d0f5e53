"""What the configuration says about grants, and the secrets that a grant makes."""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable
from typing import NamedTuple

from portd.core.model import HoldKind
from portd.core.own_addresses import User

IsListed = Callable[[str, User], bool | None]
"""Whether `[services.NAME] users` has a user, by service name; None where it lists nobody."""


class Policy(NamedTuple):
    """What the configuration says about grants.

    `max_ttl_s` is in seconds; `daemon_uid` is the user that the daemon runs as; `quota_per_uid` is a
    user's share of leases and quarantined ports together (0: no bound);
    `has_shared_names`: service names belong to nobody; ports from `unprivileged_from` on need no privilege (the
    kernel's ip_unprivileged_port_start, ip-sysctl).
    """

    max_ttl_s: float
    quota_per_uid: int
    hold: HoldKind
    allow_commands: frozenset[str]
    host: str
    daemon_uid: int = 0
    has_shared_names: bool = False
    is_listed: IsListed = lambda service, user: None
    unprivileged_from: int = 1024


def new_id(at: float) -> str:
    """Make a lease id: milliseconds since the epoch, then 48 random bits, in hex digits.

    Ids that grow with time lie together in the store: a quarter of a commit's time at 64 grants. No secret is in them.
    """
    return f"{int(at * 1000) & 0xFFFFFFFFFFFF:012x}{secrets.token_hex(6)}"


def new_token() -> str:
    """Make a token of 192 random bits."""
    return urlsafe_b64encode(secrets.token_bytes(24)).decode("ascii")
