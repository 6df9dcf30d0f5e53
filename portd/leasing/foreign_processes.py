"""Names the foreign process that has a requested port, in the refusal: it is what its reader has to end or to avoid."""

from __future__ import annotations

import asyncio
from pathlib import PurePath
from typing import Final

from portd.core.bindings import Binding, overlaps
from portd.core.errors import PortTaken
from portd.core.model import Owner
from portd.core.rights import Caller, sees_process
from portd.leasing.seams import PortSocket, SocketTable

SEARCH_MAX_S: Final = 1.0
"""How long a refusal waits for the search, which takes 0.1 ms a process of this host."""
GENERIC: Final = "a foreign process"


class ForeignProcesses:
    """Finds the process of a port by its sockets. `sockets` is a table of its own: refusals never delay the states."""

    def __init__(self, sockets: SocketTable) -> None:
        self._sockets = sockets

    async def explain(self, refusal: PortTaken, caller: Caller) -> PortTaken:
        """Return the refusal with the process named, or as it is where the kernel hides it or it is gone."""
        binding = refusal.foreign
        assert binding is not None
        try:
            async with asyncio.timeout(SEARCH_MAX_S):
                sockets = [each for each in self._sockets.on_port(binding.port) if _conflicts(each, binding)]
                owners = await self._sockets.owners({each.socket.inode for each in sockets})
        except (OSError, TimeoutError):
            return refusal
        found = [(each, owners[each.socket.inode]) for each in sockets if each.socket.inode in owners]
        if not found:
            return refusal
        blocking, owner = min(found, key=lambda each: _KINDS.index(each[0].kind))
        detail = refusal.detail.replace(GENERIC, _named(owner, caller), 1)
        if blocking.kind == "listening" and sees_process(caller, owner.uid):
            detail = detail.replace("request another", "request another, lease it for that process with 'adopt'", 1)
        return PortTaken(detail, pointer=refusal.pointer, retry_after_s=refusal.retry_after_s, foreign=binding)


_KINDS: Final = ("listening", "bound", "connected")


def _conflicts(each: PortSocket, binding: Binding) -> bool:
    """Return whether a socket keeps others from the binding."""
    has_protocol = binding.protocol in (each.socket.protocol, "both")
    return has_protocol and overlaps(each.socket.address, binding.address, v6only=each.socket.v6only)


def _named(owner: Owner, caller: Caller) -> str:
    """Name a process as far as the caller may see it: the program of another user's process is private."""
    program = PurePath(owner.exe).name if owner.exe and sees_process(caller, owner.uid) else "process"
    user = owner.user if owner.user is not None else f"uid {owner.uid}"
    return f"{program}[{owner.pid}] of {user}"
