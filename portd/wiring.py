"""Wiring: builds the parts and connects them. The only module that imports all parts; it decides nothing else.

`build` makes the parts from the settings and what the store remembers, `reconfigure` applies what can change while they
run. A new part is added here, and to the order of start and stop in `daemon.py`.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from msgspec.structs import replace

from portd import __version__
from portd.adapters import systemd
from portd.adapters.availability import Availability
from portd.adapters.clock import LeaseClock
from portd.adapters.consul.server import ConsulServer
from portd.adapters.dns.server import DnsServer
from portd.adapters.etcd.addresses import advertised, login
from portd.adapters.etcd.session import EtcdSession
from portd.adapters.handoff import HandoffServer
from portd.adapters.http.authenticator import Authenticator, Token
from portd.adapters.http.events import EventCalls
from portd.adapters.http.fast_path import FastPath
from portd.adapters.http.hosts import HostCalls
from portd.adapters.http.lan import LanCalls
from portd.adapters.http.leases import LeaseCalls
from portd.adapters.http.names import NameCalls
from portd.adapters.http.openapi import openapi_route
from portd.adapters.http.pages import PageCalls
from portd.adapters.http.ports import PortCalls
from portd.adapters.http.problems import render_problem
from portd.adapters.http.revisions import Revisions
from portd.adapters.http.server import HttpServer
from portd.adapters.http.services import ServiceCalls
from portd.adapters.http.status import StatusCalls
from portd.adapters.kernel import inspection, procfs
from portd.adapters.kernel.holds import KernelHolds
from portd.adapters.kernel.listeners import KernelSocketTable
from portd.adapters.kernel.netlink import SocketDiag
from portd.adapters.kernel.peers import KernelPeers
from portd.adapters.kernel.processes import KernelProcesses
from portd.adapters.kernel.states import StateWatch
from portd.adapters.mdns.announcer import Announcer
from portd.adapters.metrics import Metrics
from portd.adapters.portserver.grpc import GrpcPortServer
from portd.adapters.portserver.portpicker import PortpickerServer
from portd.adapters.probes.prober import Prober
from portd.adapters.sqlite.store import SqliteStore
from portd.adapters.users import ListedUsers
from portd.cluster.entries import HostEntry
from portd.cluster.naming import as_unique
from portd.cluster.publisher import Publisher
from portd.cluster.view import Seen, View
from portd.condition import Condition
from portd.config import (
    Paths,
    Settings,
    consul_addresses,
    dns_addresses,
    http_addresses,
    pool_ports,
    split_host_port,
)
from portd.core.bindings import ranges_of
from portd.core.errors import ConfigError
from portd.core.failpoints import failpoint
from portd.core.model import LABEL_PATTERN, Event, Lease
from portd.core.rights import hash_token
from portd.core.static_ports import StaticPort
from portd.core.table import LeaseTable
from portd.core.visibility import WhenAllCritical
from portd.leasing.engine import LeaseEngine, build_engine
from portd.leasing.feed import Feed
from portd.leasing.foreign_processes import ForeignProcesses
from portd.leasing.journal import Journal
from portd.leasing.policy import Policy
from portd.leasing.seams import Loaded
from portd.logs import LeaseLog, RefusalLog


@dataclass(frozen=True)
class Engine:
    """The lease engine, and the parts of the world that it works on."""

    store: SqliteStore
    clock: LeaseClock
    diag: SocketDiag
    sockets: KernelSocketTable
    holds: KernelHolds
    processes: KernelProcesses
    table: LeaseTable
    journal: Journal
    leases: LeaseEngine
    inspections: inspection.Inspections


@dataclass(frozen=True)
class Watchers:
    """The parts that live off the engine's events; none of them can undo a lease."""

    metrics: Metrics
    feed: Feed
    states: StateWatch
    prober: Prober
    announcer: Announcer
    dns: DnsServer
    log: LeaseLog
    availability: Availability
    when_all_critical: dict[str, WhenAllCritical]
    cluster: EtcdSession | None


@dataclass(frozen=True)
class Fronts:
    """The parts that callers speak to."""

    authenticator: Authenticator
    http: HttpServer
    fast_path: FastPath
    events: EventCalls
    handoff: HandoffServer
    compat: tuple[PortpickerServer | GrpcPortServer | ConsulServer, ...]
    tls: ssl.SSLContext | None


