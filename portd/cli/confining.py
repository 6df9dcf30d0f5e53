"""Landlock's network rules (landlock(7), Linux 6.7 and up): this process and its children may bind only given ports.

The rules need no privilege, survive exec, reach every descendant and can't be widened. The C library has no functions
for them, so the three system calls are made by number; the numbers are the same on every architecture.
"""

from __future__ import annotations

import ctypes
import os

from portd._client.errors import PortdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION = 1 << 0
RULE_NET_PORT = 2
ACCESS_NET_BIND_TCP = 1 << 0
ABI_WITH_NETWORK = 4
PR_SET_NO_NEW_PRIVS = 38
"""Without it only root may restrict itself (prctl(2))."""


class ConfinementUnavailable(PortdError):
    """This kernel can't confine a process to its ports."""


class RulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr of ABI 4."""

    _fields_ = [("handled_access_fs", ctypes.c_uint64), ("handled_access_net", ctypes.c_uint64)]


class NetPortAttr(ctypes.Structure):
    """struct landlock_net_port_attr."""

    _fields_ = [("allowed_access", ctypes.c_uint64), ("port", ctypes.c_uint64)]


def confine(ports: Iterable[int]) -> None:
    """Allow this process and its children to bind these TCP ports, and no others, for good.

    Raises ConfinementUnavailable where the kernel has no such rules: never a silent pass.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        result = int(libc.syscall(ctypes.c_long(number), *arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    try:
        abi = call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(CREATE_RULESET_VERSION))
    except OSError as error:
        raise ConfinementUnavailable(
            f"--confine needs Landlock, which this kernel lacks or has switched off ({error})"
        ) from error
    if abi < ABI_WITH_NETWORK:
        raise ConfinementUnavailable(
            f"--confine needs Landlock's network rules (Linux 6.7, ABI {ABI_WITH_NETWORK}); this kernel has ABI {abi}"
        )
    attributes = RulesetAttr(0, ACCESS_NET_BIND_TCP)
    ruleset = call(
        CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)), ctypes.c_uint32(0)
    )
    try:
        for port in ports:
            rule = NetPortAttr(ACCESS_NET_BIND_TCP, port)
            call(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(RULE_NET_PORT), ctypes.byref(rule), ctypes.c_uint32(0))
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
