"""Who is given to callers, and at which address, by the contract's rule alone."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.core.model import Lease, Owner, ReportCheck
from portd.core.visibility import is_healthy, is_loopback, reachable_at, serving

CHECK = ReportCheck()


def lease(instance: str = "orders-1", endpoint: str = "main", **more: Any) -> Lease:
    fields = {
        "id": f"{instance}.{endpoint}",
        "service": "orders",
        "instance": instance,
        "endpoint": endpoint,
        "protocol": "tcp",
        "address": "127.0.0.1",
        "port": 20000,
        "pool": "default",
        "hold": "shared",
        "state": "bound",
        "lifetime": "process",
        "owner": Owner(known_by="peercred"),
        "host": "here",
        "created_at": 0.0,
    }
    return Lease(**{**fields, **more})


LEASES = st.lists(
    st.builds(
        lease,
        instance=st.sampled_from(["a", "b", "c"]),
        endpoint=st.sampled_from(["main", "admin"]),
        state=st.sampled_from(["held", "bound", "bound", "conflict", "ended"]),
        health=st.sampled_from(["passing", "warning", "critical", "unknown"]),
        check=st.sampled_from([None, CHECK]),
        drain=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.id,
)


@given(LEASES)
def test_no_instance_changes_what_is_given_of_another(leases: list[Lease]) -> None:
    given_ids = {each.id for each in serving(leases)}
    alone = [serving([each for each in leases if each.instance == name]) for name in {each.instance for each in leases}]
    assert given_ids == {each.id for some in alone for each in some}


@given(LEASES)
def test_whoever_is_given_is_bound_undrained_and_not_failing(leases: list[Lease]) -> None:
    for each in serving(leases):
        assert each.state == "bound"
        assert is_healthy(each)
        together = [other for other in leases if other.instance == each.instance and other.state == "bound"]
        assert not any(other.drain for other in together)
        assert not any(other.endpoint == "main" and other.check and other.health == "critical" for other in together)


@given(LEASES)
def test_panic_adds_only_critical_ones_where_nobody_serves(leases: list[Lease]) -> None:
    usual, panicked = serving(leases), serving(leases, "all")
    assert [each for each in panicked if each in usual] == usual
    served = {each.endpoint for each in usual}
    for each in panicked:
        if each not in usual:
            assert each.endpoint not in served
            assert not each.drain
            assert each.state == "bound"


ADDRESSES = st.lists(
    st.sampled_from(["0.0.0.0", "::", "127.0.0.1", "::1", "192.0.2.7", "2001:db8::7", "127.77.0.9", "localhost"]),
    max_size=3,
    unique=True,
)


@given(ADDRESSES, st.sampled_from(["0.0.0.0", "127.0.0.1", "::", "192.0.2.7", "localhost"]))
def test_local_callers_get_real_addresses(listening: list[str], address: str) -> None:
    found = reachable_at(lease(address=address, listening=tuple(listening)))
    assert found
    assert not any(ipaddress.ip_address(each).is_unspecified for each in found)


@given(
    ADDRESSES,
    st.sampled_from(["0.0.0.0", "127.0.0.1", "::", "localhost"]),
    st.sampled_from(["192.0.2.5", "2001:db8::5"]),
)
def test_callers_elsewhere_never_get_loopback(listening: list[str], address: str, asked_at: str) -> None:
    found = reachable_at(lease(address=address, listening=tuple(listening)), asked_at)
    assert not any(is_loopback(each) or ipaddress.ip_address(each).is_unspecified for each in found)
    if asked_at in found:
        assert found[0] == asked_at


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("192.0.2.1", False),
        ("::", False),
    ],
)
def test_loopback_is_recognized_in_every_spelling(address: str, expected: bool) -> None:
    assert is_loopback(address) == expected