@dataclass(frozen=True)
class Parts:
    """All parts of a daemon, connected and restored, none of them serving yet."""

    engine: Engine
    watchers: Watchers
    fronts: Fronts


def build(
    settings: Settings, paths: Paths, store: SqliteStore, loaded: Loaded, kept_holds: list[socket.socket]
) -> Parts:
    """Build every part and restore it from what the store remembers.

    `kept_holds` are parcels of holds of the last run (`systemd.unpack`). Raises ConfigError for a certificate that
    can't be loaded.
    """
    tls = _tls(settings)
    engine = _engine(settings, store, inspection.choose(paths.inspector))
    watchers = _watchers(settings, engine, _cluster(settings, loaded.store_id))
    _subscribe(settings, engine, watchers)
    _adopt_holds(engine.holds, loaded.live, kept_holds)
    engine.leases.restore(loaded, procfs.boot_id())
    watchers.states.restore(engine.table)
    watchers.dns.restore(engine.table, engine.table.revision)
    watchers.prober.restore(engine.table)
    watchers.availability.restore(engine.table, engine.clock.now().at)
    if watchers.cluster is not None:
        watchers.cluster.restore(list(engine.table))
        _show_other_hosts(settings, engine, watchers, watchers.cluster)
    if settings.mdns.enabled:
        watchers.announcer.restore(engine.table)
    failpoint("start.restored")
    return Parts(engine, watchers, _fronts(settings, paths, engine, watchers, tls, loaded.store_id))


def reconfigure(parts: Parts, settings: Settings) -> None:
    """Apply the settings that can change while the daemon runs: [leases], [services] and [health]."""
    parts.engine.leases.reconfigure(policy(settings), settings.leases.cooldown)
    parts.watchers.when_all_critical.clear()
    parts.watchers.when_all_critical.update(_when_all_critical(settings))
    parts.watchers.dns.forget_answers()
    parts.watchers.prober.set_concurrency(settings.health.concurrency)
    parts.watchers.prober.allow_commands = settings.health.allow_commands


def policy(settings: Settings) -> Policy:
    """Make the part of the settings that grants are judged by."""
    return Policy(
        settings.leases.max_ttl,
        settings.leases.quota_per_uid,
        settings.leases.hold,
        frozenset(settings.health.allow_commands),
        settings.cluster.node or host_name(),
        os.geteuid(),
        settings.leases.names == "shared",
        ListedUsers({name: service.users for name, service in settings.services.items()}).lists,
        procfs.unprivileged_from(),
    )


def host_name() -> str:
    """Return this host's name, without its domain."""
    return socket.gethostname().partition(".")[0] or "localhost"


def store_holds(holds: KernelHolds) -> int:
    """Leave the holds to the service manager, so that nobody gets their ports before the next start.

    Returns how many were stored. Raises OSError at a limit of descriptors.
    """
    owned = list(holds.unclaimed())
    return len(owned) if systemd.store(owned) else 0


def _engine(settings: Settings, store: SqliteStore, inspections: inspection.Inspections) -> Engine:
    clock = LeaseClock()
    diag = SocketDiag(lambda: holds.inodes())
    holds = KernelHolds(diag.bound)
    processes = KernelProcesses(inspections.loop)
    leases = build_engine(
        pools={name: pool_ports(pool) for name, pool in settings.pools.items()},
        statics=_static_ports(settings),
        own_block=settings.own_block,
        cooldown_s=settings.leases.cooldown,
        policy=policy(settings),
        store=store,
        holds=holds,
        processes=processes,
        clock=clock,
    )
    if problem := store.condition()["problem"]:
        leases.journal.mark_unwritable(problem)
    sockets = KernelSocketTable(diag, inspections.states)
    return Engine(store, clock, diag, sockets, holds, processes, leases.table, leases.journal, leases, inspections)


def _cluster(settings: Settings, store_id: str) -> EtcdSession | None:
    """Build the session with etcd; None where no cluster is configured. Raises ConfigError.

    The database's id tells two hosts of one name apart: a machine id is the same in cloned images, and for several
    daemons of one machine.
    """
    cluster = settings.cluster
    if not cluster.engine:
        return None
    node = cluster.node or host_name().lower()
    if not re.match(LABEL_PATTERN, node):
        raise ConfigError(f"cluster.node: the host name {node!r} is not a name of a-z, 0-9 and '-': set [cluster] node")
    advertise = advertised(cluster.advertise, cluster.endpoints)
    about = HostEntry(store_id, procfs.boot_id(), advertise[0] if advertise else "", __version__)
    identity = login(
        cluster.tls_ca,
        cluster.tls_cert,
        cluster.tls_key,
        cluster.user,
        cluster.password_file,
        is_tls=any(url.startswith("https://") for url in cluster.endpoints),
    )
    view = View(node, cluster.ttl, cluster.follow)
    return EtcdSession(cluster.endpoints, identity, Publisher(node, about, advertise), view, cluster.ttl)


