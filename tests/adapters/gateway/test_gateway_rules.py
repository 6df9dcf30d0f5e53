"""The gateway's pure rules: whom a request goes to, and which headers it carries."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from portd.adapters.gateway.balancing import Loads, Target
from portd.adapters.gateway.headers import HOP_BY_HOP, end_to_end, is_loop, is_websocket, to_service

TARGETS = st.lists(
    st.builds(Target, st.just("a"), st.just("http"), st.just("127.0.0.1"), st.integers(1, 9), st.integers(0, 3),
              st.integers(0, 1)), min_size=1, max_size=6, unique_by=lambda target: target.port,
)  # fmt: skip
NAMES = st.sampled_from(["X-A", "x-b", "Connection", "TE", "Upgrade", "Cookie", "Via", "X-Forwarded-For", "Forwarded"])
HEADERS = st.lists(st.tuples(NAMES, st.sampled_from(["x-a", "X-B, close", "1.1 portd-gateway", "10.0.0.1"]))).map(
    CIMultiDict
)


@given(TARGETS)
def test_only_targets_of_the_best_priority_are_picked(targets: list[Target]) -> None:
    assert Loads().pick(targets).priority == min(target.priority for target in targets)


@given(st.integers(1, 5), st.integers(1, 30))
def test_equal_targets_share_requests_equally(count: int, requests: int) -> None:
    targets = [Target(f"a-{port}", "http", "127.0.0.1", port) for port in range(1, count + 1)]
    loads, picked = Loads(), Counter[Target]()
    with ExitStack() as open_requests:
        for _ in range(requests):
            target = loads.pick(targets)
            picked[target] += 1
            open_requests.enter_context(loads.use(target))
    assert max(picked.values()) - min(picked[target] for target in targets) <= 1


def test_a_busy_target_is_passed_over() -> None:
    busy, idle = (Target(name, "http", "127.0.0.1", port) for port, name in ((1, "a"), (2, "b")))
    loads = Loads()
    with loads.use(busy):
        for _ in range(3):
            assert loads.pick([busy, idle]) == idle
            with loads.use(idle):
                pass


@given(HEADERS)
def test_no_hop_by_hop_header_reaches_a_service(headers: CIMultiDict[str]) -> None:
    named = {word.strip().lower() for line in headers.getall("Connection", ()) for word in line.split(",")}
    passed = {name.lower() for name in end_to_end(headers)}
    assert not passed & (HOP_BY_HOP | named)
    assert passed >= {name.lower() for name in headers} - HOP_BY_HOP - named


@given(HEADERS)
def test_another_host_cannot_choose_what_it_is_forwarded_as(headers: CIMultiDict[str]) -> None:
    made = to_service(headers, "192.0.2.7", "web.localhost")
    assert made.getall("X-Forwarded-For") == ["192.0.2.7"]
    assert "Forwarded" not in made


def test_a_request_loops_after_five_passages_alone() -> None:
    headers = CIMultiDict({"Host": "web.localhost"})
    for passed in range(8):
        assert is_loop(headers) == (passed >= 5)
        headers = to_service(headers, "127.0.0.1", "web.localhost")


def test_only_a_get_with_the_upgrade_opens_a_websocket() -> None:
    assert is_websocket("GET", CIMultiDict({"Upgrade": "h2c, WebSocket"}))
    assert not is_websocket("POST", CIMultiDict({"Upgrade": "websocket"}))
    assert not is_websocket("GET", CIMultiDict({"Upgrade": "h2c"}))
