"""Static ports: the numbers that the configuration gives to one endpoint of one service for good."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from portd.core.bindings import Binding, conflicts
from portd.core.model import MAIN_ENDPOINT, Protocol


class StaticPort(NamedTuple):
    """A port that the configuration gives to one endpoint of a service for good."""

    service: str
    port: int
    protocol: Protocol
    address: str
    endpoint: str = MAIN_ENDPOINT

    @property
    def binding(self) -> Binding:
        """Return the binding that is reserved."""
        return Binding(self.protocol, self.address, self.port)


class StaticPorts:
    """All static ports, found by endpoint and by number."""

    def __init__(self, statics: Iterable[StaticPort]) -> None:
        self.by_endpoint = {(static.service, static.endpoint): static for static in statics}
        self._by_port: dict[int, list[StaticPort]] = {}
        for static in self.by_endpoint.values():
            self._by_port.setdefault(static.port, []).append(static)

    def __iter__(self) -> Iterator[StaticPort]:
        return iter(self.by_endpoint.values())

    def __contains__(self, port: int) -> bool:
        return port in self._by_port

    def of_endpoint(self, service: str, endpoint: str) -> StaticPort | None:
        """Return the static port of an endpoint, or None."""
        return self.by_endpoint.get((service, endpoint))

    def on_port(self, port: int) -> list[StaticPort]:
        """Return the static ports with this number."""
        return self._by_port.get(port, [])

    def belongs_to_other(self, service: str, endpoint: str, binding: Binding) -> StaticPort | None:
        """Return the static port of another endpoint that the binding would conflict with, or None."""
        for static in self._by_port.get(binding.port, ()):
            if (static.service, static.endpoint) != (service, endpoint) and conflicts(static.binding, binding):
                return static
        return None