def _show_other_hosts(settings: Settings, engine: Engine, watchers: Watchers, cluster: EtcdSession) -> None:
    """Have long polls and DNS follow what changes on other hosts."""

    def show(seen: list[Seen]) -> None:
        for service in {one.lease.service for one in seen}:
            engine.journal.touch(service)
        if settings.dns.listen:
            for one in seen:
                lease = as_unique(one.lease)
                shown = replace(lease, state="ended") if one.is_gone else lease
                watchers.dns.apply(Event(engine.table.revision, "updated", engine.clock.now().at, shown))

    cluster.on_seen = show


def _watchers(settings: Settings, engine: Engine, cluster: EtcdSession | None) -> Watchers:
    leases, table = engine.leases, engine.table
    metrics = Metrics()
    panic = _when_all_critical(settings)
    engine.store.subscribe(metrics.commit)
    prober = Prober(
        engine.clock,
        leases.observer.observe_health,
        concurrency=settings.health.concurrency,
        allow_commands=settings.health.allow_commands,
        on_result=metrics.check,
        find_endpoint=table.named,
    )
    leases.service.report_to_probes = prober.reported
    leases.queries.last_result = prober.last
    states = StateWatch(
        engine.sockets,
        table.on_port,
        lambda: len(table),
        leases.observer.observe_state,
        leases.observer.observe_exit,
        leases.observer.observe_owner,
        cooldown_s=settings.leases.cooldown,
        inspection=engine.inspections.loop,
    )
    leases.adopter.find_listeners = engine.sockets.find_listeners
    leases.service.explain = ForeignProcesses(KernelSocketTable(engine.diag, engine.inspections.ports)).explain
    leases.passing.find_successors = states.succession.owners_exited
    return Watchers(
        metrics,
        leases.feed,
        states,
        prober,
        Announcer(
            host_name(),
            leases.observer.observe_announcement,
            responder=settings.mdns.responder,
            interfaces=settings.mdns.interfaces,
        ),
        DnsServer(
            dns_addresses(settings),
            settings.dns.zone,
            settings.dns.ttl,
            metrics.query,
            lambda service: panic.get(service, "none"),
        ),
        LeaseLog(),
        Availability(),
        panic,
        cluster,
    )


def _when_all_critical(settings: Settings) -> dict[str, WhenAllCritical]:
    """Return what a service gives when all its instances are critical, of those that the configuration names."""
    return {name: service.when_all_critical for name, service in settings.services.items()}


def _subscribe(settings: Settings, engine: Engine, watchers: Watchers) -> None:
    """Have the watchers called with every event; the order here is the order of the calls."""

    subscribed: list[Callable[[Event], None]] = [
        watchers.metrics.apply,
        watchers.prober.apply,
        watchers.states.apply,
        watchers.log.apply,
        watchers.availability.apply,
    ]
    if settings.dns.listen:
        subscribed.append(watchers.dns.apply)
    if settings.mdns.enabled:
        subscribed.append(watchers.announcer.apply)
    if watchers.cluster is not None:
        subscribed.append(watchers.cluster.apply)
    for watcher in subscribed:
        engine.journal.subscribe(watcher)


