"""What a lease handle knows, in both worlds: its document, its token, and whose it is. No I/O here."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from .types import LeaseDocument, LeaseRequest, Protocol


class LeaseState:
    """The newest document of a lease, and what this process has to do with it.

    `drain_s` is the seconds between leaving look-ups and releasing: callers who found this instance before still come.
    """

    def __init__(self, request: LeaseRequest, drain_s: float = 0.0) -> None:
        port = request.get("port", 0)
        self.request = request
        self.drain_s = drain_s
        self.document: LeaseDocument = {
            "id": "",
            "service": request["service"],
            "instance": request.get("instance", ""),
            "endpoint": request.get("endpoint", "main"),
            "protocol": request.get("protocol", "tcp"),
            "address": request.get("address", "127.0.0.1"),
            "port": port if isinstance(port, int) else 0,
            "lifetime": "process",
            "state": "held",
            "health": "unknown",
            "drain": False,
        }
        self.token: str | None = None
        self.is_adopted = False
        self.is_passed = False

    @property
    def id(self) -> str:
        """Return the lease's id; "" where no daemon granted it."""
        return self.document["id"]

    @property
    def address(self) -> str:
        """Return the address to bind."""
        return self.document["address"]

    @property
    def port(self) -> int:
        """Return the port to bind."""
        return self.document["port"]

    @property
    def protocols(self) -> tuple[Literal["tcp", "udp"], ...]:
        """Return the kernel's protocols, TCP first."""
        protocol = self.document["protocol"]
        return ("tcp", "udp") if protocol == "both" else (protocol,)

    @property
    def is_mine(self) -> bool:
        """Return whether this process releases it: an adopted one may belong to a parent that serves on."""
        if not self.is_adopted:
            return bool(self.id)
        return "owner" in self.document and self.document["owner"]["pid"] == os.getpid()

    def begin(self, document: LeaseDocument, token: str | None = None, *, adopted: bool = False) -> None:
        """Hold what was granted or adopted; what the document does not say stays as requested."""
        self.document = {**self.document, **document}
        self.token = token or document.get("token")
        self.is_adopted = adopted

    def update(self, document: LeaseDocument) -> bool:
        """Replace the document by a newer one; returns whether the port is another one now."""
        port, is_same = self.port, document["id"] == self.id
        self.document = document
        self.token = document.get("token", self.token)
        self.is_adopted = self.is_adopted and is_same
        return self.port != port


class LeaseHandle:
    """What a program sees of its lease; `Lease` and `AsyncLease` add what it can do with it."""

    def __init__(self, state: LeaseState) -> None:
        self._state = state

    def __repr__(self) -> str:
        return f"<portd lease {self.service}/{self.instance} on {self.address}:{self.port}>"

    @property
    def document(self) -> LeaseDocument:
        """Return the lease as the daemon showed it last."""
        return self._state.document

    @property
    def token(self) -> str | None:
        """Return the lease's token: whoever shows it may change the lease. None where no daemon granted it."""
        return self._state.token

    @property
    def id(self) -> str:
        """Return the lease's id; "" for a fallback."""
        return self._state.id

    @property
    def service(self) -> str:
        """Return the service's name."""
        return self.document["service"]

    @property
    def instance(self) -> str:
        """Return the instance's name; "" where no daemon named it."""
        return self.document["instance"]

    @property
    def endpoint(self) -> str:
        """Return the endpoint's name."""
        return self.document["endpoint"]

    @property
    def protocol(self) -> Protocol:
        """Return tcp, udp or both."""
        return self.document["protocol"]

    @property
    def address(self) -> str:
        """Return the address to bind."""
        return self._state.address

    @property
    def port(self) -> int:
        """Return the port to bind. It changes by `decline`, and for a lost lease with `on_change` alone."""
        return self._state.port

    @property
    def is_adopted(self) -> bool:
        """Return whether `portd run` leased it, for this process or one before it."""
        return self._state.is_adopted

    @property
    def is_passed(self) -> bool:
        """Return whether its sockets came from portd, bound and never free in between."""
        return self._state.is_passed

    @property
    def is_fallback(self) -> bool:
        """Return whether no daemon answered, and the port is of the kernel's choice: nothing to renew or release."""
        return not self._state.id
