"""Confines `portd run --confine`: this process and its children may bind only given TCP ports, for good.

Landlock's network rules (landlock(7), Linux 6.7 and up) restrict bind(). They do not restrict sockets that another
process has bound and passes on, and portd's own handoff does that for every lease that is requested. The kernel
reports to no process that another one is confined, so the handoff can't refuse it; a seccomp filter (seccomp(2)) denies
what the handoff needs instead: SOCK_SEQPACKET unix sockets, and io_uring, which makes sockets past such filters.

Both need no privilege, survive exec, reach every descendant and can't be undone. The C library has no functions for
them, so the system calls are made by number.
"""

from __future__ import annotations

import ctypes
import os
import struct

from portd._client.errors import PortdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""System calls of Landlock, the same on every architecture."""
CREATE_RULESET_VERSION = 1 << 0
RULE_NET_PORT = 2
ACCESS_NET_BIND_TCP = 1 << 0
ABI_WITH_NETWORK = 4
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22
"""Options of prctl(2). Without the first only root may restrict itself."""
SECCOMP_MODE_FILTER = 2
ARCHITECTURES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198), "riscv64": (0xC00000F3, 198)}
"""AUDIT_ARCH (linux/audit.h) and the number of socket(2), by machine."""
IO_URING_SETUP = 425
X32_BIT = 0x40000000
"""Set in the numbers of x86-64's 32-bit system calls, which have the same AUDIT_ARCH."""
AF_UNIX, SOCK_SEQPACKET, SOCK_TYPE_MASK = 1, 5, 0xF
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
"""Results of a filter: SECCOMP_RET_ALLOW, and SECCOMP_RET_ERRNO with an error number."""
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
"""Instructions (linux/bpf_common.h): load a word, mask it, jump if equal or not less, return."""
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT, SECOND_ARGUMENT_AT = 0, 4, 16, 24
"""Offsets in struct seccomp_data; the low halves of arguments on these little-endian machines."""


class ConfinementUnavailable(PortdError):
    """This kernel can't confine a process to its ports."""


class RulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr of ABI 4."""

    _fields_ = [("handled_access_fs", ctypes.c_uint64), ("handled_access_net", ctypes.c_uint64)]


class NetPortAttr(ctypes.Structure):
    """struct landlock_net_port_attr."""

    _fields_ = [("allowed_access", ctypes.c_uint64), ("port", ctypes.c_uint64)]


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def confine(ports: Iterable[int]) -> None:
    """Allow this process and its children to bind these TCP ports and no others, nor to receive any from portd.

    Raises ConfinementUnavailable where the kernel can't do either part: never a silent pass.
    """
    program = handoff_filter(os.uname().machine)
    ruleset = _make_ruleset(ports)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    filled = FilterProgram(len(program) // 8, program)
    try:
        _check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filled), 0, 0))
    except OSError as error:
        raise ConfinementUnavailable(f"--confine needs seccomp filters, which this kernel lacks ({error})") from error


def handoff_filter(machine: str) -> bytes:
    """Return the seccomp filter that denies SOCK_SEQPACKET unix sockets and io_uring; raises ConfinementUnavailable.

    System calls of another architecture get ENOSYS: their numbers mean something else.
    """
    if machine not in ARCHITECTURES:
        raise ConfinementUnavailable(f"--confine is not available on {machine}: {', '.join(ARCHITECTURES)} only")
    architecture, socket_call = ARCHITECTURES[machine]
    return _assembled(
        [
            (LOAD, ARCHITECTURE_AT, "", ""),
            (EQUAL, architecture, "", "other system"),
            (LOAD, NUMBER_AT, "", ""),
            (AT_LEAST, X32_BIT, "other system", ""),
            (EQUAL, IO_URING_SETUP, "other system", ""),
            (EQUAL, socket_call, "", "allow"),
            (LOAD, FIRST_ARGUMENT_AT, "", ""),
            (EQUAL, AF_UNIX, "", "allow"),
            (LOAD, SECOND_ARGUMENT_AT, "", ""),
            (AND, SOCK_TYPE_MASK, "", ""),
            (EQUAL, SOCK_SEQPACKET, "deny", "allow"),
        ],
        {"allow": ALLOW, "deny": EPERM, "other system": ENOSYS},
    )


def _assembled(steps: Sequence[tuple[int, int, str, str]], results: dict[str, int]) -> bytes:
    """Assemble (instruction, operand, result if true, result if false); "" goes on with the next step."""
    at = {name: len(steps) + index for index, name in enumerate(results)}
    lines = [
        (code, at[yes] - index - 1 if yes else 0, at[no] - index - 1 if no else 0, operand)
        for index, (code, operand, yes, no) in enumerate(steps)
    ]
    lines += [(RETURN, 0, 0, value) for value in results.values()]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _make_ruleset(ports: Iterable[int]) -> int:
    """Return the descriptor of a Landlock ruleset for these ports; raises ConfinementUnavailable."""
    try:
        abi = _call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(CREATE_RULESET_VERSION))
    except OSError as error:
        raise ConfinementUnavailable(
            f"--confine needs Landlock, which this kernel lacks or has switched off ({error})"
        ) from error
    if abi < ABI_WITH_NETWORK:
        raise ConfinementUnavailable(
            f"--confine needs Landlock's network rules (Linux 6.7, ABI {ABI_WITH_NETWORK}); this kernel has ABI {abi}"
        )
    attributes = RulesetAttr(0, ACCESS_NET_BIND_TCP)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = _call(CREATE_RULESET, ctypes.byref(attributes), size, ctypes.c_uint32(0))
    for port in ports:
        rule = NetPortAttr(ACCESS_NET_BIND_TCP, port)
        _call(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(RULE_NET_PORT), ctypes.byref(rule), ctypes.c_uint32(0))
    return ruleset


def _call(number: int, *arguments: object) -> int:
    return _check(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments))


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
