"""The composition root: builds the parts, runs them in one TaskGroup, starts and stops them in order.

Only this module knows everybody. Start: the store's lock, what it remembers, holds and owners, then the doors; stop: the
doors first, then what is under way, the store last. Leases stay for the next start.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import uvloop

from portd import __version__
from portd.adapters import systemd
from portd.adapters.clock import LeaseClock
from portd.adapters.dns.server import DnsServer
from portd.adapters.handoff import HandoffServer
from portd.adapters.http.events import EventCalls
from portd.adapters.http.fastlane import FastLane
from portd.adapters.http.gate import Gate
from portd.adapters.http.lan import LanCalls
from portd.adapters.http.leases import LeaseCalls
from portd.adapters.http.openapi import openapi_route
from portd.adapters.http.ports import PortCalls
from portd.adapters.http.server import HttpServer
from portd.adapters.http.services import ServiceCalls
from portd.adapters.http.status import StatusCalls, pool_status
from portd.adapters.kernel import descriptors, procfs
from portd.adapters.kernel.holds import KernelHolds
from portd.adapters.kernel.listeners import KernelSocketTable
from portd.adapters.kernel.netlink import SocketDiag
from portd.adapters.kernel.peers import KernelPeers
from portd.adapters.kernel.processes import KernelProcesses
from portd.adapters.kernel.states import StateWatch
from portd.adapters.mdns.announcer import Announcer
from portd.adapters.metrics import Metrics
from portd.adapters.probes.prober import Prober
from portd.adapters.sqlite.store import SqliteStore
from portd.config import Paths, Settings, http_addresses, load, pool_ports, split_host_port, system_paths, user_paths
from portd.core.allocator import Allocator, StaticPort
from portd.core.errors import Fault, StoreLost, StoreUnavailable
from portd.core.model import Event, Lease
from portd.core.table import LeaseTable
from portd.leasing.deciding import Granter, Policy, hash_token
from portd.leasing.feed import EVENTS_KEPT, Feed
from portd.leasing.journal import Journal
from portd.leasing.service import LeaseService
from portd.listeners import describe_listener, is_off, open_listeners
from portd.logs import LeaseLog, set_up

logger = logging.getLogger("portd")

STOP_TIMEOUT_S: Final = 1.0
"""Seconds that a stop gives to what is under way; two are promised for the whole of it."""
PRUNE_LOOK_S: Final = 10.0
PRUNE_LOOKS: Final = 360
"""Looks between two rounds of forgetting, where little happens: an hour."""
PRUNE_EVENTS: Final = 10 * EVENTS_KEPT
"""Events that make it worth forgetting sooner, about 50 MB: ten seconds of nothing but grants."""
DAY_S: Final = 86_400.0
EXIT_FAULT: Final = 70
"""Exit status of a daemon that gave itself up (sysexits.h, EX_SOFTWARE): the unit starts it again."""


class Daemon:
    """One portd. `run` returns when it has been told to stop, and raises a Fault when it can't go on."""

    def __init__(self, settings: Settings, paths: Paths, config_path: str | None) -> None:
        self._settings = settings
        self._paths = paths
        self._config_path = config_path
        self._started_at = time.monotonic()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Start, serve until SIGTERM or SIGINT, stop."""
        descriptors.take_all()
        store_path = Path(self._settings.store.path or self._paths.store)
        self._metrics = Metrics(self._gauges)
        self._store = await SqliteStore.open(store_path, self._settings.store.durability, self._metrics.commit)
        try:
            await self._build()
            await self._serve()
        finally:
            await self._store.close()

    # --- building ---

    async def _build(self) -> None:
        settings = self._settings
        self._passed = systemd.passed_sockets()
        loaded = await self._store.load()
        self._clock = LeaseClock()
        self._diag = SocketDiag(lambda: self._holds.inodes())
        self._sockets = KernelSocketTable(self._diag)
        self._holds = KernelHolds(self._diag.bound)
        self._processes = KernelProcesses()
        self._table = LeaseTable()
        self._allocator = Allocator(
            {name: pool_ports(pool) for name, pool in settings.pools.items()},
            [
                StaticPort(name, static.port, static.protocol, static.address)
                for name, static in settings.static.items()
            ],
            settings.own_block,
            settings.leases.cooldown,
        )
        self._journal = Journal(self._table, self._store, self._clock)
        if problem := self._store.condition()["problem"]:
            self._journal.mark_unwritable(problem)
        granter = Granter(self._table, self._allocator, self._holds, self._processes, policy(settings))
        self._service = LeaseService(
            self._table, self._allocator, self._journal, granter, self._store, self._holds, self._processes, self._clock
        )
        self._feed = Feed()
        self._watch = StateWatch(
            self._sockets, self._table.on_port, lambda: len(self._table), self._service.observe_state
        )
        self._announcer = Announcer(
            host_name(),
            self._service.observe_announcement,
            responder=settings.mdns.responder,
            interfaces=settings.mdns.interfaces,
        )
        self._prober = Prober(
            self._clock,
            self._service.observe_health,
            concurrency=settings.health.concurrency,
            allow_commands=settings.health.allow_commands,
            on_result=self._metrics.check,
        )
        self._service.report_to_probes = self._prober.reported
        self._dns = DnsServer(
            [split_host_port(settings.dns.listen)] if settings.dns.listen else [],
            settings.dns.zone,
            settings.dns.ttl,
            self._metrics.query,
        )
        watchers = [self._metrics.apply, self._feed.apply, self._prober.apply, self._on_event, LeaseLog().apply]
        if settings.dns.listen:
            watchers.append(self._dns.apply)
        if settings.mdns.enabled:
            watchers.append(self._announcer.apply)
        for watcher in watchers:
            self._journal.subscribe(watcher)
        self._adopt_holds(loaded.live)
        self._journal.subscribe_durable(self._feed.confirm)
        self._feed.restore(loaded)
        self._service.restore(loaded, procfs.boot_id())  # publishes what it observes: after the feed has its past
        self._watch.restore(self._table)
        self._dns.restore(self._table, self._table.revision)
        self._prober.restore(self._table)
        if settings.mdns.enabled:
            self._announcer.restore(self._table)
        self._http = self._make_http()

    def _adopt_holds(self, leases: Iterable[Lease]) -> None:
        """Take over the holds of the last run, before any can be missed; those of no lease any more are closed."""
        kept = systemd.unpack(self._passed.pop(systemd.PARCELS, []))
        for lease in leases:
            sockets = kept.pop(lease.id, [])
            if sockets and all(held.getsockname()[1] == lease.port for held in sockets):
                self._holds.adopt(lease.id, sockets)
        for sockets in kept.values():
            for stray in sockets:
                stray.close()

    def _store_holds(self) -> None:
        """Leave the holds to the service manager, so that nobody gets their ports before the next start.

        UDP sockets that were handed over are not among them: they are their owners', and need no keeper.
        """
        ours = self._holds.inodes()
        owned = [
            (lease_id, held)
            for lease_id, sockets in self._holds.held()
            for part, held in sockets.items()
            if part == "tcp" or os.fstat(held.fileno()).st_ino in ours
        ]
        try:
            if systemd.store(owned):
                logger.info("%d holds are kept for the next start", len(owned))
        except OSError as error:
            logger.warning("held ports are open to everybody until the next start: %s", error)

    def _make_http(self) -> HttpServer:
        settings = self._settings
        tokens = {bytes.fromhex(token.sha256): token.admin for token in settings.auth.tokens}
        names = {host_name(), socket.getfqdn(), *(host for host, _ in http_addresses(settings, self._paths))}
        peers = KernelPeers(self._diag.exact)
        gate = Gate(peers, settings.auth.admin_group, tokens, names)
        self._handoff = HandoffServer(self._service, self._holds, gate.unix_caller, self._watch.wake)
        http = HttpServer(gate, hash_token, lambda: self._table.revision)
        self._events = EventCalls(self._feed)
        status = StatusCalls(
            self._service,
            {
                "store": self._store_condition,
                "mdns": self._mdns_condition,
                "dns": self._dns_condition,
                "cluster": lambda: {"enabled": bool(settings.cluster.engine), "problem": None},
            },
            self._facts,
            self._metrics.render,
            self._warnings,
        )
        leases = LeaseCalls(self._service)
        self._fast_lane = FastLane(gate, self._service, leases, hash_token)
        routes = [
            route
            for calls in (
                leases,
                ServiceCalls(self._service, self._feed, self._announcer.lan),
                self._events,
                PortCalls(self._service, self._sockets),
                LanCalls(self._announcer.lan),
                status,
            )
            for route in calls.routes()
        ]
        http.add([*routes, openapi_route(routes)])
        return http

    # --- running ---

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(part)
                    for part in (
                        self._journal.run(),
                        self._clock.run(),
                        self._watch.run(),
                        self._prober.run(),
                        self._prune(),
                        systemd.feed_watchdog(),
                    )
                ]
                if self._settings.mdns.enabled:
                    await self._announcer.start()
                with suppress(OSError):  # a port 8600 that is taken is no reason to serve nobody: the status says so
                    await self._dns.start()
                places = await self._open_doors()
                self._settle_memory()
                systemd.notify("READY=1", f"STATUS={len(self._table)} leases")
                logger.info("portd %s serves %s", __version__, ", ".join(places))
                await self._stop.wait()
                systemd.notify("STOPPING=1")
                await self._close()
                for task in background:
                    task.cancel()
        except* Fault as faults:
            raise faults.exceptions[0] from None

    async def _open_doors(self) -> list[str]:
        """Serve every socket; returns where HTTP is. All are there before any is served: a start that fails keeps
        nobody waiting."""
        passed = [one for sockets in self._passed.values() for one in sockets]
        opened = open_listeners(self._settings, self._paths, passed)
        await self._http.start(self._fast_lane)
        tls = _tls(self._settings)
        places = []
        for listener in (*passed, *opened):
            if is_off(self._settings, listener):
                logger.warning(
                    "%s is turned off in [listen], but the service manager opens it: whoever comes is "
                    "turned away; turn it off in portd.socket too",
                    describe_listener(listener),
                )
                systemd.turn_away(listener)
            elif listener.type == socket.SOCK_SEQPACKET:
                self._handoff.serve(listener)
            else:
                await self._http.serve(listener, tls if listener.family != socket.AF_UNIX else None)
                places.append(describe_listener(listener, "https" if tls else "http"))
        return places

    async def _close(self) -> None:
        """Close the doors, let what is under way come to its end, then stop."""
        logger.info("stopping; %d leases stay for the next start", len(self._table))
        await self._http.shut()
        if self._settings.mdns.enabled:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._announcer.close(), STOP_TIMEOUT_S)
        self._prober.close()
        await self._handoff.close()
        self._events.close()
        self._feed.close()
        await self._http.close()
        await self._dns.close()
        await self._journal.drain(STOP_TIMEOUT_S)
        self._service.close()
        self._processes.close()
        self._store_holds()
        self._holds.close()
        self._diag.close()

    async def _prune(self) -> None:
        while True:
            pruned_at = self._table.revision
            try:
                await self._store.prune(time.time() - self._settings.store.history_days * DAY_S, EVENTS_KEPT)
            except StoreUnavailable as error:
                self._journal.mark_unwritable(error.detail)
            for _ in range(PRUNE_LOOKS):
                await asyncio.sleep(PRUNE_LOOK_S)
                if self._table.revision - pruned_at >= PRUNE_EVENTS:
                    break

    def _reload(self) -> None:
        """Take up what can change while running, and say what can't."""
        try:
            fresh = load(self._config_path, self._paths)
        except Fault as error:
            logger.error("the configuration is not taken up: %s", error)
            return
        self._service.granter.policy = policy(fresh)
        self._allocator.cooldown_s = fresh.leases.cooldown
        self._prober.concurrency = fresh.health.concurrency
        self._prober.allow_commands = fresh.health.allow_commands
        set_up(fresh.log.level, fresh.log.format)
        fixed = [
            name
            for name in (
                "listen",
                "pools",
                "own_addresses",
                "static",
                "store",
                "mdns",
                "dns",
                "compat",
                "cluster",
                "auth",
            )
            if getattr(fresh, name) != getattr(self._settings, name)
        ]
        if fixed:
            logger.warning("these sections changed and need a restart: %s", ", ".join(fixed))
        logger.info("configuration read again: [leases], [health] and [log] are taken up")

    def _on_event(self, event: Event) -> None:
        if event.type in ("granted", "declined"):
            self._watch.wake()

    def _settle_memory(self) -> None:
        """What is there now stays: the garbage collector need not look at it again. What comes later is mostly freed
        without it, so it looks less often than by default (700, 10, 10): a twentieth of a grant's time."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)

    # --- what the daemon says of itself ---

    def _store_condition(self) -> dict[str, Any]:
        condition = self._store.condition()
        return {**condition, "problem": self._journal.problem or condition["problem"]}

    def _mdns_condition(self) -> dict[str, Any]:
        return {"enabled": True, **self._announcer.condition()} if self._settings.mdns.enabled else {"enabled": False}

    def _dns_condition(self) -> dict[str, Any]:
        return {"enabled": True, **self._dns.condition()} if self._settings.dns.listen else {"enabled": False}

    def _facts(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self._started_at, 3),
            "counts": {
                "connections": self._http.connection_count,
                "followers": self._events.stream_count,
                "processes": self._processes.watched_count,
            },
        }

    def _warnings(self) -> list[str]:
        lost = self._clock.lost_s
        return [f"portd did not run for {lost:.1f} s in all; every ttl lease got that back"] if lost else []

    def _gauges(self) -> Iterable[tuple[str, str, tuple[str, ...], Mapping[tuple[str, ...], float]]]:
        states = Counter((lease.state,) for lease in self._table)
        pools = pool_status(self._service)
        parts: dict[tuple[str, ...], float] = {
            (name, part): float(getattr(pool, part))
            for name, pool in pools.items()
            for part in ("used", "held", "cooling", "declined", "free")
        }
        none: tuple[str, ...] = ()
        return [
            ("portd_leases", "Live leases by state.", ("state",), {key: float(n) for key, n in states.items()}),
            ("portd_pool_ports", "Ports of a pool by what they are used for.", ("pool", "use"), parts),
            ("portd_revision", "The newest revision.", none, {none: float(self._table.revision)}),
            (
                "portd_watched_processes",
                "Owners whose exit is waited for.",
                none,
                {none: float(self._processes.watched_count)},
            ),
            ("portd_http_connections", "Open connections.", none, {none: float(self._http.connection_count)}),
            ("portd_event_followers", "Followers of the event stream.", none, {none: float(self._events.stream_count)}),
            ("portd_uptime_seconds", "Since the start.", none, {none: time.monotonic() - self._started_at}),
        ]


def policy(settings: Settings) -> Policy:
    """Make the part of the settings that grants are judged by."""
    return Policy(
        settings.leases.max_ttl,
        settings.leases.quota_per_uid,
        settings.leases.hold,
        frozenset(settings.health.allow_commands),
        host_name(),
    )


def host_name() -> str:
    """Return this host's name, without its domain."""
    return socket.gethostname().partition(".")[0] or "localhost"


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if not settings.listen.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.listen.tls_cert, settings.listen.tls_key)
    return context


def main(config_path: str | None = None, user: bool | None = None, check_config: bool = False) -> int:
    """Run the daemon (or only check its configuration); returns the exit status.

    `user` None: a user's daemon unless root runs it.
    """
    is_user = os.geteuid() != 0 if user is None else user
    paths = user_paths() if is_user else system_paths()
    try:
        settings = load(config_path, paths)
    except Fault as error:
        print(f"portd: {error}", file=sys.stderr)
        return 2
    if check_config:
        print(f"{config_path or paths.config}: fine")
        return 0
    set_up(settings.log.level, settings.log.format)
    try:
        uvloop.run(Daemon(settings, paths, config_path).run())
    except StoreLost as error:
        logger.critical("%s; starting over recovers from the disk", error)
        logging.shutdown()
        os._exit(EXIT_FAULT)  # the store's thread may hang on the disk: don't wait for it
    except Fault as error:
        logger.critical("%s", error)
        return 1
    return 0
