"""The conformance suite's driver of the blocking client; its protocol is in clients/conformance/README.md."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import portd_client
from portd_client import errors
from portd_client.protocol import Request

Arguments = dict[str, Any]
_writing = threading.Lock()


def tell(**message: Any) -> None:
    """Write one line."""
    with _writing:
        print(json.dumps(message), flush=True)


class Messages(logging.Handler):
    """Turns what the client logs into events."""

    def emit(self, record: logging.LogRecord) -> None:
        """Report a message as a warning."""
        tell(event="warning", message=record.getMessage())


def failure(error: Exception) -> dict[str, Any]:
    """Say what kind of error it is."""
    made: dict[str, Any] = {"message": str(error)}
    if isinstance(error, errors.Problem):
        made |= {"code": error.code, "status": error.status, "pointer": error.pointer}
        return {"kind": "lease_lost" if isinstance(error, errors.LeaseLost) else "problem", **made}
    if isinstance(error, errors.DaemonUnavailable):
        timed_out = isinstance(error, errors.NoAnswerInTime)
        return {"kind": "timeout" if timed_out else "daemon_unavailable", "tried": error.tried, **made}
    if isinstance(error, errors.ProtocolError):
        return {"kind": "daemon_unavailable", "tried": [], **made}
    return {"kind": "no_instances" if isinstance(error, portd_client.NoInstances) else "usage", **made}


def shown_lease(handle: str, lease: Any) -> dict[str, Any]:
    """Describe a lease."""
    return {
        "handle": handle,
        "lease": lease.id or None,
        "service": lease.service,
        "instance": lease.instance,
        "endpoint": lease.endpoint,
        "protocol": lease.protocol,
        "address": lease.address,
        "port": lease.port,
        "revision": lease.document.get("revision"),
        "is_adopted": lease.is_adopted,
        "is_fallback": lease.is_fallback,
        "is_passed": lease.is_passed,
    }


def shown_instance(instance: portd_client.Instance) -> dict[str, Any]:
    """Describe an instance."""
    return {"host": instance.host, "port": instance.port, "instance": instance.name, "is_stale": instance.is_stale}


def question(arguments: Arguments) -> Arguments:
    """Read what a look-up asks for."""
    tag = arguments.pop("tag", None)
    return {**arguments, **({"tags": [tag]} if tag else {})}


def remaining() -> int:
    """Count what is left: threads that are not the driver's own, and sockets."""
    threads = sum(thread.name.startswith("portd ") for thread in threading.enumerate())
    sockets = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            sockets += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return threads + sockets


