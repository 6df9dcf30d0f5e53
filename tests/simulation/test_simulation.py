"""Everything in any order: grants, releases, declines, exits, failing disks, lost commits, kills and restarts.

After every step: no two live leases conflict, every answered grant is there until something ended it,
holds and watched processes are exactly those of live leases, and the numbers of the pool add up.
"""

from __future__ import annotations

import asyncio
import itertools

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from portd.core.bindings import Binding, binding_of, conflicts
from portd.core.errors import Refusal, RevisionGone, StoreUnavailable
from portd.core.requests import LeaseRequest
from portd.core.static_ports import StaticPort
from portd.core.table import LeaseTable
from portd.testing.world import World

PORTS = range(20000, 20006)
STATICS = [StaticPort("a", 20100, "tcp", "127.0.0.1", "static"), StaticPort("b", 20101, "udp", "127.0.0.1")]
USERS = [1000, 2000]
PIDS = range(41, 45)
ADDRESSES = st.sampled_from(["127.0.0.1", "127.0.0.2", "0.0.0.0", "::", "own"])


ADMIN = World.caller(uid=0, admin=True)


class Replica:
    """A follower of events that resumes across restarts, and lists again only where the daemon says so."""

    def __init__(self):
        self.leases = {}
        self.revision = 0
        self.may_be_gone = False

    def apply(self, event):
        assert event.revision > self.revision, "an event came twice, or out of order"
        self.revision = event.revision
        if event.type == "ended":
            self.leases.pop(event.lease.id, None)
        else:
            self.leases[event.lease.id] = event.lease

    def list_again(self, world):
        self.leases = {lease.id: lease for lease in world.table}
        self.revision = world.table.revision

    def catch_up(self, world):
        try:
            events = list(world.feed.since(self.revision))
        except RevisionGone:
            assert self.may_be_gone, f"nothing that led to revision {self.revision} was pruned or lost"
            self.list_again(world)
            events = []
        self.may_be_gone = False
        for event in events:
            self.apply(event)

    def crash(self, store):
        """Expect RevisionGone only if the state that was seen last was never durable, or what followed it is pruned."""
        newest = store._events[-1][0] if store._events else 0
        self.may_be_gone = self.revision > newest or self.revision < store._pruned_to


