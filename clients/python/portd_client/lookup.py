"""Looking other services up: one instance at a time, or all changes as they come.

The last answer is kept for a while, so that a restart of the daemon hides no instance; a kept answer is marked
(`is_stale`).
"""

from __future__ import annotations

from random import choices
from time import monotonic, sleep

from . import calls, steps
from .client import Client
from .errors import DaemonUnavailable, NoInstances, PortdError, Problem, ProtocolError, Retryable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, TypedDict, Unpack

    from .protocol import Request
    from .types import Instances, LeaseDocument, Scope

    class WatchOptions(TypedDict, total=False):
        """Which instances are looked up."""

        endpoint: str
        """Which of their ports. By default "main"."""
        tags: Sequence[str]
        """Only instances that have all of these. By default any."""
        scope: Scope | None
        """How far to look: "local", "cluster", "lan", "all". By default this host, or its cluster if it has one."""

    class LookupOptions(WatchOptions, total=False):
        """Which instances are looked up, and for how long they are waited for."""

        wait_s: float
        """Seconds to wait until as many serve as are needed. By default 0: NoInstances at once."""

    class AllLookupOptions(LookupOptions, total=False):
        """Which instances are looked up, how many of them, and for how long they are waited for."""

        min: int
        """Fewer than these raise NoInstances. By default 0, or 1 with `wait_s`."""


STALE_MAX_S = 300.0
"""Seconds that an answer is good for while no daemon answers; ports of processes that live do not change by then."""
WAIT_S = 55.0
"""Seconds of one long poll: proxies cut what is silent for a minute."""
LAN_WAIT_S = 5.0
"""Seconds of one long poll that covers the LAN too: the daemon is woken by changes of its own leases alone."""
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
AWAY = (DaemonUnavailable, ProtocolError, Retryable)
"""The daemon can't answer now, and will again."""


class Instance:
    """One instance that serves. `document` is its lease; `is_stale`: the daemon is away, and answered this last."""

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
    def sockaddr(self) -> tuple[str, int]:
        """Return (host, port), as socket.create_connection accepts it."""
        return self.host, self.port

    @property
    def authority(self) -> str:
        """Return host:port, as a URL contains it."""
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


class Query:
    """One look-up: which instances, how many of them, and how long they are waited for (see LookupOptions)."""

    def __init__(
        self,
        service: str,
        *,
        endpoint: str = "main",
        tags: Sequence[str] = (),
        scope: Scope | None = None,
        min: int | None = None,
        wait_s: float = 0.0,
    ) -> None:
        self.service = service
        self.min = (1 if wait_s else 0) if min is None else min
        self.wait_s = wait_s
        self.is_wide = scope in {"lan", "all"}
        self._filters = {"passing": True, "endpoint": endpoint, "tag": list(tags) or None, "scope": scope}

    @property
    def key(self) -> tuple[object, ...]:
        """Return what makes two look-ups the same."""
        return self.service, str(self._filters)

    def request(self, **waiting: Any) -> Request[Instances]:
        """Return the call; `waiting` are its fields that make it wait."""
        return calls.service(self.service, **self._filters, **waiting)  # type: ignore[arg-type]

    def first(self) -> Request[Instances]:
        """Return the call of a look-up that waits for `min` instances at most `wait_s` seconds."""
        return self.request(min=self.min, wait=self.wait_s) if self.wait_s and self.min else self.request()

    def check(self, found: list[Instance]) -> list[Instance]:
        """Return the instances; raises NoInstances where there are fewer than `min`."""
        if len(found) < self.min:
            number = "no instance" if not found else f"only {len(found)} of {self.min} instances"
            late = f" after {self.wait_s:g} s" if self.wait_s else ""
            raise NoInstances(f"{number} of {self.service} serves{late}")
        return found


