"""Why no port could be granted: the refusal that names the true cause, who has the port, and when to try again."""

from __future__ import annotations

from typing import Literal

from portd.core.allocator import Allocator, PortRequest
from portd.core.errors import PoolExhausted, PortReserved, PortTaken, QuotaExceeded, Refusal
from portd.core.table import LeaseTable
from portd.leasing.foreign_processes import GENERIC
from portd.leasing.owners import describe_owner
from portd.leasing.policy import Policy
from portd.leasing.seams import Taken

Reason = Taken | Literal["leased", "privileged"]


class Search(dict[int, Reason]):
    """Why each candidate of one grant can't be had, by port. `tries` counts those that the kernel was asked for."""

    tries = 0

    @property
    def is_forbidden(self) -> bool:
        """Return whether missing privilege is the only reason."""
        return bool(self) and not set(self.values()) - {"forbidden", "privileged"}


def no_port(
    allocator: Allocator,
    table: LeaseTable,
    request: PortRequest,
    search: Search,
    tick: float,
    policy: Policy,
) -> Refusal:
    """Make the refusal of a request for which every candidate failed."""
    if request.is_exact:
        refusals = [_refuse_port(allocator, table, request, port, search, tick, policy) for port in request.ports]
        if len(refusals) == 1:
            return refusals[0]
        waits = [refusal.retry_after_s for refusal in refusals if refusal.retry_after_s is not None]
        reasons = "; ".join(refusal.detail.partition(": ")[0] for refusal in refusals[:3])
        more = f"; and {len(refusals) - 3} more" if len(refusals) > 3 else ""
        return PortTaken(
            f"none of the {len(refusals)} requested ports is free ({reasons}{more}): request others, or omit 'exact'",
            pointer="/port",
            retry_after_s=min(waits, default=None),
        )
    if search.is_forbidden:
        port = next(iter(allocator.numbers(request.pool)))
        return PortReserved(f"no port of pool {request.pool} can be granted: {_forbidden(port, policy)}")
    if request.is_at_share:
        return QuotaExceeded(
            "leases, declined and cooling ports together have reached the quota: release less often, or raise "
            "quota_per_uid in the configuration",
            retry_after_s=allocator.quarantines.next_left_s(request.user, tick),
        )
    count = allocator.count(request.pool)
    next_tick = allocator.quarantines.next_tick()
    return PoolExhausted(
        f"pool {request.pool} has no free port: {count.used} of {count.size} leased, {count.cooling} cooling, "
        f"{count.declined} declined; release some, wait for the cooldown, or widen the pool in the configuration",
        retry_after_s=None if next_tick is None else max(0.0, next_tick - tick),
    )


def _refuse_port(
    allocator: Allocator,
    table: LeaseTable,
    request: PortRequest,
    port: int,
    search: Search,
    tick: float,
    policy: Policy,
) -> Refusal:
    binding = request.on(port)
    static = allocator.statics.belongs_to_other(request.name[0], request.name[2], binding)
    if static is not None:
        return PortReserved(
            f"port {port} is static for {static.service} (endpoint {static.endpoint}): request another, or omit "
            "'exact'",
            pointer="/port",
        )
    reason = search.get(port)
    if reason in ("privileged", "forbidden"):
        return PortReserved(f"port {port} can't be granted: {_forbidden(port, policy)}", pointer="/port")
    cooling = allocator.quarantines.blocking(request.instance, binding, "cooling")
    if cooling is not None:
        left_s = allocator.quarantines.left_s(cooling, tick)
        return PortTaken(
            f"port {port} is cooling down after another instance: request it again in {left_s:.1f} s, or omit 'exact'",
            pointer="/port",
            retry_after_s=left_s,
        )
    lease = table.conflicting(binding)
    if lease is not None:
        return PortTaken(
            f"port {port} is leased by {lease.instance} (endpoint {lease.endpoint}) of {describe_owner(lease.owner)}: "
            f"request another, or see 'portd who {port}'",
            pointer="/port",
        )
    return PortTaken(
        f"port {port} on {request.address} is used by {GENERIC}: request another, or see 'portd who {port}'",
        pointer="/port",
        foreign=binding,
    )


def _forbidden(port: int, policy: Policy) -> str:
    if port < policy.unprivileged_from:
        return (
            f"ports below {policy.unprivileged_from} are privileged (net.ipv4.ip_unprivileged_port_start): only root, "
            "the admin group, an own address or a static port of a listed user gets one, and portd needs "
            "CAP_NET_BIND_SERVICE"
        )
    return "the kernel does not let portd bind it (SocketBindDeny= of its unit, or a security module)"
