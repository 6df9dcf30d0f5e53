"""The writing half: registering leases a port for the process that listens on it, and the lease ends with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import msgspec
from aiohttp import web
from msgspec.structs import replace

from portd.adapters.consul import naming
from portd.adapters.consul.reads import Reads
from portd.adapters.consul.registering import BadRegistration, Registration, plain_names, read_check, read_service
from portd.core.errors import (
    InvalidRequest,
    LeaseDiffers,
    NotFound,
    NotOwner,
    PortTaken,
    QuotaExceeded,
    Refusal,
    ServiceTaken,
)
from portd.core.model import Lease, ReportCheck
from portd.core.requests import HealthReport, LeaseRequest, PatchRequest
from portd.core.rights import Caller
from portd.leasing.service import LeaseService

logger = logging.getLogger(__name__)

REAP_EVERY_S: Final = 5.0
"""Seconds between two searches for services that have been critical for too long."""
_STATUS: Final = {
    NotOwner: 403,
    ServiceTaken: 403,
    NotFound: 404,
    InvalidRequest: 400,
    PortTaken: 409,
    QuotaExceeded: 429,
}
_WORDS: Final = {"pass": "passing", "warn": "warning", "fail": "critical"}

CallerOf = Callable[[web.Request], Any]


class Writes:
    """Handlers of the PUT half. `caller_of` identifies the process at the other end, asynchronously."""

    def __init__(self, service: LeaseService, reads: Reads, caller_of: CallerOf) -> None:
        self._service = service
        self._reads = reads
        self._caller_of = caller_of

    def routes(self) -> list[tuple[str, Callable[[web.Request], Any]]]:
        """Return path and handler of each call."""
        handlers = [
            ("/v1/agent/service/register", self._register),
            ("/v1/agent/service/deregister/{id}", self._deregister),
            ("/v1/agent/service/maintenance/{id}", self._maintenance),
            ("/v1/agent/check/register", self._check_register),
            ("/v1/agent/check/deregister/{id}", self._check_deregister),
            ("/v1/agent/check/update/{id}", self._check_update),
            *((f"/v1/agent/check/{word}/{{id}}", self._check_report) for word in _WORDS),
        ]
        return [(path, self._answering(handler)) for path, handler in handlers]

    def _answering(self, handler: Callable[[web.Request, Caller], Any]) -> Callable[[web.Request], Any]:
        """Wrap a handler: 200 with no body, or the refusal as Consul words it, a line of text."""

        async def answer(request: web.Request) -> web.Response:
            try:
                caller = await self._caller_of(request)
                await handler(request, caller)
            except BadRegistration as error:
                return web.Response(status=400, text=f"{error}\n")
            except Refusal as refusal:
                return web.Response(status=_STATUS.get(type(refusal), 500), text=f"{refusal.detail}\n")
            return web.Response()

        return answer

    # --- services ---

    async def _register(self, request: web.Request, caller: Caller) -> None:
        registration = read_service(await _body(request))
        existing = self._reads.by_id(registration.request.metadata[naming.ID_KEY])  # type: ignore[index]
        if existing is not None and existing.lease.port != registration.request.port:
            await self._service.release(existing.lease.id, caller)
            existing = None
        lease = await self._lease(registration, caller, None if existing is None else existing.lease)
        if registration.status in _WORDS.values() and isinstance(lease.check, ReportCheck):
            await self._service.report(lease.id, caller, HealthReport(status=registration.status))  # type: ignore[arg-type]

    async def _lease(self, registration: Registration, caller: Caller, existing: Lease | None) -> Lease:
        request = registration.request
        if existing is not None:
            patch = PatchRequest(tags=request.tags, metadata=request.metadata, check=request.check)
            return await self._service.patch(existing.id, caller, patch)
        try:
            return await self._grant(replace(request, adopt=True, exact=False), caller)
        except (InvalidRequest, NotFound) as refusal:
            if refusal.pointer == "/address":
                raise
        # Nobody listens yet: the port is held for the caller until it does.
        return await self._grant(request, caller)

    async def _grant(self, request: LeaseRequest, caller: Caller) -> Lease:
        try:
            return (await self._service.grant([request], caller)).leases[0]
        except LeaseDiffers as refusal:
            raise PortTaken(refusal.detail, pointer=refusal.pointer) from refusal

    async def _deregister(self, request: web.Request, caller: Caller) -> None:
        await self._service.release(self._by_id(request).id, caller)

    async def _maintenance(self, request: web.Request, caller: Caller) -> None:
        enable = request.query.get("enable", "").lower()
        if enable not in ("true", "false"):
            raise BadRegistration("enable must be true or false")
        await self._service.drain(self._by_id(request).id, caller, enable == "true")

    def _by_id(self, request: web.Request) -> Lease:
        service_id = request.match_info["id"]
        found = self._reads.by_id(service_id)
        if found is None:
            raise NotFound(
                f'Unknown service ID "{service_id}". Ensure that the service ID is passed, not the service name.'
            )
        return found.lease

    # --- checks ---

    async def _check_register(self, request: web.Request, caller: Caller) -> None:
        document = await _body(request)
        service_id = plain_names(document).get("serviceid")
        found = self._reads.by_id(str(service_id)) if service_id else None
        if found is None:
            raise BadRegistration("ServiceID must name a registered service: portd checks leased ports")
        lease = found.lease
        if lease.check is not None and naming.check_id(lease) not in (document.get("ID"), document.get("CheckID")):
            raise BadRegistration(f"service {service_id} has a check already: portd makes one for each service")
        check, more, _ = read_check(document, lease.port)
        await self._service.patch(lease.id, caller, PatchRequest(check=check, metadata=lease.metadata | more))

    async def _check_deregister(self, request: web.Request, caller: Caller) -> None:
        await self._service.patch(self._checked(request).id, caller, PatchRequest(check=None))

    async def _check_report(self, request: web.Request, caller: Caller) -> None:
        word = request.path.split("/")[4]
        await self._report(request, caller, _WORDS[word], request.query.get("note", ""))

    async def _check_update(self, request: web.Request, caller: Caller) -> None:
        fields = plain_names(await _body(request))
        status = str(fields.get("status", ""))
        await self._report(request, caller, _WORDS.get(status, status), str(fields.get("output", "")))

    async def _report(self, request: web.Request, caller: Caller, status: str, note: str) -> None:
        if status not in _WORDS.values():
            raise BadRegistration(f"Status {status!r} is not passing, warning or critical")
        report = HealthReport(status=status, note=note[:4096])  # type: ignore[arg-type]
        await self._service.report(self._checked(request).id, caller, report)

    def _checked(self, request: web.Request) -> Lease:
        check_id = request.match_info["id"]
        for each in self._reads.all():
            if each.lease.check is not None and naming.check_id(each.lease) == check_id:
                return each.lease
        raise NotFound(f'Unknown check ID "{check_id}". Ensure that the check ID is passed, not the check name.')

    # --- DeregisterCriticalServiceAfter ---

    async def reap(self) -> None:
        """End leases that have been critical for longer than their registration allows; runs until it is cancelled."""
        operator = Caller(uid=0, known_by="peercred", admin=True)
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            now = time.time()
            for each in self._reads.all():
                lease = each.lease
                after_s = float(lease.metadata.get(naming.DEREGISTER_KEY) or "inf")
                if lease.health == "critical" and lease.health_since is not None and now - lease.health_since > after_s:
                    logger.info("%s has been critical for %g s: its lease ends", lease.instance, after_s)
                    with suppress(Refusal):
                        await self._service.release(lease.id, operator)


async def _body(request: web.Request) -> Any:
    try:
        return msgspec.json.decode(await request.read())
    except msgspec.DecodeError as error:
        raise BadRegistration(f"Request decode failed: {error}") from error
