"""What a lease handle knows, in both worlds: its document, its token, and whose it is. No I/O here."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from .types import LeaseDocument, LeaseRequest


class LeaseState:
    """A lease as its holder sees it. `document` is the daemon's newest word; `id` is "" where no daemon gave it."""

    def __init__(self, wish: LeaseRequest, drain_s: float = 0.0) -> None:
        self.wish = wish
        self.drain_s = drain_s
        """Seconds between leaving look-ups and giving back: whoever found this instance before still comes."""
        self.document: LeaseDocument = {
            "id": "",
            "service": wish["service"],
            "instance": wish.get("instance", ""),
            "endpoint": wish.get("endpoint", "main"),
            "protocol": wish.get("protocol", "tcp"),
            "address": wish.get("address", "127.0.0.1"),
            "port": wish.get("port", 0),
            "lifetime": "process",
            "state": "held",
            "health": "unknown",
            "drain": False,
        }
        self.token: str | None = None
        self.is_adopted = False
        self.is_passed = False
        """Whether its sockets came from portd, bound and never free in between."""

    def __repr__(self) -> str:
        return f"<portd lease {self.service}/{self.instance} on {self.address}:{self.port}>"

    @property
    def id(self) -> str:
        """Return the lease's id; "" for a port of the kernel's choice, with nothing to keep, report or give back."""
        return self.document["id"]

    @property
    def service(self) -> str:
        """Return the service's name."""
        return self.document["service"]

    @property
    def instance(self) -> str:
        """Return the instance's name; "" before the daemon was reached."""
        return self.document["instance"]

    @property
    def endpoint(self) -> str:
        """Return the endpoint's name."""
        return self.document["endpoint"]

    @property
    def protocol(self) -> str:
        """Return tcp, udp or both."""
        return self.document["protocol"]

    @property
    def protocols(self) -> tuple[Literal["tcp", "udp"], ...]:
        """Return the kernel's protocols, TCP first."""
        protocol = self.document["protocol"]
        return ("tcp", "udp") if protocol == "both" else (protocol,)

    @property
    def address(self) -> str:
        """Return the address to bind."""
        return self.document["address"]

    @property
    def port(self) -> int:
        """Return the port to bind."""
        return self.document["port"]

    @property
    def is_mine(self) -> bool:
        """Tell whether it is this process' to give back: an adopted one may belong to a parent that serves on."""
        if not self.is_adopted:
            return bool(self.id)
        return "owner" in self.document and self.document["owner"]["pid"] == os.getpid()

    def take(self, document: LeaseDocument, token: str | None = None, *, adopted: bool = False) -> None:
        """Begin to hold what was granted, or given by `portd run`; what is not known of it stays as wished."""
        self.document = {**self.document, **document}
        self.token = token or document.get("token")
        self.is_adopted = adopted

    def keep(self, document: LeaseDocument) -> bool:
        """Take in what a look at the lease found; returns whether the port is another one now."""
        port, self.document = self.port, document
        self.token = document.get("token", self.token)
        return self.port != port
