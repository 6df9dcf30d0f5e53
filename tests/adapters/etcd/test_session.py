"""Sessions with a real etcd: each failure of etcd, of a member or of a host, and what look-ups show meanwhile."""

from __future__ import annotations

import asyncio
import signal

import pytest

from portd.cluster.publisher import BATCH_MAX
from tests.adapters.etcd.bed import Node, etcd, lease, needs_etcd, running, until

pytestmark = needs_etcd


def test_change_on_one_host_is_seen_by_another(tmp_path):
    async def scenario(members):
        a, b = Node("a", members), Node("b", members)
        a.put(lease("a", 1))
        async with running(a, b):
            await until(lambda: b.ids() == {"a-1"}, "b sees a's lease")
            a.put(lease("a", 2), lease("a", 1, state="ended"))
            await until(lambda: b.ids() == {"a-2"}, "b sees the change")
            assert dict(b.view.hosts["a"].services) == {"orders": 1}

    with etcd(tmp_path) as members:
        asyncio.run(scenario(members))


def test_thousand_instances_arrive_in_batches(tmp_path):
    async def scenario(members):
        a, b = Node("a", members), Node("b", members)
        a.put(*(lease("a", n) for n in range(10 * BATCH_MAX)))
        async with running(a, b):
            await until(lambda: len(b.ids()) == 10 * BATCH_MAX, "all are seen")
            assert a.publisher.waiting_count == 0

    with etcd(tmp_path) as members:
        asyncio.run(scenario(members))


def test_dead_host_disappears_within_its_ttl(tmp_path):
    async def scenario(members):
        a, b = Node("a", members), Node("b", members)
        a.put(lease("a", 1), lease("a", 2))
        async with running(a, b):
            await until(lambda: len(b.ids()) == 2, "b sees both")
            await a.stop()
            await until(lambda: not b.ids() and not b.view.hosts, "a is gone", 3 + 1 + 2)

    with etcd(tmp_path) as members:
        asyncio.run(scenario(members))


def test_restart_within_the_ttl_is_not_noticed(tmp_path):
    async def scenario(members):
        a, b = Node("a", members), Node("b", members)
        a.put(lease("a", 1), lease("a", 2))
        seen = []
        b.session.on_seen = seen.extend
        async with running(a, b):
            await until(lambda: len(b.ids()) == 2, "b sees both")
            await a.stop()
            seen.clear()
            again = Node("a", members)
            again.put(lease("a", 1))  # the other one ended meanwhile
            async with running(again):
                await until(lambda: b.ids() == {"a-1"}, "the ended one is withdrawn")
                assert [(one.lease.id, one.is_gone) for one in seen] == [("a-2", True)]
                assert again.publisher.lease_id == a.publisher.lease_id

    with etcd(tmp_path) as members:
        asyncio.run(scenario(members))


def test_second_host_of_a_name_is_refused(tmp_path):
    async def scenario(members):
        a, b, impostor = Node("a", members), Node("b", members), Node("a", members, machine="other")
        a.put(lease("a", 1))
        async with running(a, b):
            await until(lambda: b.ids() == {"a-1"}, "b sees a's lease")
            impostor.put(lease("a", 9))
            async with running(impostor):
                await until(lambda: impostor.publisher.state == "refused", "the impostor is refused")
                assert "taken by another machine at 10.0.0.1" in impostor.session.condition()["problem"]
                assert b.ids() == {"a-1"}
                await a.stop()
                await until(lambda: b.ids() == {"a-9"}, "the name is claimed once it is free")
                assert impostor.session.condition()["problem"] is None

    with etcd(tmp_path) as members:
        asyncio.run(scenario(members))


def test_view_stays_and_ages_while_etcd_is_away(tmp_path):
    async def scenario(members):
        a, b = Node("a", members), Node("b", members)
        a.put(lease("a", 1))
        async with running(a, b):
            await until(lambda: b.ids() == {"a-1"}, "b sees a's lease")
            assert b.session.stale_s() is None
            members[0].kill()
            await until(lambda: (b.session.stale_s() or 0) > 4, "the view is stale for longer than the ttl")
            assert b.ids() == {"a-1"}
            a.put(lease("a", 2))
            members[0].start().wait_ready()
            await until(lambda: b.ids() == {"a-1", "a-2"}, "what changed meanwhile is seen")
            assert b.session.stale_s() is None

    with etcd(tmp_path) as members:
        asyncio.run(scenario(members))


