"""Whose a service name is: the users that the configuration lists, else the user of its oldest live lease.

A name without live leases stays its last user's for the cooldown, so that a restart of the service does not lose it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from portd.core.errors import ServiceTaken
from portd.core.own_addresses import User


class Holder(NamedTuple):
    """Whose a service name is; `left_s` are the seconds until it is nobody's, None while a lease is live."""

    user: User
    left_s: float | None = None


class ServiceNames:
    """The names whose last lease ended less than the cooldown ago, and their users."""

    def __init__(self) -> None:
        self._released: OrderedDict[str, tuple[User, float]] = OrderedDict()

    def release(self, service: str, user: User, until_tick: float) -> None:
        """Keep a name for the user of its last lease until this tick."""
        self._released[service] = (user, until_tick)
        self._released.move_to_end(service)

    def holder(self, service: str, tick: float) -> Holder | None:
        """Return who keeps a name that has no live lease, or None."""
        while self._released:  # the oldest go first: all of them are kept equally long
            oldest = next(iter(self._released))
            if self._released[oldest][1] > tick:
                break
            del self._released[oldest]
        kept = self._released.get(service)
        return Holder(kept[0], kept[1] - tick) if kept is not None and kept[1] > tick else None


def check_name(service: str, user: User, holder: Holder | None, is_listed: bool | None) -> None:
    """Raise ServiceTaken unless the user may lease the service name.

    `is_listed` says whether `[services.NAME] users` has the user, None where it lists nobody: then `holder`
    decides.
    """
    if is_listed:
        return
    if is_listed is False:
        raise ServiceTaken(
            f"service {service} is not for {describe_user(user)}: choose another name, or add the user to "
            f"[services.{service}] users in the configuration",
            pointer="/service",
        )
    if holder is not None and holder.user != user:
        until = "" if holder.left_s is None else f" for {holder.left_s:.1f} s more"
        raise ServiceTaken(
            f"service {service} belongs to {describe_user(holder.user)}{until}: choose another name, or list the users "
            f"that share it in [services.{service}] users in the configuration",
            pointer="/service",
            retry_after_s=holder.left_s,
        )


def describe_user(user: User) -> str:
    """Name a user in a message."""
    return f"uid {user}" if isinstance(user, int) else user or "an unknown user"
