"""Publishes through a running avahi-daemon over D-Bus: a host has one responder (RFC 6762 section 15).

One entry group a service, so that withdrawing one does not disturb the others. Avahi sends the goodbyes when portd
leaves the bus, killed or not. Packets are not known here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from dbus_fast import BusType, DBusError, Message, MessageFlag, MessageType
from dbus_fast.aio import MessageBus
from dbus_fast.errors import AuthError, InvalidAddressError

from portd.adapters.mdns.interfaces import list_interfaces
from portd.adapters.mdns.responder import ReportOutcome
from portd.adapters.mdns.zone import Entry, HostName, Service
from portd.core.announcing import parse_type

log = logging.getLogger("portd.mdns")

AVAHI = "org.freedesktop.Avahi"
_GROUP = f"{AVAHI}.EntryGroup"
_DBUS = "org.freedesktop.DBus"
_ESTABLISHED, _COLLISION, _FAILURE = 2, 3, 4
_ANY = -1
"""AVAHI_IF_UNSPEC and AVAHI_PROTO_UNSPEC: every interface that Avahi uses, IPv4 and IPv6."""
CALLS_AT_ONCE = 16
"""D-Bus calls in flight: Avahi serves one after another, and its other clients wait behind portd's."""
CALL_S = 10.0


