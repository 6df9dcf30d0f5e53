"""The suite can fail: what a case says is looked at, all of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from clients.conformance.languages import command
from clients.conformance.matching import Variables, mismatch
from clients.conformance.runner import Play, Stages, read


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ({"a": 1}, {"a": 1, "b": 2}),
        ([{"p": 1}, {"p": 2}], [{"p": 2}, {"p": 1}]),
        ("$known", 7),
        ("!$known", 8),
        ("!7", 8),
        ("~ort", "port"),
        ("~$known", [["7", "x"]]),
        ("*", 0),
        ({"a": {"b": "$new"}}, {"a": {"b": 1}}),
    ],
)
def test_what_fits_is_taken(expected: Any, actual: Any) -> None:
    assert mismatch(expected, actual, {"known": 7}) is None


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, None),
        ([], [1]),
        ([{"p": 1}, {"p": 1}], [{"p": 1}, {"p": 2}]),
        ("$known", 8),
        ("!$known", 7),
        ("!7", 7),
        ("~ort", "gate"),
        ("*", None),
        (False, True),
        ("text", None),
    ],
)
def test_a_mismatch_is_reported(expected: Any, actual: Any) -> None:
    assert mismatch(expected, actual, {"known": 7})


def test_a_variable_gets_its_value_only_where_everything_fits() -> None:
    variables: Variables = {}
    assert mismatch({"a": "$a", "b": 1}, {"a": 5, "b": 2}, variables)
    assert variables == {}
    assert mismatch({"a": "$a", "b": "$a"}, {"a": 5, "b": 5}, variables) is None
    assert variables == {"a": 5}


@pytest.mark.parametrize(
    "step",
    [
        {"calls": "lease"},
        {"call": "lease", "expects": {}},
        {"with": {}, "call": "lease"},
        {"call": "lease", "expect": {}, "error": {}},
    ],
)
def test_an_unknown_step_is_refused(step: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a step that is none"):
        read("a case", {"steps": [step]})


@pytest.mark.parametrize(
    "steps",
    [
        [{"call": "resolve", "with": {"service": "nobody"}}],
        [{"call": "resolve", "with": {"service": "nobody"}}, {"no_event": "changed"}],
        [{"call": "resolve", "with": {"service": "nobody"}, "expect": {}}],
        [{"call": "lease", "with": {"service": "orders"}, "error": {}}],
        [{"call": "lease", "with": {"service": "orders"}}, {"expect": {"instance": "orders-2"}}],
        [
            {"call": "lease", "with": {"service": "orders"}},
            {"ask": "POST /v1/leases", "body": {}, "expect": {"port": 1}},
        ],
        [{"driver_ends": "kill"}, {"call": "lease", "with": {"service": "orders"}}],
    ],
    ids=[
        "an error at the end",
        "an error before another step",
        "an error where none is expected",
        "no error where one is",
        "another result",
        "another answer of the daemon",
        "no driver",
    ],
)
def test_a_case_that_does_not_hold_fails(steps: list[dict[str, Any]], stages: Stages, workshop: Path) -> None:
    case = read("does not hold", {"steps": steps})
    with ExitStack() as stack, pytest.raises(AssertionError):
        Play(case, command("python", workshop), stages(case), stack).play()