class Watch:
    """The state of a watch, without I/O: what to request next, and whether an answer is news."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self._known: object = None
        self._after: int | str | None = None
        self.wait_s = LAN_WAIT_S if query.is_wide else WAIT_S

    def request(self) -> Request[Instances]:
        """Return the next call: a long poll after what is known, or of what is where nothing is."""
        return (
            self._query.request() if self._after is None else self._query.request(after=self._after, wait=self.wait_s)
        )

    def news(self, answer: Instances, headers: dict[str, str]) -> list[Instance] | None:
        """Return the instances, or None where nothing that a watcher sees has changed."""
        store = headers.get("x-portd-store")
        self._after = f"{store}:{answer['revision']}" if store else answer["revision"]
        shown = [
            (one["id"], one["address"], one["port"], one.get("tags"), one.get("metadata"), one.get("weight"))
            for one in answer["instances"]
        ]
        is_news, self._known = shown != self._known, shown
        return [Instance(document) for document in answer["instances"]] if is_news else None

    def failed(self, error: PortdError) -> float:
        """Return the seconds until the next call; raises `error` where no answer is known yet, or it won't pass."""
        if self._known is None or not (isinstance(error, AWAY) or is_gone(error)):
            raise error
        self._after = None  # another store counts anew: request what is, then compare
        return 0.0 if is_gone(error) else steps.RETRY_S


def is_gone(error: PortdError) -> bool:
    """Return whether the daemon does not keep what followed a revision, or it is of another store."""
    return isinstance(error, Problem) and error.code == "revision_gone"


class Memory:
    """The last answer for each look-up."""

    def __init__(self) -> None:
        self._answers: dict[tuple[object, ...], tuple[float, Instances]] = {}

    def keep(self, url: str, query: Query, answer: Instances) -> list[Instance]:
        """Remember an answer, and return its instances."""
        self._answers[url, query.key] = (monotonic(), answer)
        return [Instance(document) for document in answer["instances"]]

    def recall(self, url: str, query: Query, error: PortdError) -> list[Instance]:
        """Return the last answer, marked as stale; raises `error` when it is too old, or there was none."""
        at, answer = self._answers.get((url, query.key), (float("-inf"), None))
        if answer is None or monotonic() - at > STALE_MAX_S:
            raise error
        return [Instance(document, is_stale=True) for document in answer["instances"]]


memory = Memory()
"""That of this process; blocking and asyncio clients share it."""


def resolve(service: str, *, client: Client | None = None, **options: Unpack[LookupOptions]) -> Instance:
    """Return one instance that serves; those of the lowest priority share the callers by weight, at random.

    `wait_s` waits for the first one. See LookupOptions for the other arguments. Raises NoInstances, DaemonUnavailable.
    """
    return pick(service, resolve_all(service, client=client, **options))


def resolve_all(service: str, *, client: Client | None = None, **options: Unpack[AllLookupOptions]) -> list[Instance]:
    """Return all instances that serve, perhaps none.

    `min` and `wait_s` wait until that many serve, and raise NoInstances where fewer do. See AllLookupOptions for the
    other arguments. Raises DaemonUnavailable.
    """
    client, query = client or Client(), Query(service, **options)
    try:
        answer = client.call(query.first(), timeout_s=client.timeout_s + query.wait_s)
        found = memory.keep(client.url, query, answer)
    except AWAY as error:
        found = memory.recall(client.url, query, error)
    return query.check(found)


def watch(service: str, *, client: Client | None = None, **options: Unpack[WatchOptions]) -> Iterator[list[Instance]]:
    """Yield the instances that serve: now, and again whenever they change, without end.

    A daemon's absence is waited out, and one that lost its store is listed again. Raises DaemonUnavailable only when
    none answers at first. What comes and goes on the LAN is seen within LAN_WAIT_S. See WatchOptions for the arguments.
    """
    client, state = client or Client(), Watch(Query(service, **options))
    while True:
        try:
            answer, headers = client.exchange(state.request(), timeout_s=client.timeout_s + state.wait_s)
        except PortdError as error:
            sleep(state.failed(error))
            continue
        if (news := state.news(answer, headers)) is not None:
            yield news


def pick(service: str, instances: Sequence[Instance]) -> Instance:
    """Choose one as RFC 2782 chooses a server: the lowest priority first, there at random by weight.

    Raises NoInstances.
    """
    if not instances:
        raise NoInstances(f"no instance of {service} serves now")
    lowest = min(one.document.get("priority", 0) for one in instances)
    group = [one for one in instances if one.document.get("priority", 0) == lowest]
    weights = [one.document.get("weight", 1) for one in group]
    return choices(group, weights if any(weights) else None)[0]