class AvahiBus:
    """The connection to avahi-daemon, and whether that runs. `on_presence` is called at each change."""

    def __init__(self, address: str | None = None, on_presence: Callable[[bool], None] = lambda _: None) -> None:
        self._address = address
        self._bus: MessageBus | None = None
        self._watching: asyncio.Task[None] | None = None
        self.on_presence = on_presence
        self.on_group_state: Callable[[str, int, str], None] = lambda path, state, error: None
        self.is_present = False

    @property
    def is_connected(self) -> bool:
        """Return whether there is a bus."""
        return self._bus is not None and self._bus.connected

    async def connect(self) -> None:
        """Connect to the system bus and ask whether avahi-daemon runs; raises OSError when there is no bus."""
        self.disconnect()
        try:
            bus = await MessageBus(bus_address=self._address, bus_type=BusType.SYSTEM).connect()
        except (OSError, AuthError, InvalidAddressError, DBusError, EOFError) as error:
            raise OSError(f"no D-Bus: {error}") from error
        self._bus = bus
        bus.add_message_handler(self._on_message)
        try:
            for rule in (
                f"type='signal',sender='{_DBUS}',member='NameOwnerChanged',arg0='{AVAHI}'",
                f"type='signal',sender='{AVAHI}',interface='{_GROUP}',member='StateChanged'",
            ):
                await self._call(_DBUS, "/org/freedesktop/DBus", _DBUS, "AddMatch", "s", rule)
            (self.is_present,) = await self._call(_DBUS, "/org/freedesktop/DBus", _DBUS, "NameHasOwner", "s", AVAHI)
            self._watching = asyncio.get_running_loop().create_task(self._watch(bus))
        except DBusError as error:
            self.disconnect()
            raise OSError(f"D-Bus refused portd: {error}") from error

    def disconnect(self) -> None:
        """Leave the bus: Avahi then withdraws all that was published over it. May be called twice."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if self._bus is not None:
            self._bus.remove_message_handler(self._on_message)
            self._bus.disconnect()
            self._bus = None
        self.is_present = False

    async def call(self, path: str, interface: str, member: str, signature: str = "", *body: Any) -> list[Any]:
        """Call avahi-daemon; raises DBusError if it refuses, OSError if it can't be reached."""
        return await self._call(AVAHI, path, interface, member, signature, *body)

    async def _call(self, name: str, path: str, interface: str, member: str, signature: str, *body: Any) -> list[Any]:
        if self._bus is None:
            raise OSError("not connected to D-Bus")
        message = Message(
            destination=name,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            flags=MessageFlag.NO_AUTOSTART,
        )
        try:
            reply = await asyncio.wait_for(self._bus.call(message), CALL_S)
        except (TimeoutError, EOFError) as error:
            raise OSError(f"{name} does not answer") from error
        if reply is None:
            raise OSError("D-Bus is gone")
        if reply.message_type is MessageType.ERROR:
            raise DBusError(reply.error_name or f"{_DBUS}.Error.Failed", str(reply.body[0] if reply.body else ""))
        return list(reply.body)

    async def _watch(self, bus: MessageBus) -> None:
        """Wait until the connection to the bus ends: then Avahi is out of reach, whether it runs or not."""
        with suppress(Exception):  # whatever ends the connection, it has ended
            await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]
        self._watching = None
        self.disconnect()
        self.on_presence(False)

    def _on_message(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        if message.member == "NameOwnerChanged" and message.body[0] == AVAHI:
            self.is_present = bool(message.body[2])
            self.on_presence(self.is_present)
        elif message.member == "StateChanged" and message.interface == _GROUP:
            state, error = message.body
            self.on_group_state(message.path or "", state, error)


class AvahiResponder:
    """A Responder that publishes through avahi-daemon. `bus` is connected; its creator disconnects it."""

    def __init__(self, bus: AvahiBus, report: ReportOutcome, interfaces: Sequence[str] = ()) -> None:
        self._bus = bus
        self._report = report
        self._interfaces = interfaces
        self._groups: dict[str, _Group] = {}
        self._by_path: dict[str, _Group] = {}
        self._names: dict[str, _Group] = {}
        self._turn = asyncio.Semaphore(CALLS_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._problem: str | None = None
        self._version = ""
        self.host_name = ""
        self.addresses: tuple[str, ...] = ()

    async def start(self) -> None:
        """Start; raises OSError when avahi-daemon does not answer."""
        try:
            (self._version,) = await self._bus.call("/", f"{AVAHI}.Server", "GetVersionString")
            (self.host_name,) = await self._bus.call("/", f"{AVAHI}.Server", "GetHostNameFqdn")
        except DBusError as error:
            raise OSError(f"avahi-daemon does not answer: {error}") from error
        self._bus.on_group_state = self._change

    async def close(self, *, takeover: bool) -> None:
        """Stop; Avahi withdraws everything when portd leaves the bus, and keeps nothing for a takeover."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._bus.on_group_state = lambda path, state, error: None
        self._by_path.clear()
        self._groups.clear()

    def publish(self, service: Service, name: str) -> None:
        """Publish, or change in place."""
        group = self._groups.get(service.id)
        if group is None:
            group = self._groups[service.id] = _Group(service, name)
            self._spawn(self._register(group))
        elif (group.service.type, group.service.name) != (service.type, service.name):
            self.withdraw(service.id)
            self.publish(service, name)
        elif group.service != service:
            before, group.service = group.service, service
            is_txt_alone = (before.port, before.address) == (service.port, service.address)
            self._spawn(self._update_txt(group) if is_txt_alone else self._register(group))

    def withdraw(self, service_id: str) -> None:
        """Withdraw; nothing happens when the id is unknown."""
        group = self._groups.pop(service_id, None)
        if group is not None:
            group.is_wanted = False
            if self._names.get(group.key) is group:
                del self._names[group.key]
            self._spawn(self._free(group))

    def retract(self, service: Service) -> None:
        """Do nothing: Avahi withdrew what an earlier daemon published when that daemon left the bus."""

    def condition(self) -> dict[str, object]:
        """Return what status shows."""
        return {
            "responder": "avahi",
            "version": self._version,
            "host_name": self.host_name,
            "announced": sum(group.published_as is not None for group in self._groups.values()),
            "problem": self._problem,
        }

    async def _register(self, group: _Group) -> None:
        async with group.lock, self._turn:
            if not group.is_wanted:
                return
            try:
                if group.path is None:
                    (group.path,) = await self._bus.call("/", f"{AVAHI}.Server", "EntryGroupNew")
                    self._by_path[group.path] = group
                else:
                    await self._bus.call(group.path, _GROUP, "Reset")
                group.published_as = None
                await self._add(group, group.path)
            except (DBusError, OSError) as error:
                self._fail(group, f"avahi-daemon refused it: {error}")

    async def _add(self, group: _Group, path: str) -> None:
        """Add the service to its group under the first name that this host does not use yet, and commit."""
        while True:
            self._claim_name(group)
            base, subtype = parse_type(group.service.type)
            txt = [f"{key}={value}".encode() for key, value in group.service.txt]
            try:
                for link in self._links(group.service.address):
                    where = (link, _ANY, 0, group.entry.name, base, "")
                    await self._bus.call(path, _GROUP, "AddService", "iiussssqaay", *where, "", group.service.port, txt)
                    if subtype is not None:
                        await self._bus.call(
                            path, _GROUP, "AddServiceSubtype", "iiussss", *where, f"{subtype}._sub.{base}"
                        )
                await self._bus.call(path, _GROUP, "Commit")
            except DBusError as error:
                if error.type != f"{AVAHI}.CollisionError":
                    raise
                group.entry.rename()
                await self._bus.call(path, _GROUP, "Reset")
            else:
                return

    def _claim_name(self, group: _Group) -> None:
        """Rename until no other service of portd has the name: Avahi sees no conflict between two that are equal."""
        if self._names.get(group.key) is group:
            del self._names[group.key]
        while group.entry.key in self._names:
            group.entry.rename()
        group.key = group.entry.key
        self._names[group.key] = group

    def _links(self, address: str) -> list[int]:
        """Return the interfaces to publish on: all of Avahi's, unless the configuration or the address limits them."""
        if not self._interfaces and address in ("0.0.0.0", "::"):
            return [_ANY]
        links = [link.index for link in list_interfaces(self._interfaces or ("*",)).values() if link.has(address)]
        if not links:
            raise OSError(f"no network interface that is up has the address {address}")
        return links

    async def _update_txt(self, group: _Group) -> None:
        async with group.lock, self._turn:
            if not group.is_wanted or group.path is None:
                return
            base, _ = parse_type(group.service.type)
            txt = [f"{key}={value}".encode() for key, value in group.service.txt]
            try:
                for link in self._links(group.service.address):
                    await self._bus.call(
                        group.path,
                        _GROUP,
                        "UpdateServiceTxt",
                        "iiusssaay",
                        link,
                        _ANY,
                        0,
                        group.entry.name,
                        base,
                        "",
                        txt,
                    )
            except (DBusError, OSError) as error:
                self._fail(group, f"avahi-daemon refused its TXT: {error}")

    async def _free(self, group: _Group) -> None:
        async with group.lock, self._turn:
            if group.path is not None:
                self._by_path.pop(group.path, None)
                with suppress(DBusError, OSError):
                    await self._bus.call(group.path, _GROUP, "Free")

    def _change(self, path: str, state: int, error: str) -> None:
        group = self._by_path.get(path)
        if group is None or not group.is_wanted:
            return
        if state == _ESTABLISHED:
            self._problem = None
            name, requested = group.entry.name, group.service.name
            if group.published_as != name:
                group.published_as = name
                self._report(
                    group.service.id,
                    name,
                    None if name == requested else f"{requested!r} is in use on the LAN: published as {name!r}",
                )
        elif state == _COLLISION:
            group.entry.rename()
            self._spawn(self._register(group))
        elif state == _FAILURE:
            self._fail(group, f"avahi-daemon could not publish it: {error}")

    def _fail(self, group: _Group, problem: str) -> None:
        self._problem = problem
        if group.is_wanted:
            group.published_as = None
            self._report(group.service.id, None, problem)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("publishing through avahi-daemon failed", exc_info=error)
            self._problem = f"publishing through avahi-daemon failed: {error!r}"


class _Group:
    """An entry group and the service in it."""

    def __init__(self, service: Service, name: str) -> None:
        self.service = service
        self.entry = Entry(service, name, HostName(""))
        self.key = ""
        self.path: str | None = None
        self.published_as: str | None = None
        self.is_wanted = True
        self.lock = asyncio.Lock()
