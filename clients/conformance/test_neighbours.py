"""Services of every language at once: they are found by all the others, and one that is killed is seen to leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from clients.conformance.daemons import Stage
from clients.conformance.drivers import Driver
from clients.conformance.languages import LANGUAGES, command
from clients.conformance.runner import Case, Stages

SPOKEN = [name for name, language in LANGUAGES.items() if not language.missing]
INSTANCES = 3


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test opened is closed after it."""
    with ExitStack() as opened:
        yield opened


def start(language: str, stage: Stage, workshop: Path, stack: ExitStack) -> Driver:
    """Start a driver."""
    driver = Driver(command(language, workshop), stage.environ)
    stack.callback(driver.close)
    return driver


def asked(driver: Driver, call: str, **arguments: Any) -> Any:
    """Make a call and return its result."""
    answer = driver.receive(driver.send(call, arguments))
    assert "result" in answer, answer
    return answer["result"]


def ports(event: dict[str, Any]) -> list[int]:
    """Return the ports that a watch reported."""
    return sorted(instance["port"] for instance in event.get("instances", []))


def test_every_language_finds_services_of_all_others(stages: Stages, workshop: Path, stack: ExitStack) -> None:
    stage = stages(Case("neighbours", []))
    services = {
        f"in-{language}": [start(language, stage, workshop, stack) for _ in range(INSTANCES)] for language in SPOKEN
    }
    served = {
        service: [asked(driver, "listen", service=service)["port"] for driver in drivers]
        for service, drivers in services.items()
    }
    callers = {
        (language, service): start(language, stage, workshop, stack) for language in SPOKEN for service in services
    }
    for (_, service), caller in callers.items():
        found = asked(caller, "resolve_all", service=service)["instances"]
        assert sorted(one["port"] for one in found) == sorted(served[service])
        asked(caller, "watch", service=service)
    for drivers in services.values():
        drivers[0].end("kill")
    for (_, service), caller in callers.items():
        left = sorted(served[service][1:])
        caller.event(lambda event, left=left: ports(event) == left)  # type: ignore[misc]
