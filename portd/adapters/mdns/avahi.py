"""Publishes through a running avahi-daemon, by its D-Bus: one responder a host (RFC 6762 section 15.4).

One entry group a service, so that one that goes does not disturb the others. Avahi says the goodbyes when the bus loses
us, killed or not. Knows nothing of packets.
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
from portd.adapters.mdns.responder import Outcome
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
"""D-Bus calls under way: Avahi answers one after another, and its other clients wait behind ours."""
CALL_S = 10.0


class AvahiBus:
    """The way to avahi-daemon, and whether it runs. `on_presence` is called at each change."""

    def __init__(self, address: str | None = None, on_presence: Callable[[bool], None] = lambda _: None) -> None:
        self._address = address
        self._bus: MessageBus | None = None
        self._attending: asyncio.Task[None] | None = None
        self.on_presence = on_presence
        self.on_group_state: Callable[[str, int, str], None] = lambda path, state, error: None
        self.is_present = False

    @property
    def is_connected(self) -> bool:
        """Tell whether there is a bus at all."""
        return self._bus is not None and self._bus.connected

    async def connect(self) -> None:
        """Connect to the system bus and see who is there; raises OSError when there is no bus."""
        self.disconnect()
        try:
            bus = await MessageBus(bus_address=self._address, bus_type=BusType.SYSTEM).connect()
        except (OSError, AuthError, InvalidAddressError, DBusError, EOFError) as error:
            raise OSError(f"no D-Bus: {error}") from error
        self._bus = bus
        bus.add_message_handler(self._hear)
        try:
            for rule in (
                f"type='signal',sender='{_DBUS}',member='NameOwnerChanged',arg0='{AVAHI}'",
                f"type='signal',sender='{AVAHI}',interface='{_GROUP}',member='StateChanged'",
            ):
                await self._call(_DBUS, "/org/freedesktop/DBus", _DBUS, "AddMatch", "s", rule)
            (self.is_present,) = await self._call(_DBUS, "/org/freedesktop/DBus", _DBUS, "NameHasOwner", "s", AVAHI)
            self._attending = asyncio.get_running_loop().create_task(self._attend(bus))
        except DBusError as error:
            self.disconnect()
            raise OSError(f"D-Bus refuses us: {error}") from error

    def disconnect(self) -> None:
        """Leave the bus: Avahi withdraws all that was published over it. May be called twice."""
        if self._attending is not None:
            self._attending.cancel()
            self._attending = None
        if self._bus is not None:
            self._bus.remove_message_handler(self._hear)
            self._bus.disconnect()
            self._bus = None
        self.is_present = False

    async def call(self, path: str, interface: str, member: str, signature: str = "", *body: Any) -> list[Any]:
        """Call avahi-daemon; raises DBusError for what it refuses, OSError when it is not to be reached."""
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

    async def _attend(self, bus: MessageBus) -> None:
        """Wait until the bus itself goes: then Avahi is out of reach, whether it runs or not."""
        with suppress(Exception):  # whatever ends the connection, it has ended
            await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]
        self._attending = None
        self.disconnect()
        self.on_presence(False)

    def _hear(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        if message.member == "NameOwnerChanged" and message.body[0] == AVAHI:
            self.is_present = bool(message.body[2])
            self.on_presence(self.is_present)
        elif message.member == "StateChanged" and message.interface == _GROUP:
            state, error = message.body
            self.on_group_state(message.path or "", state, error)


class AvahiResponder:
    """A Responder that asks avahi-daemon to publish. `bus` is connected, and stays its creator's."""

    def __init__(self, bus: AvahiBus, outcome: Outcome, interfaces: Sequence[str] = ()) -> None:
        self._bus = bus
        self._outcome = outcome
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
        """Begin; raises OSError when avahi-daemon is not there."""
        try:
            (self._version,) = await self._bus.call("/", f"{AVAHI}.Server", "GetVersionString")
            (self.host_name,) = await self._bus.call("/", f"{AVAHI}.Server", "GetHostNameFqdn")
        except DBusError as error:
            raise OSError(f"avahi-daemon does not answer: {error}") from error
        self._bus.on_group_state = self._change

    async def close(self, *, takeover: bool) -> None:
        """Stop; Avahi withdraws everything when its creator leaves the bus, and keeps nothing for a takeover."""
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

    def condition(self) -> dict[str, object]:
        """Tell what status shows."""
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
                self._fail(group, f"avahi-daemon refuses it: {error}")

    async def _add(self, group: _Group, path: str) -> None:
        """Add the service to its group under the first name that this host does not use yet, and commit."""
        while True:
            self._take_name(group)
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

    def _take_name(self, group: _Group) -> None:
        """Rename until no other service of ours has the name: Avahi sees no conflict in two that look the same."""
        if self._names.get(group.key) is group:
            del self._names[group.key]
        while group.entry.key in self._names:
            group.entry.rename()
        group.key = group.entry.key
        self._names[group.key] = group

    def _links(self, address: str) -> list[int]:
        """Return the interfaces to publish on: all of Avahi's, unless the configuration or the address says which."""
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
                self._fail(group, f"avahi-daemon refuses its TXT: {error}")

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
            name, wish = group.entry.name, group.service.name
            if group.published_as != name:
                group.published_as = name
                self._outcome(
                    group.service.id,
                    name,
                    None if name == wish else f"{wish!r} is taken on the LAN: published as {name!r}",
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
            self._outcome(group.service.id, None, problem)

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
