"""The log: nobody forges a line, every grant, end and refusal says whose it is, and what is left out is counted."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from portd import logs
from portd.core.errors import Busy, NotOwner, PortTaken
from portd.core.model import Event
from tests.adapters.sqlite.nouns import a_lease, an_event, ended

HOSTILE = "a\n08:00:00 CRITICAL the disk is lost\x1b]0;title\x07\x9b2J\u202etxt\u2028\ud800"


def log_to(stream: io.StringIO, form: str) -> None:
    """Log to a stream instead of stderr."""
    logs.set_up("info", form)  # type: ignore[arg-type]
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The text log at level info; logging is as before afterwards."""
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    log_to(stream, "text")
    yield stream
    root.handlers[:] = before
    root.setLevel(level)


def applied(*events: Event) -> None:
    """Log these events in a loop, which the rate limit needs, past the end of its second."""

    async def run() -> None:
        log = logs.LeaseLog()
        for event in events:
            log.apply(event)
        log._limit._end_second()

    asyncio.run(run())


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_others_choose_forges_no_line(log: io.StringIO, form: str) -> None:
    log_to(log, form)
    lease = a_lease(1, health="critical", health_note=HOSTILE)
    applied(an_event(1, lease, "health"))
    line, rest = log.getvalue().split("\n", 1)
    assert rest == ""
    assert line.isprintable()
    if form == "json":
        assert HOSTILE in json.loads(line)["message"], "escapes of JSON keep the value"


@given(st.text())
def test_escaped_text_is_printable_and_keeps_what_was(text: str) -> None:
    shown = logs.escaped(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


def test_a_traceback_keeps_its_lines_and_nothing_else_unprintable(log: io.StringIO) -> None:
    try:
        raise ValueError(HOSTILE.replace("\n", " "))
    except ValueError:
        logging.getLogger("portd").exception("failed")
    assert all(line.isprintable() for line in log.getvalue().splitlines())
    assert "Traceback" in log.getvalue()


@pytest.mark.parametrize("kind", ["granted", "ended"])
@pytest.mark.parametrize("ttl", [None, 60.0])
def test_grants_and_ends_name_uid_user_and_pid(log: io.StringIO, kind: str, ttl: float | None) -> None:
    lease = a_lease(1, ttl=ttl, uid=1000)
    lease = replace(lease, owner=replace(lease.owner, uid=1000, user="alice", pid=4711))
    applied(an_event(1, ended(lease, 2e9) if kind == "ended" else lease, kind))
    assert "uid 1000 (alice), pid 4711" in log.getvalue()


def test_lines_beyond_the_limit_are_counted_per_user(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LINES_PER_S", 2)
    applied(*(an_event(n, a_lease(n, uid=1000 + n % 2)) for n in range(1, 11)))
    assert len(log.getvalue().splitlines()) == 3
    assert "rate limited: not logged in the last second: 4 granted (uid 100" in log.getvalue()


def test_refusals_name_the_caller_and_only_what_matters_is_logged(log: io.StringIO) -> None:
    async def run() -> None:
        refusals = logs.RefusalLog()
        refusals.record(NotOwner("lease x belongs to uid 0"), 1000, 4711)
        refusals.record(PortTaken("port 1 is taken"), None, None)
        refusals.record(Busy("too many"), 1000, 4711)

    asyncio.run(run())
    lines = [line.partition("INFO    ")[2] for line in log.getvalue().splitlines()]
    assert lines == [
        "refused uid 1000 (pid 4711): not_owner: lease x belongs to uid 0",
        "refused an unknown caller (pid unknown): port_taken: port 1 is taken",
    ]


@pytest.mark.parametrize("has_listened", [False, True])
def test_an_owner_that_never_listened_gets_the_hint_about_holds(log: io.StringIO, has_listened: bool) -> None:
    lease = a_lease(1)
    bound = [an_event(2, replace(lease, state="bound", listening=("127.0.0.1",)), "bound")] if has_listened else []
    over = replace(ended(lease, 2e9), ended_because="owner_exited")
    applied(an_event(1, lease, "granted"), *bound, an_event(3, over, "ended"))
    assert ("--hold none or --socket" in log.getvalue()) is not has_listened
