"""The successors of exited owners: found with few reads of the socket table, and only within the cooldown."""

from __future__ import annotations

import asyncio

from portd.adapters.kernel.attribution import Attribution
from portd.adapters.kernel.succession import Succession
from portd.core.model import Event, Lease, Listener, Owner, ProcessId
from portd.core.ownership import Holder

OWNER, CHILD = (41, 7), (42, 8)
DEADLINE_S = 20.0


class Table:
    """A socket table that counts its reads."""

    def __init__(self) -> None:
        self.reads = 0
        self.found: list[Listener] = []
        self.holder = Holder(Owner(pid=CHILD[0], uid=0, known_by="socket"), (CHILD, OWNER))

    def listeners(self, port: int | None = None) -> list[Listener]:
        self.reads += 1
        return [each for each in self.found if port in (None, each.port)]

    async def holders(self, inodes, likely_pids=()):
        return dict.fromkeys(inodes, self.holder)


def make_lease(port: int, **fields) -> Lease:
    return Lease(
        id=f"lease-{port}",
        service="web",
        instance=f"web-{port}",
        endpoint="main",
        protocol="tcp",
        address="127.0.0.1",
        port=port,
        pool="default",
        hold="shared",
        lifetime="process",
        owner=Owner(pid=OWNER[0], uid=0, known_by="peercred"),
        host="here",
        created_at=0.0,
        process=ProcessId(*OWNER, "boot"),
        **fields,
    )


def scenario(body, cooldown_s: float = 0.05) -> None:
    async def run():
        table, reports = Table(), []
        succession = Succession(
            table,
            Attribution(table),
            lambda port: [],
            lambda lease, successor: reports.append((lease.port, successor and successor.pid)),
            cooldown_s,
        )
        async with asyncio.timeout(DEADLINE_S):
            await body(succession, table, reports)

    asyncio.run(run())


def test_exit_without_listener_is_reported_before_anything_else_runs():
    async def body(succession, table, reports):
        succession.owners_exited([make_lease(20000)])
        assert reports == [(20000, None)]

    scenario(body)


def test_many_exits_at_once_cost_two_reads_of_the_table():
    async def body(succession, table, reports):
        for port in range(20000, 21000):
            succession.owners_exited([make_lease(port)])
        while len(reports) < 1000:
            await asyncio.sleep(0.001)
        assert table.reads == 2

    scenario(body)


def test_an_own_listener_succeeds_its_owner():
    async def body(succession, table, reports):
        table.found = [Listener("tcp", "127.0.0.1", 20000, 0, 1)]
        succession.owners_exited([make_lease(20000)])
        while not reports:
            await asyncio.sleep(0)
        assert reports == [(20000, CHILD[0])]

    scenario(body)


def test_an_ended_lease_is_expected_until_its_cooldown_is_over():
    async def body(succession, table, reports):
        ended = make_lease(20000, state="ended", ended_because="owner_exited")
        succession.apply(Event(1, "ended", 0.0, ended))
        assert succession.is_waiting()
        while succession.is_waiting():
            await asyncio.sleep(0.001)
        assert not succession.is_expected_on(20000)

    scenario(body)


def test_bound_or_released_lease_is_not_expected_again():
    async def body(succession, table, reports):
        for fields in ({"ended_because": "released"}, {"ended_because": "owner_exited", "kin": (CHILD,)}):
            succession.apply(Event(1, "ended", 0.0, make_lease(20000, state="ended", **fields)))
            assert not succession.is_waiting()

    scenario(body)