class Simulation(RuleBasedStateMachine):
    """A daemon, its processes, its disk, and foreign on its host."""

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = World(PORTS, statics=STATICS, cooldown_s=2.0, quota_per_uid=4)
        self.run(self.world.start())
        self.owed = {}  # leases that were answered and have not been ended by anybody since
        self.revisions = []
        self.lapsed = []  # leases that ended with their owner
        self.answered = {}  # leases as they were answered last
        self.ended = {}  # when and why leases were reported as ended
        self.adopted = set()
        self.replica = Replica()

    def run(self, work):
        return self.loop.run_until_complete(work)

    def do(self, step, *args):
        """Take a step on the loop, as everything in the daemon is."""

        async def inside():
            step(*args)

        self.run(inside())

    def teardown(self):
        self.run(self.world.kill())
        self.loop.close()

    def forget_ended(self):
        for event in self.world.events:
            self.revisions.append(event.revision)
            if event.type == "passed":
                self.ended.pop(event.lease.id, None)  # it may be taken up again
            if event.type == "ended":
                self.ended[event.lease.id] = event.lease.ended_because
                self.owed.pop(event.lease.id, None)
                if event.lease.ended_because == "owner_exited":
                    self.lapsed.append(event.lease)
        self.world.events.clear()

    @rule(
        pid=st.sampled_from(PIDS),
        service=st.sampled_from("ab"),
        instance=st.sampled_from([None, "x"]),
        address=ADDRESSES,
        protocol=st.sampled_from(["tcp", "udp", "both"]),
        port=st.one_of(st.none(), st.sampled_from(PORTS), st.just((20005, "20000-20002"))),
        exact=st.booleans(),
        ttl=st.one_of(st.none(), st.just(5.0)),
        relatives=st.lists(st.sampled_from([None, 1, 2, 100]), max_size=2),
        endpoint=st.sampled_from(["main", "static"]),
    )
    def grant(self, pid, service, instance, address, protocol, port, exact, ttl, relatives, endpoint):
        if not self.world.processes.is_running(pid):
            self.world.processes.start(pid, uid=USERS[pid % 2])
        uid = self.world.processes.find(pid, "peercred").owner.uid
        first = LeaseRequest(
            service=service,
            instance=instance,
            endpoint=endpoint,
            address=address,
            protocol=protocol,
            port=port,
            exact=exact and port is not None,
            ttl=ttl,
        )
        others = [
            LeaseRequest(service=service, endpoint=f"e{number}", address=address, ttl=ttl, offset=offset)
            for number, offset in enumerate(relatives)
        ]
        before = self.clocks()
        try:
            granted = self.run(self.world.ask([first, *others], pid=pid, uid=uid))
        except Refusal:
            assert self.clocks() == before, "a refused call restarts no clock"
            self.forget_ended()
            return
        for lease, relative in zip(granted.leases[1:], relatives, strict=True):
            assert relative is None or lease.port == granted.leases[0].port + relative
        self.owe(granted.leases)

    def clocks(self):
        times = self.world.service.view
        return {lease.id: times(lease, ADMIN).expires_at for lease in self.world.table if lease.lifetime == "ttl"}

    def owe(self, leases):
        """Record what was answered: it is owed until an event says otherwise."""
        for lease in leases:
            self.answered[lease.id] = lease
            if lease.state != "ended":
                self.owed[lease.id] = lease
        self.forget_ended()

    @rule(data=st.data(), what=st.sampled_from(["release", "decline", "drain", "renew", "prolong"]))
    def change(self, data, what):
        if not self.owed:
            return
        lease = self.owed[data.draw(st.sampled_from(sorted(self.owed)))]
        caller = self.world.caller(uid=0, admin=True)
        service = self.world.service
        calls = {"release": (), "decline": (), "drain": (not lease.drain,), "renew": (None,), "prolong": (60.0,)}
        call = service.renew if what == "prolong" else getattr(service, what)
        try:
            changed = self.run(call(lease.id, caller, *calls[what]))
        except Refusal:
            self.forget_ended()
            return
        if changed is not None:
            self.owe([changed])
        self.forget_ended()

    @rule(data=st.data(), seconds=st.sampled_from([7.0, 90.0]))
    def renewal_meets_the_deadline(self, data, seconds):
        """A renewal is on its way to the disk while the clock runs out."""
        leases = sorted(lease.id for lease in self.world.table if lease.lifetime == "ttl")
        if not leases or self.world.journal.problem:
            return
        lease_id = data.draw(st.sampled_from(leases))

        async def race():
            self.world.store.gate.clear()
            renewal = asyncio.create_task(self.world.service.renew(lease_id, ADMIN, seconds))
            for _ in range(3):
                await asyncio.sleep(0)
            self.world.pass_time(5.0)
            self.world.store.gate.set()
            renewed = await renewal
            await self.world.settle()
            assert self.world.table.get(lease_id) is not None, "it was answered, and ended all the same"
            return renewed

        try:
            self.owe([self.run(race())])
        except Refusal:
            self.forget_ended()

    @rule(pid=st.sampled_from(PIDS))
    def exit(self, pid):
        if self.world.processes.is_running(pid):
            self.do(self.world.processes.end, pid)
            self.forget_ended()

    @rule(pid=st.sampled_from(PIDS), port=st.sampled_from(PORTS))
    def process_listens(self, pid, port):
        """A child, or the server that put itself into the background, listens on: its lease passes to it."""
        if self.world.processes.is_running(pid):
            self.world.listening[port] = pid

    @rule(port=st.sampled_from(PORTS))
    def nobody_listens(self, port):
        self.world.listening.pop(port, None)

    @rule(data=st.data())
    def listener_appears_within_the_cooldown(self, data):
        """A server that forked before it listened: its ended lease is taken up again."""
        if self.lapsed:
            lease = data.draw(st.sampled_from(sorted(self.lapsed, key=lambda lease: lease.revision)))
            self.do(self.world.service.observe_exit, lease, self.world.successor(lease))
            self.forget_ended()

    @rule(data=st.data(), pid=st.sampled_from(PIDS))
    def transfer(self, data, pid):
        if not self.owed or not self.world.processes.is_running(pid):
            return
        lease = self.owed[data.draw(st.sampled_from(sorted(self.owed)))]
        try:
            self.run(self.world.service.transfer(lease.id, self.world.caller(uid=0, pid=pid, admin=True), pid))
        except Refusal:
            return
        self.forget_ended()

    @rule(pid=st.sampled_from(PIDS), port=st.sampled_from(PORTS), service=st.sampled_from("ab"))
    def adopt(self, pid, port, service):
        if not self.world.processes.is_running(pid):
            return
        request = LeaseRequest(service=service, port=port, adopt=True)
        try:
            [lease] = self.run(self.world.ask([request], pid=pid, uid=0, admin=True)).leases
        except Refusal:
            return
        self.adopted.add(service)
        self.owe([lease])
        assert lease.state == "bound"
        self.forget_ended()

    @rule(data=st.data(), uid=st.sampled_from([0, 1000, 65534]), exe=st.sampled_from(["/bin/fake", "/bin/other"]))
    def owner_changes_user_and_listens(self, data, uid, exe):
        """What memcached -u, setpriv and every setuid program do."""
        leases = [
            lease
            for lease in self.world.table
            if lease.process is not None and self.world.processes.is_alive(lease.process)
        ]
        if not leases:
            return
        lease = data.draw(st.sampled_from(sorted(leases, key=lambda lease: lease.id)))
        owner = self.world.processes.change(lease.process.pid, uid=uid, exe=exe)
        state = data.draw(st.sampled_from(["bound", "held", "conflict"]))
        self.do(self.world.engine.observer.observe_state, lease.id, state, None if state == "held" else owner)
        self.forget_ended()

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0]))
    def pass_time(self, seconds):
        self.do(self.world.pass_time, seconds)
        self.forget_ended()

    @rule(port=st.sampled_from(PORTS))
    def foreign_listener_appears_or_exits(self, port):
        place = Binding("tcp", "127.0.0.1", port)
        if place in self.world.foreign:
            self.world.foreign.discard(place)
        elif self.world.holds.is_free(*place):
            self.world.foreign.add(place)

    @rule(failing=st.sampled_from(["", "", "unavailable"]))
    def disk(self, failing):
        self.world.store.failing = failing

    @invariant()
    def what_was_answered_is_unless_a_later_event_says_otherwise(self):
        for lease_id, answered in list(self.answered.items()):
            lease = self.world.table.get(lease_id)
            if lease is None:
                assert lease_id in self.ended, f"{lease_id} is gone, and no event says so"
                del self.answered[lease_id]
            else:
                assert answered.state != "ended" or lease.revision > answered.revision
                assert lease == answered or lease.revision > answered.revision

    @invariant()
    def a_lease_reported_as_ended_stays_ended(self):
        assert not set(self.ended) & {lease.id for lease in self.world.table}

    @invariant()
    def a_service_has_one_user(self):
        for service in "ab":
            users = {lease.user for lease in self.world.table if lease.service == service and lease.uid in USERS}
            assert len(users) <= 1 or self.has_lease_by_admin(service)

    def has_lease_by_admin(self, service):
        """Return whether root leased for another user's process."""
        return service in self.adopted

    @rule(outcome=st.sampled_from(["lost", "unknown"]), service=st.sampled_from("ab"))
    def commit_is_lost(self, outcome, service):
        """The daemon stops, and recovers from what the disk says, whatever that is."""
        self.world.store.failing = outcome
        try:
            self.run(self.world.grant(service=service, ttl=5.0))
        except StoreUnavailable:
            pass
        except Refusal:
            return
        finally:
            self.world.store.failing = ""
        self.forget_ended()
        self.replica.crash(self.world.store)
        self.run(self.world.restart())
        self.forget_ended()

    @rule(meanwhile=st.sets(st.sampled_from(PIDS)))
    def kill_and_restart(self, meanwhile):
        """Owners die while the daemon is down."""
        self.forget_ended()
        self.replica.catch_up(self.world)
        self.run(self.world.kill())
        self.replica.crash(self.world.store)
        for pid in meanwhile:
            if self.world.processes.is_running(pid):
                self.world.processes.vanish(pid)
        self.run(self.world.restart())
        self.forget_ended()

    @rule(events_kept=st.integers(1, 5))
    def prune(self, events_kept):
        self.run(self.world.store.prune(0.0, events_kept))

    @rule()
    def follower_lists_again(self):
        self.replica.list_again(self.world)

    @invariant()
    def no_two_leases_are_in_each_others_way(self):
        for one, other in itertools.combinations(self.world.table, 2):
            assert not conflicts(binding_of(one), binding_of(other)), f"{one.id} and {other.id} on {one.port}"

    @invariant()
    def what_was_answered_is_there(self):
        live = {lease.id for lease in self.world.table}
        assert set(self.owed) <= live

    @invariant()
    def holds_and_watches_are_those_of_live_leases(self):
        live = {lease.id: lease for lease in self.world.table}
        statics = self.world.engine.statics.held
        assert set(self.world.holds.held) - set(live) == statics, "a static port that nobody leases is held"
        for lease_id, (place, _) in self.world.holds.held.items():
            if lease_id in statics:
                continue
            assert place == binding_of(live[lease_id])
        watched = {lease.process for lease in live.values() if lease.lifetime != "ttl"}
        assert self.world.processes.watched_count == len(watched)

    @invariant()
    def indexes_equal_those_rebuilt_from_the_leases(self):
        rebuilt = LeaseTable()
        rebuilt.restore(self.world.table, self.world.table.revision)
        assert self.world.table.indexes() == rebuilt.indexes()

    @invariant()
    def the_pool_adds_up(self):
        count = self.world.allocator.count("default")
        assert count.used + count.cooling + count.declined + count.free == count.size == len(PORTS)
        assert count.used == len({lease.port for lease in self.world.table} & set(PORTS))

    @invariant()
    def a_followers_replay_equals_the_listing(self):
        self.replica.catch_up(self.world)
        leases = dict(self.replica.leases)
        for event in self.world.feed.unconfirmed():
            if event.revision > self.replica.revision:
                leases[event.lease.id] = event.lease
                if event.type == "ended":
                    del leases[event.lease.id]
        assert leases == {lease.id: lease for lease in self.world.table}

    @invariant()
    def revisions_only_grow(self):
        assert self.revisions == sorted(set(self.revisions))


TestSimulation = Simulation.TestCase
TestSimulation.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
