"""The client of portd: a port for this process, and the working instances of others.

    import portd_client

    with portd_client.listen("orders", check="http:/healthz") as listener:   # a listening socket
        serve(listener)
    billing = portd_client.resolve("billing")                               # billing.host, billing.port

Importing this costs next to nothing (1 ms): every name is imported when it is first used (PEP 562). The asyncio side
of it is `portd_client.aio`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portd_client.aio import AsyncClient as AsyncClient
    from portd_client.client import Client as Client
    from portd_client.errors import DaemonUnavailable as DaemonUnavailable
    from portd_client.errors import InvalidUrl as InvalidUrl
    from portd_client.errors import LeaseLost as LeaseLost
    from portd_client.errors import NoAnswerInTime as NoAnswerInTime
    from portd_client.errors import NotOwner as NotOwner
    from portd_client.errors import PoolExhausted as PoolExhausted
    from portd_client.errors import PortdError as PortdError
    from portd_client.errors import PortTaken as PortTaken
    from portd_client.errors import Problem as Problem
    from portd_client.errors import ProtocolError as ProtocolError
    from portd_client.errors import TryAgain as TryAgain
    from portd_client.finding import Instance as Instance
    from portd_client.finding import NobodyThere as NobodyThere
    from portd_client.finding import resolve as resolve
    from portd_client.finding import resolve_all as resolve_all
    from portd_client.finding import watch as watch
    from portd_client.leasing import Lease as Lease
    from portd_client.leasing import lease as lease
    from portd_client.leasing import listen as listen

__version__ = "0.1.0"

_ROOMS = {
    "aio": ("AsyncClient",),
    "client": ("Client",),
    "errors": (
        "DaemonUnavailable",
        "InvalidUrl",
        "LeaseLost",
        "NoAnswerInTime",
        "NotOwner",
        "PoolExhausted",
        "PortTaken",
        "PortdError",
        "Problem",
        "ProtocolError",
        "TryAgain",
    ),
    "finding": ("Instance", "NobodyThere", "resolve", "resolve_all", "watch"),
    "leasing": ("Lease", "lease", "listen"),
}
__all__ = sorted(name for names in _ROOMS.values() for name in names)


def __getattr__(name: str) -> object:
    """Import a name when it is first used."""
    for room, names in _ROOMS.items():
        if name in names:
            from importlib import import_module

            found: object = getattr(import_module(f"portd_client.{room}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'portd_client' has no attribute {name!r}")