class Calls:
    """One method a call."""

    def __init__(self) -> None:
        self._client: portd_client.Client | None = None
        self._handles: dict[str, Any] = {}
        self._listeners: dict[str, list[socket.socket]] = {}
        self._unwatched: set[str] = set()
        logging.getLogger("portd_client").addHandler(Messages())

    @property
    def client(self) -> portd_client.Client:
        """Return the client: of the environment, unless `connect` was called."""
        if self._client is None:
            self._client = portd_client.Client()
        return self._client

    def connect(self, arguments: Arguments) -> Any:
        self._client = portd_client.Client(arguments.pop("url", None), **arguments)
        next(self._client.leases(limit=1), None)
        return {"url": self._client.url}

    def lease(self, arguments: Arguments) -> Any:
        handle, held = self._lease(arguments)
        return shown_lease(handle, held)

    def listen(self, arguments: Arguments) -> Any:
        backlog = arguments.pop("backlog", 128)
        handle = arguments.get("handle") or self._lease(arguments)[0]
        held = self._handles[handle]
        try:
            self._listeners[handle] = held.sockets(backlog)
        except BaseException:
            if "handle" not in arguments:
                held.release()
            raise
        for listener in self._listeners[handle]:
            if listener.type == socket.SOCK_STREAM:
                threading.Thread(target=serve, args=[listener], daemon=True).start()
        return shown_lease(handle, held)

    def _lease(self, arguments: Arguments) -> tuple[str, Any]:
        handle = f"l{len(self._handles) + 1}"
        held = portd_client.lease(
            client=self.client,
            on_change=lambda lease: tell(event="changed", handle=handle, port=lease.port, lease=lease.id),
            on_lost=lambda _, error: tell(event="lost", handle=handle, code=getattr(error, "code", "")),
            **arguments,
        )
        self._handles[handle] = held
        return handle, held

    def call(self, arguments: Arguments) -> Any:
        try:
            return {"status": 200, "body": self.client.call(Request(**{"target": arguments.pop("path"), **arguments}))}
        except errors.Problem as error:
            return {"status": error.status, "body": error.document}

    def renew(self, arguments: Arguments) -> Any:
        self._handles[arguments["handle"]].renew(arguments.get("seconds"))

    def decline(self, arguments: Arguments) -> Any:
        held = self._handles[arguments["handle"]]
        held.decline()
        return shown_lease(arguments["handle"], held)

    def transfer(self, arguments: Arguments) -> Any:
        self._handles[arguments["handle"]].transfer(arguments["pid"])

    def change(self, arguments: Arguments) -> Any:
        self._handles[arguments["handle"]].change(arguments["fields"])

    def events(self, arguments: Arguments) -> Any:
        """Return the first event after a revision that has the wanted name."""
        events = self.client.events(arguments["after"], arguments["service"])
        for event in events:
            if event.name == arguments["name"]:
                lease = event.data["lease"]["id"]
                return {"name": event.name, "revision": event.revision, "lease": lease}
        return None

    def release(self, arguments: Arguments) -> Any:
        self._release(arguments["handle"])

    def _release(self, handle: str) -> None:
        self._handles[handle].release()
        for listener in self._listeners.pop(handle, []):
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept()
            listener.close()

    def drain(self, arguments: Arguments) -> Any:
        self._handles[arguments["handle"]].drain()

    def report(self, arguments: Arguments) -> Any:
        self._handles[arguments["handle"]].report(arguments["status"], arguments.get("output", ""))

    def resolve(self, arguments: Arguments) -> Any:
        return shown_instance(portd_client.resolve(client=self.client, **question(arguments)))

    def resolve_all(self, arguments: Arguments) -> Any:
        found = portd_client.resolve_all(client=self.client, **question(arguments))
        return {"instances": [shown_instance(one) for one in found]}

    def watch(self, arguments: Arguments) -> Any:
        handle = f"w{len(self._handles) + 1}"
        self._handles[handle] = answers = portd_client.watch(client=self.client, **question(arguments))
        threading.Thread(target=self._follow, args=[handle, answers], daemon=True).start()
        return {"handle": handle}

    def _follow(self, handle: str, answers: Iterable[list[portd_client.Instance]]) -> None:
        for instances in answers:
            if handle in self._unwatched:
                return
            tell(
                event="instances",
                handle=handle,
                is_stale=any(one.is_stale for one in instances),
                instances=[shown_instance(one) for one in instances],
            )

    def unwatch(self, arguments: Arguments) -> Any:
        self._unwatched.add(arguments["handle"])

    def keep_quiet(self) -> None:
        """Leave the sockets to the exit, which is to give everything back: Python would warn of them."""
        for listeners in self._listeners.values():
            for one in listeners:
                one.detach()

    def close(self, arguments: Arguments) -> Any:
        for handle, held in self._handles.items():
            if isinstance(held, portd_client.Lease):
                self._release(handle)
        return {"remaining": remaining()}


def serve(listener: socket.socket) -> None:
    """Greet whoever connects, until the listener is closed."""
    with suppress(OSError):
        while True:
            with listener.accept()[0] as caller:
                caller.sendall(f"{sys.argv[1]}\n".encode())


def main() -> None:
    """Answer calls, one after another, until the end of input."""
    made = Calls()
    portd_client.release_on_signal()
    for line in sys.stdin:
        message = json.loads(line)
        try:
            tell(id=message["id"], result=getattr(made, message["call"])(message["with"]) or {})
        except (portd_client.PortdError, TypeError, ValueError, OSError) as error:
            tell(id=message["id"], error=failure(error))
    made.keep_quiet()


if __name__ == "__main__":
    main()
