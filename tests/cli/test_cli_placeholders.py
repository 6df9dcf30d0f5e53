"""`{port}` and the like: what is filled in, what stays, and what is reported as mistyped."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.cli import placeholders


def lease(port: int, **fields: Any) -> dict[str, Any]:
    return {"address": "127.0.0.1", "port": port, "protocol": "tcp", "check": None, **fields}


LEASES = {"main": lease(22000), "metrics": lease(22001)}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("--bind={host}:{port}", "--bind=127.0.0.1:22000"),
        ("{port:metrics},{port:main}", "22001,22000"),
        ("VITE={url}/api", "VITE=http://127.0.0.1:22000/api"),
        ("{url:metrics}", "http://127.0.0.1:22001"),
        ('{"a":{port}}', '{"a":22000}'),
        ("{{port}}", "{port}"),
        ("%({{host}i)s", "%({host}i)s"),
        ("{{.Names}} {{ port }}", "{{.Names}} {{ port }}"),
        ("echo ${port} ${host}", "echo ${port} ${host}"),
        ("{other} {} {", "{other} {} {"),
        ("{PORT}{port}", "{PORT}22000"),
    ],
)
def test_placeholders_are_filled_and_other_braces_stay(text: str, filled: str) -> None:
    assert placeholders.fill(text, LEASES) == filled


@given(st.text(alphabet="{}$: porthsu", max_size=30))
def test_text_without_a_placeholder_never_changes(text: str) -> None:
    parts = list(placeholders.split(text))
    if len(parts) == 1 and "{{" not in text:
        assert placeholders.fill(text, LEASES) == text


@pytest.mark.parametrize("word", ["{PORT}", "{Port}", "{prot}", "{port1}", "{host:metrics}", "{HOST}", "{hots}"])
def test_a_mistyped_placeholder_is_reported_as_typed(word: str) -> None:
    assert placeholders.suspicious(["serve", f"--bind={word}"]) == word


@pytest.mark.parametrize("word", ["${PORT}", "%{host}", "{other}", "{port}", "{{port}}", "{}", "{report}", "{post}"])
def test_other_braces_are_not_reported(word: str) -> None:
    assert placeholders.suspicious([word]) is None


def test_an_endpoint_that_is_not_leased_is_found() -> None:
    assert placeholders.missing_endpoint(["x", "{port:admin}"], ["main", "metrics"]) == "{port:admin}"
    assert placeholders.missing_endpoint(["{port:metrics}"], ["main", "metrics"]) is None


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"address": "0.0.0.0"}, "http://127.0.0.1:22000"),
        ({"address": "::"}, "http://[::1]:22000"),
        ({"address": "localhost"}, "http://localhost:22000"),
        ({"check": {"kind": "http", "tls": True}}, "https://127.0.0.1:22000"),
        ({"protocol": "udp"}, "udp://127.0.0.1:22000"),
    ],
)
def test_the_url_is_one_that_this_host_reaches(fields: dict[str, Any], url: str) -> None:
    assert placeholders.url(lease(22000, **fields)) == url
