"""Parsing of command lines: whatever is typed gives values or one usage error, and labels are the daemon's."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.cli import callers, commands, lease_options, options
from portd.cli.callers import Process
from portd.core.model import LABEL_PATTERN

EVERY = {command.name: command for command in commands.every()}
KNOWN = sorted({option.name for command in EVERY.values() for option in command.options})
WORDS = st.lists(
    st.one_of(
        st.sampled_from([*KNOWN, "--", "-", "-h", "web", "8080", ":80", "http:/", "=", "--port=1-2"]),
        st.text(max_size=8),
    ),
    max_size=8,
)


@given(st.sampled_from(sorted(EVERY)), WORDS)
def test_any_command_line_gives_values_or_a_usage_error(name: str, words: list[str]) -> None:
    command = EVERY[name]
    try:
        values = options.read(command, words)
    except options.UsageError:
        return
    assert {option.key for option in command.options} <= set(values)


@given(st.text(max_size=70) | st.from_regex(LABEL_PATTERN))
def test_the_labels_that_are_accepted_are_the_daemons(text: str) -> None:
    assert options.is_label(text) == bool(re.match(LABEL_PATTERN, text))


@given(st.text(max_size=40))
def test_a_suggested_name_is_one_that_is_accepted(text: str) -> None:
    try:
        options.label(text)
    except ValueError as error:
        if found := re.search(r"; '(.*)' would do", str(error)):
            assert options.label(found[1]) == found[1]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("3000", 3000),
        ("3000,3001", [3000, 3001]),
        ("8000-8010", "8000-8010"),
        ("3000,8000-8010", [3000, "8000-8010"]),
    ],
)
def test_ports_are_numbers_lists_and_ranges(text: str, parsed: object) -> None:
    assert lease_options.ports(text) == parsed


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("http", {"kind": "http"}),
        ("http:/h,interval=5s,fall=2", {"kind": "http", "path": "/h", "interval": 5.0, "fall": 2}),
        ("tcp:tls.server_name=a.b,tls.verify=false", {"kind": "tcp", "tls": {"server_name": "a.b", "verify": False}}),
        ("http:/h,headers.Accept=text/plain", {"kind": "http", "path": "/h", "headers": {"Accept": "text/plain"}}),
        ("http:/h,expect_status=200+204", {"kind": "http", "path": "/h", "expect_status": [200, 204]}),
        ("http:/h,endpoint=admin", {"kind": "http", "path": "/h", "endpoint": "admin"}),
        ("command:/bin/check -v", {"kind": "command", "command": ["/bin/check", "-v"]}),
        ("report:ttl=1m", {"kind": "report", "ttl": 60.0}),
    ],
)
def test_a_check_is_its_kind_and_fields(text: str, parsed: object) -> None:
    assert lease_options.check(text) == parsed


@given(st.text(max_size=40))
def test_any_text_is_a_check_ports_and_duration_or_refused(text: str) -> None:
    for read in (lease_options.check, lease_options.ports, options.duration, options.port_argument, options.pair):
        with suppress(ValueError):
            assert read(text) is not None


@given(st.text(alphabet="portd leasex;|&$()`<>\"'\n ", max_size=40))
def test_any_script_text_has_an_owner(text: str) -> None:
    shell = Process(2, 1, 7, "/bin/sh", ("sh", "-c", text), ("2",))
    hub = Process(1, 0, 7, "/bin/hub", ("hub",), ("1",))
    assert callers.choose(2, 7, {1: hub, 2: shell}.get)[0] in {1, 2}
