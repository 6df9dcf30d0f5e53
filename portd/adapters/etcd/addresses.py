"""The addresses of this host that others reach, and how portd identifies itself to etcd: read from the configuration.

This module must not know sessions.
"""

from __future__ import annotations

import array
import fcntl
import ipaddress
import os
import socket
import ssl
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from portd.adapters.etcd.gateway import Login
from portd.core.errors import ConfigError

SIOCGIFADDR: Final = 0x8915
"""netdevice(7): an interface's IPv4 address."""
IF_INET6: Final = Path("/proc/net/if_inet6")
GLOBAL_SCOPE: Final = "00"
NAME_MAX_BYTES: Final = 15
"""IFNAMSIZ less the final zero (netdevice(7))."""


def advertised(advertise: str, endpoints: Sequence[str]) -> tuple[str, ...]:
    """Return the addresses that others reach this host at, in place of wildcard ones.

    `advertise` is an address, an interface, or "": then the address from which etcd is reached. Raises ConfigError for
    an interface without an address. Empty where etcd is reached by loopback alone.
    """
    if not advertise:
        found = [address for url in endpoints if (address := _source_address(url))]
        return tuple(dict.fromkeys(found))
    try:
        return (str(ipaddress.ip_address(advertise)),)
    except ValueError:
        pass
    addresses = (*_ipv4_of(advertise), *_ipv6_of(advertise))
    if not addresses:
        raise ConfigError(
            f"cluster.advertise: interface {advertise} has no address that others reach, or does not exist"
        )
    return addresses


def login(tls_ca: str, tls_cert: str, tls_key: str, user: str, password_file: str, *, is_tls: bool) -> Login:
    """Read certificates and password; raises ConfigError for a file that can't be read."""
    context = None
    if is_tls:
        try:
            context = ssl.create_default_context(cafile=tls_ca or None)
            if tls_cert:
                context.load_cert_chain(tls_cert, tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"cluster.tls_ca, tls_cert or tls_key can't be loaded: {error.strerror or error}: they must be PEM "
                "files that portd's user may read"
            ) from error
    return Login(context, user, _read_password(password_file) if password_file else "")


def _read_password(name: str) -> str:
    """Read a password's first line; a relative name is a credential of the unit (systemd.exec(5), LoadCredential=)."""
    path = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/"), name)
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster.password_file: {path} can't be read: {error}") from error


def _source_address(url: str) -> str | None:
    """Return the address from which the host of a URL is reached; nothing is sent."""
    parts = urlsplit(url)
    try:
        host = ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        return None  # a name: resolving it here could take long
    with socket.socket(socket.AF_INET6 if host.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(host), parts.port or 2379))
        except OSError:
            return None
        source = str(probe.getsockname()[0])
    return None if ipaddress.ip_address(source).is_loopback else source


def _ipv4_of(interface: str) -> list[str]:
    request = array.array("B", struct.pack("16s24x", interface.encode()[:NAME_MAX_BYTES]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as kernel:
        try:
            fcntl.ioctl(kernel, SIOCGIFADDR, request)
        except OSError:
            return []
    return [socket.inet_ntoa(request[20:24].tobytes())]


def _ipv6_of(interface: str) -> list[str]:
    try:
        lines = IF_INET6.read_text().splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [
        socket.inet_ntop(socket.AF_INET6, bytes.fromhex(one[0]))
        for one in fields
        if one[5] == interface and one[3] == GLOBAL_SCOPE
    ]
