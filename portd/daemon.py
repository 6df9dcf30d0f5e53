"""The daemon: the order of start and stop, signals, and how a failure becomes one line and an exit status.

Start: the store with its lock, what it remembers, holds and owners, then the listeners. Stop: the listeners first, then
requests under way, the store last. Leases stay for the next start. `wiring` builds the parts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from portd import __version__, wiring
from portd.adapters import systemd
from portd.adapters.kernel import descriptors
from portd.adapters.sqlite.store import History, SqliteStore
from portd.config import MIB, Paths, Settings, load, system_paths, user_paths
from portd.core.errors import ConfigError, Fault, StateInUse, StateUnusable, StoreDamaged, StoreLost
from portd.core.failpoints import failpoint
from portd.listeners import describe_listener, is_off, open_listeners, split_dns
from portd.logs import set_up
from portd.pruning import prune_regularly
from portd.runtime import arm_failpoints, run, tune_gc
from portd.wiring import Parts

logger = logging.getLogger("portd")

FINISH_S: Final = 1.0
"""Seconds that a stop gives to requests under way, goodbyes included."""
DRAIN_S: Final = 0.4
"""Seconds that the disk then has to write what is left."""
STOP_S: Final = 1.9
"""Seconds after which a stop ends the process, whatever still hangs; two are promised."""

EXIT_STATUS: Final[tuple[tuple[type[Fault], int], ...]] = (
    (ConfigError, os.EX_CONFIG),
    (StoreDamaged, os.EX_DATAERR),
    (StateUnusable, os.EX_CANTCREAT),
    (StateInUse, os.EX_UNAVAILABLE),
    (StoreLost, os.EX_SOFTWARE),
)
"""Exit statuses (sysexits.h) by the fault that ended the daemon. The unit starts it again for all but EX_CONFIG."""
FIXED: Final = ("listen", "pools", "own_addresses", "static", "store", "mdns", "dns", "compat", "cluster", "auth")
"""Sections that need a restart."""


class Daemon:
    """One portd. `run` returns after SIGTERM or SIGINT, and raises a Fault when the daemon can't go on."""

    def __init__(self, settings: Settings, paths: Paths, config_path: str | None) -> None:
        self._settings = settings
        self._paths = paths
        self._config_path = config_path
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Start, serve until SIGTERM or SIGINT, stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._begin_stop)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)  # until there is something to reconfigure
        descriptors.raise_fd_limit()
        store_path = Path(self._settings.store.path or self._paths.store)
        setting = self._settings.store
        history = History(setting.history_mib * MIB, setting.history_mib_per_user * MIB)
        store = await SqliteStore.open(store_path, setting.durability, history)
        for note in store.notes:
            logger.error("%s", note)
        try:
            await self._run_on(store)
        except StoreLost:
            raise  # closing may hang on the disk
        except BaseException:
            await store.close()
            raise
        await store.close()

    async def _run_on(self, store: SqliteStore) -> None:
        passed = systemd.passed_sockets()
        kept_holds = passed.pop(systemd.PARCELS, [])
        parts = wiring.build(self._settings, self._paths, store, await store.load(), kept_holds)
        try:
            await self._serve(parts, [listener for sockets in passed.values() for listener in sockets])
        except BaseExceptionGroup as group:
            # Not `except*`: Python 3.11.2 wraps what is raised in it in a group once more.
            raise _fault_of(group) or group from None

    def _begin_stop(self) -> None:
        _limit_stop()
        self._stop.set()

    async def _serve(self, parts: Parts, passed: list[socket.socket]) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload, parts)
        engine, watchers = parts.engine, parts.watchers
        of_dns, others = split_dns(self._settings, passed)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(part)
                for part in (
                    engine.journal.run(),
                    engine.clock.run(),
                    watchers.states.run(),
                    watchers.prober.run(),
                    prune_regularly(engine.store, engine.journal, engine.table, self._settings.store),
                    systemd.feed_watchdog(),
                )
            ]
            if watchers.cluster is not None:
                background.append(tasks.create_task(watchers.cluster.run()))
            if self._settings.mdns.enabled:
                await watchers.announcer.start()
            with suppress(OSError):  # a DNS port that is taken is reported in the status: leases matter more
                await watchers.dns.start(of_dns)
            for server in parts.fronts.compat:
                await server.start()
            addresses = await self._listen(parts, others)
            failpoint("start.listening")
            tune_gc()
            systemd.notify("READY=1", f"STATUS={len(engine.table)} leases")
            logger.info("portd %s serves %s", __version__, ", ".join(addresses))
            await self._stop.wait()
            systemd.notify("STOPPING=1")
            await self._close(parts)
            for task in background:
                task.cancel()

    async def _listen(self, parts: Parts, passed: list[socket.socket]) -> list[str]:
        """Serve every listener; returns the addresses of HTTP.

        All are opened before any is served: a start that fails keeps nobody waiting. Raises StateInUse.
        """
        opened = open_listeners(self._settings, self._paths, passed)
        fronts = parts.fronts
        await fronts.http.start(fronts.fast_path)
        addresses = []
        for listener in (*passed, *opened):
            if is_off(self._settings, listener):
                logger.warning(
                    "%s is disabled in [listen], but the service manager opens it: connections are closed; disable it "
                    "in portd.socket too",
                    describe_listener(listener),
                )
                systemd.turn_away(listener)
            elif listener.type == socket.SOCK_SEQPACKET:
                fronts.handoff.serve(listener)
            else:
                await fronts.http.serve(listener, fronts.tls if listener.family != socket.AF_UNIX else None)
                addresses.append(describe_listener(listener, "https" if fronts.tls else "http"))
        return addresses

    async def _close(self, parts: Parts) -> None:
        """Stop accepting, finish the requests under way, then stop every part."""
        engine = parts.engine
        logger.info("stopping; %d leases stay for the next start", len(engine.table))
        with suppress(TimeoutError):
            async with asyncio.timeout(FINISH_S):
                await self._finish_requests(parts)
        await engine.journal.drain(DRAIN_S)
        engine.leases.close()
        engine.processes.close()
        for one in engine.inspections:
            one.close()
        try:
            if count := wiring.store_holds(engine.holds):
                logger.info("%d holds are kept for the next start", count)
        except OSError as error:
            logger.warning("held ports are open to everybody until the next start: %s", error)
        engine.holds.close()
        engine.diag.close()

    async def _finish_requests(self, parts: Parts) -> None:
        watchers, fronts = parts.watchers, parts.fronts
        await fronts.http.stop_accepting()
        for server in fronts.compat:
            await server.close()
        if self._settings.mdns.enabled:
            await watchers.announcer.close()
        watchers.prober.close()
        await fronts.handoff.close()
        fronts.events.close()
        watchers.feed.close()
        await fronts.http.close()
        await watchers.dns.close()

    def _reload(self, parts: Parts) -> None:
        """Apply the settings that can change while running, and log which can't."""
        try:
            fresh = load(self._config_path, self._paths)
        except Fault as error:
            logger.error("the configuration is not reloaded: %s", error)
            return
        wiring.reconfigure(parts, fresh)
        set_up(fresh.log.level, fresh.log.format)
        fixed = [name for name in FIXED if getattr(fresh, name) != getattr(self._settings, name)]
        if fixed:
            logger.warning("these sections changed and need a restart: %s", ", ".join(fixed))
        logger.info("configuration reloaded: [leases], [services], [health] and [log] apply now")


