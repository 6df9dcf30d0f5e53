"""The client of portd: a port for this process, and the instances of others.

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
    from .aio import AsyncClient as AsyncClient
    from .client import Client as Client
    from .errors import DaemonUnavailable as DaemonUnavailable
    from .errors import InvalidUrl as InvalidUrl
    from .errors import LeaseLost as LeaseLost
    from .errors import NoAnswerInTime as NoAnswerInTime
    from .errors import NoInstances as NoInstances
    from .errors import NotOwner as NotOwner
    from .errors import PoolExhausted as PoolExhausted
    from .errors import PortdError as PortdError
    from .errors import PortTaken as PortTaken
    from .errors import Problem as Problem
    from .errors import ProtocolError as ProtocolError
    from .errors import Retryable as Retryable
    from .leasing import Lease as Lease
    from .leasing import lease as lease
    from .leasing import listen as listen
    from .leaving import release_on_signal as release_on_signal
    from .lookup import Instance as Instance
    from .lookup import resolve as resolve
    from .lookup import resolve_all as resolve_all
    from .lookup import watch as watch
    from .protocol import Event as Event

__version__ = "0.1.0"

_MODULES = {
    "aio": ("AsyncClient",),
    "client": ("Client",),
    "errors": (
        "DaemonUnavailable",
        "InvalidUrl",
        "LeaseLost",
        "NoAnswerInTime",
        "NoInstances",
        "NotOwner",
        "PoolExhausted",
        "PortTaken",
        "PortdError",
        "Problem",
        "ProtocolError",
        "Retryable",
    ),
    "protocol": ("Event",),
    "lookup": ("Instance", "resolve", "resolve_all", "watch"),
    "leaving": ("release_on_signal",),
    "leasing": ("Lease", "lease", "listen"),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)


def __getattr__(name: str) -> object:
    """Import a name when it is first used."""
    for module, names in _MODULES.items():
        if name in names:
            from importlib import import_module

            found: object = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
