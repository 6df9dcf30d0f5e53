"""Host names of leases: what they stand for, and that formatting and parsing agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.core.hostnames import PublicName, format_host, format_url, parse_host

LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
NAMES = st.builds(PublicName, LABELS, st.none() | LABELS, st.just("main") | LABELS)


@given(NAMES)
def test_a_formatted_name_is_among_its_readings(name: PublicName) -> None:
    assert name in parse_host(format_host(name))


@given(st.text(max_size=80))
def test_any_text_gives_readings_that_are_labels(text: str) -> None:
    for name in parse_host(text):
        assert all(part is None or (part.isascii() and part) for part in name)


@pytest.mark.parametrize(
    "host",
    ["", "localhost", "example.com", "orders.localhost.example.com", "a.b.c.localhost", "-a.localhost", ".localhost"],
)
def test_a_foreign_host_has_no_reading(host: str) -> None:
    assert parse_host(host) == ()


@pytest.mark.parametrize("host", ["orders.localhost", "ORDERS.localhost", "orders.localhost.", "orders.localhost:7780"])
def test_case_final_dot_and_port_do_not_matter(host: str) -> None:
    assert parse_host(host) == (PublicName("orders"),)


def test_a_service_with_two_hyphens_is_read_before_an_endpoint() -> None:
    assert parse_host("a--b.localhost") == (PublicName("a--b"), PublicName("b", None, "a"))


def test_a_url_leaves_out_the_default_port_of_its_scheme() -> None:
    assert format_url(PublicName("orders"), "http", 80) == "http://orders.localhost"
    assert format_url(PublicName("orders"), "https", 443) == "https://orders.localhost"
    assert format_url(PublicName("orders", "orders-1", "admin"), "http", 7780) == (
        "http://admin--orders-1.orders.localhost:7780"
    )