def test_wiped_etcd_empties_no_view(tmp_path):
    async def scenario(members):
        a, b = Node("a", members), Node("b", members)
        a.put(*(lease("a", n) for n in range(20)))
        fewest = []
        b.session.on_seen = lambda seen: fewest.append(len(b.ids()))
        async with running(a, b):
            await until(lambda: len(b.ids()) == 20, "b sees all")
            for n in range(30):
                a.put(lease("a", 100, port=21_000 + n))
                await until(lambda: a.publisher.waiting_count == 0, "the revision grows")
            fewest.clear()
            members[0].wipe()
            members[0].start().wait_ready()
            a.put(lease("a", 101))
            await until(lambda: "a-101" in b.ids(), "news arrives after the wipe")
            assert min(fewest) >= 20
            assert len(b.ids()) == 22

    with etcd(tmp_path) as members:
        asyncio.run(scenario(members))


@pytest.mark.parametrize("kind", [signal.SIGSTOP, signal.SIGKILL])
def test_session_leaves_a_member_that_does_not_answer(tmp_path, kind):
    async def scenario(members):
        a, b = Node("a", members[1:]), Node("b", members)
        async with running(a, b):
            await until(lambda: b.session.condition()["member"] == members[0].url, "b speaks to the first member")
            await until(lambda: a.publisher.state == "claimed", "a has published")
            members[0].send(kind)
            await until(lambda: b.session.condition()["member"] not in (None, members[0].url), "b moved", 2 + 2)
            a.put(lease("a", 1))
            await until(lambda: b.ids() == {"a-1"}, "b sees the change by another member")
            if kind == signal.SIGSTOP:
                members[0].send(signal.SIGCONT)

    with etcd(tmp_path, 3) as members:
        asyncio.run(scenario(members))


def test_compaction_loses_no_change(tmp_path):
    async def scenario(members):
        a, b = Node("a", members), Node("b", members)
        a.put(lease("a", 1))
        async with running(a, b):
            await until(lambda: b.ids() == {"a-1"}, "b sees a's lease")
            await b.stop()
            a.put(lease("a", 1, state="ended"), lease("a", 2))
            await until(lambda: a.publisher.waiting_count == 0, "the change is written")
            revision = a.publisher.fence
            process = await asyncio.create_subprocess_exec(
                *("etcdctl", "--endpoints", members[0].url, "compact", str(revision)),
                env={"ETCDCTL_API": "3", "PATH": "/usr/bin"},
                stdout=asyncio.subprocess.DEVNULL,
            )
            assert await process.wait() == 0
            b.start()
            await until(lambda: b.ids() == {"a-2"}, "b has read everything again")

    with etcd(tmp_path) as members:
        asyncio.run(scenario(members))


def test_service_that_nobody_follows_is_read_when_asked_for(tmp_path):
    async def scenario(members):
        a, b = Node("a", members), Node("b", members, follow="asked")
        a.put(lease("a", 1), lease("a", 2, "cart"))
        async with running(a, b):
            await until(lambda: a.publisher.waiting_count == 0 and "a" in b.view.hosts, "both are connected")
            assert b.ids("cart") == set()
            await b.session.ask("cart")
            assert b.ids("cart") == {"a-2"}
            a.put(lease("a", 3, "cart"))
            await until(lambda: b.ids("cart") == {"a-2", "a-3"}, "it is followed from then on")
            assert b.ids("orders") == set()

    with etcd(tmp_path) as members:
        asyncio.run(scenario(members))


def test_server_that_is_not_etcd_is_named(tmp_path):
    async def scenario():
        async def answer(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        a = Node("a", [], urls=[f"http://127.0.0.1:{port}"])
        async with running(a):
            await until(lambda: "client URL" in (a.session.condition()["problem"] or ""), "the problem is named")
        server.close()

    asyncio.run(scenario())
