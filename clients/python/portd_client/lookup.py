"""Finding other services: one working instance at a time, or all changes as they come.

The last answer is kept for a while, so that a daemon that restarts takes nobody's neighbours away; what comes from
memory says so (`is_stale`).
"""

from __future__ import annotations

from random import choice
from time import monotonic, sleep

from . import steps
from .client import Client
from .errors import DaemonUnavailable, PortdError, ProtocolError, Retryable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .types import Instances, LeaseDocument, Scope

STALE_MAX_S = 300.0
"""Seconds that an answer is good for while no daemon answers; ports of processes that live do not change by then."""
WAIT_S = 55.0
"""Seconds of one long poll: proxies cut what is silent for a minute."""
LAN_WAIT_S = 5.0
"""Seconds of one long poll that looks at the LAN too: the daemon is woken by changes of its own leases alone."""
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class NoInstances(PortdError):
    """No instance of the service works now."""


class Instance:
    """One working instance. `is_stale`: the daemon is away, and this is what it said last."""

    __slots__ = ("document", "is_stale")

    def __init__(self, document: LeaseDocument, *, is_stale: bool = False) -> None:
        self.document = document
        self.is_stale = is_stale

    @property
    def name(self) -> str:
        """Return the instance's name."""
        return self.document["instance"]

    @property
    def host(self) -> str:
        """Return the address to connect to."""
        return reachable_host(self.document["address"])

    @property
    def port(self) -> int:
        """Return the port to connect to."""
        return self.document["port"]

    @property
    def address(self) -> tuple[str, int]:
        """Return (host, port), as socket.create_connection takes it."""
        return self.host, self.port

    @property
    def authority(self) -> str:
        """Return host:port, as a URL takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def tags(self) -> list[str]:
        """Return the tags."""
        return self.document.get("tags", [])

    @property
    def metadata(self) -> dict[str, str]:
        """Return the metadata."""
        return self.document.get("metadata", {})

    def __repr__(self) -> str:
        return f"<{self.name} at {self.authority}{' (stale)' if self.is_stale else ''}>"


def reachable_host(address: str) -> str:
    """Return the address that reaches a listener of this host: a wildcard listens on loopback as well."""
    return WILDCARDS.get(address, address)


class Memory:
    """The last answer for each question."""

    def __init__(self) -> None:
        self._answers: dict[tuple[object, ...], tuple[float, Instances]] = {}

    def keep(self, question: tuple[object, ...], answer: Instances) -> list[Instance]:
        """Remember an answer, and return its instances."""
        self._answers[question] = (monotonic(), answer)
        return [Instance(document) for document in answer["instances"]]

    def recall(self, question: tuple[object, ...], error: PortdError) -> list[Instance]:
        """Return what was said last, marked as stale; raises `error` when that is too long ago, or nothing was."""
        at, answer = self._answers.get(question, (float("-inf"), None))
        if answer is None or monotonic() - at > STALE_MAX_S:
            raise error
        return [Instance(document, is_stale=True) for document in answer["instances"]]


_memory = Memory()


def resolve(
    service: str,
    *,
    endpoint: str = "main",
    tags: Sequence[str] = (),
    scope: Scope | None = None,
    client: Client | None = None,
) -> Instance:
    """Return one working instance, by chance; raises NoInstances when there is none, DaemonUnavailable.

    `scope` says how far to look: "local", "cluster", "lan" or "all"; None is this host, or its cluster if it has one.
    """
    return pick(service, resolve_all(service, endpoint=endpoint, tags=tags, scope=scope, client=client))


def resolve_all(
    service: str,
    *,
    endpoint: str = "main",
    tags: Sequence[str] = (),
    scope: Scope | None = None,
    client: Client | None = None,
) -> list[Instance]:
    """Return all working instances, perhaps none."""
    client = client or Client()
    question = (client.url, service, endpoint, scope, *tags)
    try:
        return _memory.keep(question, client.service(service, **filters(endpoint, tags, scope)))
    except (DaemonUnavailable, ProtocolError, Retryable) as error:
        return _memory.recall(question, error)


def watch(
    service: str,
    *,
    endpoint: str = "main",
    tags: Sequence[str] = (),
    scope: Scope | None = None,
    client: Client | None = None,
) -> Iterator[list[Instance]]:
    """Yield the working instances now, and again whenever they change, without end; a daemon's absence is waited out.

    What comes and goes on the LAN is seen within LAN_WAIT_S. Raises DaemonUnavailable only when none answers at first.
    """
    client, query = client or Client(), filters(endpoint, tags, scope)
    found = client.service(service, **query)
    yield [Instance(document) for document in found["instances"]]
    wait = follow_up(found, scope)
    while True:
        try:
            newer = client.service(service, **query, **wait)
        except (DaemonUnavailable, ProtocolError, Retryable):
            sleep(steps.RETRY_S)
            wait = {}  # a daemon that lost its memory counts anew: ask for what is, then compare
            continue
        wait = follow_up(newer, scope)
        if shown(newer) != shown(found):
            yield [Instance(document) for document in newer["instances"]]
        found = newer


def pick(service: str, instances: Sequence[Instance]) -> Instance:
    """Choose one by chance; raises NoInstances."""
    if not instances:
        raise NoInstances(f"no instance of {service} works now")
    return choice(instances)


def filters(endpoint: str, tags: Sequence[str], scope: Scope | None) -> dict[str, object]:
    """Return the filters of a look-up."""
    return {"passing": True, "endpoint": endpoint, "tag": list(tags) or None, "scope": scope}


def follow_up(answer: Instances, scope: Scope | None) -> dict[str, float]:
    """Return what makes the next question of a watch a long poll from this answer on."""
    return {"after": answer["revision"], "wait": LAN_WAIT_S if scope in {"lan", "all"} else WAIT_S}


def shown(answer: Instances) -> list[tuple[object, ...]]:
    """Return what a watcher cares about: who is where, and what it says about itself."""
    return [
        (one["id"], one["address"], one["port"], one.get("tags"), one.get("metadata")) for one in answer["instances"]
    ]