def _fronts(
    settings: Settings,
    paths: Paths,
    engine: Engine,
    watchers: Watchers,
    tls: ssl.SSLContext | None,
    store_id: str,
) -> Fronts:
    service, queries = engine.leases.service, engine.leases.queries
    authenticator = _authenticator(settings, paths, engine)
    refusals = RefusalLog()
    http = HttpServer(authenticator, lambda: engine.table.revision, store_id, refusals.record)
    revisions = Revisions(store_id)
    events = EventCalls(watchers.feed, revisions)
    leases = LeaseCalls(service, queries)
    compat = _compat(settings, engine, authenticator, refusals)
    condition = Condition(
        settings,
        engine.clock.started_at,
        engine.store,
        engine.journal,
        queries,
        engine.clock,
        engine.processes,
        engine.inspections.loop,
        http,
        events,
        watchers.announcer,
        watchers.dns,
        watchers.prober,
        watchers.availability,
        compat,
        watchers.cluster,
    )
    watchers.metrics.gauges = condition.gauges
    panic = watchers.when_all_critical
    parts = (
        leases,
        ServiceCalls(
            queries,
            watchers.feed,
            watchers.announcer.lan,
            revisions,
            lambda name: panic.get(name, "none"),
            watchers.cluster,
        ),
        HostCalls(queries, watchers.cluster),
        events,
        PortCalls(queries, KernelSocketTable(engine.diag, engine.inspections.ports)),
        LanCalls(watchers.announcer.lan),
        NameCalls(queries),
        PageCalls(),
        StatusCalls(
            queries,
            condition.conditions(),
            condition.facts,
            watchers.metrics.render,
            condition.warnings,
            {name: ranges_of(pool_ports(pool)) for name, pool in settings.pools.items()},
        ),
    )
    routes = [route for calls in parts for route in calls.routes()]
    http.add([*routes, openapi_route(routes)])
    return Fronts(
        authenticator,
        http,
        FastPath(authenticator, service, leases, lambda: engine.table.revision, store_id, refusals.record),
        events,
        HandoffServer(
            service,
            queries,
            engine.holds,
            authenticator.unix_caller,
            watchers.states.wake,
            render_problem,
            refusals.record,
        ),
        compat,
        tls,
    )


def _compat(
    settings: Settings, engine: Engine, authenticator: Authenticator, refusals: RefusalLog
) -> tuple[PortpickerServer | GrpcPortServer | ConsulServer, ...]:
    """Build the servers of other programs' protocols that the configuration enables."""
    compat = settings.compat
    service = engine.leases.service
    servers: list[PortpickerServer | GrpcPortServer | ConsulServer] = []
    if compat.portserver:
        servers.append(PortpickerServer(compat.portserver, service, authenticator.unix_caller, refusals.record))
    if compat.grpc_port_server:
        address = split_host_port(compat.grpc_port_server)
        servers.append(GrpcPortServer(address, service, authenticator.tcp_caller, refusals.record))
    if addresses := consul_addresses(settings):
        consul = ConsulServer(
            addresses,
            service,
            engine.leases.queries,
            lambda request: authenticator.process_caller(request.transport),
            lambda request: authenticator.check_origin(authenticator.identify(request.transport), request.headers),
        )
        engine.journal.subscribe(consul.apply)
        servers.append(consul)
    return tuple(servers)


def _authenticator(settings: Settings, paths: Paths, engine: Engine) -> Authenticator:
    tokens = {bytes.fromhex(token.sha256): Token(token.admin, token.name) for token in settings.auth.tokens}
    names = {host_name(), socket.gethostname(), *(host for host, _ in http_addresses(settings, paths))}
    peers = KernelPeers(engine.diag.exact, engine.inspections.peers)
    authenticator = Authenticator(peers, settings.auth.admin_group, tokens, names, hash_token)
    # A name server that does not answer must delay neither the start nor the stop: nobody waits for this thread.
    threading.Thread(target=lambda: authenticator.allow_host(socket.getfqdn()), name="host name", daemon=True).start()
    return authenticator


def _static_ports(settings: Settings) -> list[StaticPort]:
    return [
        StaticPort(service, port, static.protocol, static.address, endpoint)
        for service, static in settings.static.items()
        for endpoint, port in static.endpoints.items()
    ]


def _adopt_holds(holds: KernelHolds, leases: Iterable[Lease], parcels: list[socket.socket]) -> None:
    """Adopt the holds of the last run before anything asks for them, and close those of leases that are gone."""
    kept = systemd.unpack(parcels)
    for lease in leases:
        sockets = kept.pop(lease.id, [])
        if sockets and all(held.getsockname()[1] == lease.port for held in sockets):
            holds.adopt(lease.id, sockets)
    for sockets in kept.values():
        for stray in sockets:
            stray.close()


def _tls(settings: Settings) -> ssl.SSLContext | None:
    listen = settings.listen
    if not listen.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(listen.tls_cert, listen.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"listen.tls_cert: {listen.tls_cert} with tls_key {listen.tls_key} can't be loaded: "
            f"{error.strerror or error}: both must be PEM files that portd's user may read"
        ) from error
    return context
