"""Host names of leases below `.localhost`: what the gateway serves and what `portd url` prints.

    SERVICE.localhost               any instance of a service
    INSTANCE.SERVICE.localhost      one instance
    ENDPOINT--SERVICE.localhost     another endpoint than `main`; also ENDPOINT--INSTANCE.SERVICE.localhost

Light on purpose: `portd run` imports it, so it must not import the model.
"""

from __future__ import annotations

from typing import NamedTuple

SUFFIX = "localhost"
"""The top-level domain that browsers resolve to loopback by themselves (RFC 6761 section 6.3)."""
SEPARATOR = "--"
"""Between an endpoint and the name it belongs to."""
GATEWAY_SERVICE = "portd-gateway"
"""The service whose lease shows where a gateway listens: `main` is plain HTTP, `https` is Caddy's."""
HTTP_PORT, HTTPS_PORT, USER_PORT = 80, 443, 7780
"""Ports of the gateway: of its unit's socket, of Caddy, and the default of a user."""

_MAIN = "main"
_LABEL_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


class PublicName(NamedTuple):
    """What a host name stands for; `instance` None is any instance."""

    service: str
    instance: str | None = None
    endpoint: str = _MAIN


def parse_host(host: str) -> tuple[PublicName, ...]:
    """Return what a host name (a port may follow) can stand for, the likeliest first; none for a foreign name.

    A label with `--` may be a service's own name: that reading comes first, then each split from the left.
    """
    name = host.partition(":")[0].lower().removesuffix(".")
    labels = name.split(".")
    if len(labels) not in (2, 3) or labels[-1] != SUFFIX or not all(map(_is_label, labels)):
        return ()
    service = labels[-2]
    if len(labels) == 2:
        return (PublicName(service), *(PublicName(rest, None, endpoint) for endpoint, rest in _splits(service)))
    instance = labels[0]
    return (
        PublicName(service, instance),
        *(PublicName(service, rest, endpoint) for endpoint, rest in _splits(instance)),
    )


def format_host(name: PublicName) -> str:
    """Return the host name of a service, an instance or an endpoint."""
    first = name.instance or name.service
    prefix = "" if name.endpoint == _MAIN else name.endpoint + SEPARATOR
    return f"{prefix}{first}.{name.service}.{SUFFIX}" if name.instance else f"{prefix}{first}.{SUFFIX}"


def format_url(name: PublicName, scheme: str, port: int) -> str:
    """Return the URL of a name at a gateway; the scheme's default port is left out."""
    default = HTTPS_PORT if scheme == "https" else HTTP_PORT
    return f"{scheme}://{format_host(name)}{'' if port == default else f':{port}'}"


def _splits(label: str) -> list[tuple[str, str]]:
    """Return every way to read a label as ENDPOINT--NAME."""
    found = []
    at = label.find(SEPARATOR)
    while at >= 0:
        endpoint, rest = label[:at], label[at + len(SEPARATOR) :]
        if _is_label(endpoint) and _is_label(rest):
            found.append((endpoint, rest))
        at = label.find(SEPARATOR, at + 1)
    return found


def _is_label(text: str) -> bool:
    """Return whether a text is a DNS label in lower case (RFC 1123 section 2.1)."""
    return 1 <= len(text) <= 63 and not set(text) - _LABEL_CHARACTERS and text[0] != "-" and text[-1] != "-"
