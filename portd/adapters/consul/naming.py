"""Consul's names for leases: a Consul service is an endpoint, a service id is an instance's endpoint.

What a client registered is kept verbatim in the lease's metadata, beside a DNS label made of it. This module must not
know HTTP.
"""

from __future__ import annotations

import re
from typing import Final

from portd.core.model import MAIN_ENDPOINT, Event, Lease

ID_KEY: Final = "consul.id"
NAME_KEY: Final = "consul.name"
CHECK_ID_KEY: Final = "consul.check_id"
CHECK_NAME_KEY: Final = "consul.check_name"
DEREGISTER_KEY: Final = "consul.deregister_after"
"""Metadata keys of what a client registered; answers to Consul's clients leave them out."""
PREFIX: Final = "consul."

LABEL_MAX: Final = 63


def service_name(lease: Lease) -> str:
    """Return the Consul service that a lease is: `orders`, or `orders-metrics` for another endpoint."""
    name = lease.metadata.get(NAME_KEY)
    if name is not None:
        return name
    return lease.service if lease.endpoint == MAIN_ENDPOINT else f"{lease.service}-{lease.endpoint}"


def affects(event: Event, name: str) -> bool:
    """Return whether an event may change the answers about a Consul service: its own, or one of another endpoint's."""
    return service_name(event.lease) == name or name.startswith(f"{event.lease.service}-")


def service_id(lease: Lease) -> str:
    """Return the Consul service id of a lease: what was registered, else the instance."""
    registered = lease.metadata.get(ID_KEY)
    if registered is not None:
        return registered
    return lease.instance if lease.endpoint == MAIN_ENDPOINT else f"{lease.instance}:{lease.endpoint}"


def check_id(lease: Lease) -> str:
    """Return the id of a lease's check: what was registered, else `service:ID`."""
    return lease.metadata.get(CHECK_ID_KEY) or f"service:{service_id(lease)}"


def meta(lease: Lease) -> dict[str, str]:
    """Return the metadata without what only this module knows of."""
    return {key: value for key, value in lease.metadata.items() if not key.startswith(PREFIX)}


def label(name: str) -> str:
    """Make a DNS label (RFC 1123) of any name: `My_App` is `my-app`. Empty where nothing is left."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:LABEL_MAX].rstrip("-")