def main(config_path: str | None = None, user: bool | None = None, check_config: bool = False) -> int:
    """Run the daemon (or only check its configuration); returns the exit status.

    `user` None: a user's daemon unless root runs it.
    """
    is_user = os.geteuid() != 0 if user is None else user
    try:
        paths = user_paths() if is_user else system_paths()
        settings = load(config_path, paths)
    except Fault as error:
        print(f"portd: {one_line(error)}", file=sys.stderr)
        return 1 if check_config else _exit_status(error)  # a check's clear no, as of every other command
    if check_config:
        print(f"{config_path or paths.config}: fine")
        return os.EX_OK
    set_up(settings.log.level, settings.log.format)
    arm_failpoints(os.environ.get("PORTD_FAILPOINTS", ""))
    try:
        run(Daemon(settings, paths, config_path).run())
    except StoreLost as error:
        logger.critical("%s; starting over recovers from the disk", one_line(error))
        logging.shutdown()
        os._exit(os.EX_SOFTWARE)  # the store's thread may hang on the disk
    except Fault as error:
        logger.critical("%s", one_line(error))
        return _exit_status(error)
    except Exception:
        logger.critical("portd stops after an internal error; please report it", exc_info=True)
        return os.EX_SOFTWARE
    return os.EX_OK


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())


def _exit_status(fault: Fault) -> int:
    return next((status for kind, status in EXIT_STATUS if isinstance(fault, kind)), os.EX_SOFTWARE)


def _limit_stop() -> None:
    """End the process STOP_S from now, from a thread: neither the loop nor the store's thread may keep it alive."""

    def end() -> None:
        logger.warning("the stop takes more than %g s (a disk that hangs?): ending at once", STOP_S)
        logging.shutdown()
        os._exit(os.EX_OK)

    timer = threading.Timer(STOP_S, end)
    timer.daemon = True
    timer.start()


def _fault_of(group: BaseExceptionGroup[BaseException]) -> Fault | None:
    """Return the first Fault in a group, however deep, or None."""
    for error in group.exceptions:
        found = _fault_of(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, Fault):
            return found
    return None
