"""Cases and how they are played: each step of a case is one method of `Play`, named for the step's first key."""

from __future__ import annotations

import re
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from clients.conformance.daemons import Stage
from clients.conformance.drivers import DEADLINE_S, GREETING, SIGNAL_STATUSES, Driver
from clients.conformance.impostor import Impostor
from clients.conformance.matching import filled, mismatch
from clients.conformance.standin import StandIn

CASES = Path(__file__).parent / "cases"
NOWHERE = "unix:///nonexistent/portd.sock"
ENDINGS = {"eof": {0}, "term": SIGNAL_STATUSES, "kill": {-9}}
FAULTS = re.compile("Traceback|ResourceWarning|panic:|Unhandled")
"""What no driver may write on stderr: a fault of the client that no answer reported."""
STEPS = {
    "call": {"with", "expect", "error"},
    "send": {"with"},
    "expect": set(),
    "error": set(),
    "event": {"expect"},
    "no_event": set(),
    "driver_ends": set(),
    "daemon": set(),
    "ask": {"body", "expect"},
    "standin": set(),
    "heard": set(),
    "serve": set(),
    "impostor": set(),
    "unheard": set(),
    "foreign": {"port"},
    "dial": {"address"},
}
"""The first key of each step, and those that may follow it."""


class Case(NamedTuple):
    """What a case file says under one name; the README explains each key."""

    name: str
    steps: Sequence[dict[str, Any]]
    run: Sequence[str] = ()
    environment: dict[str, str] = {}
    daemon: dict[str, Any] | None = None
    needs: Sequence[str] = ()

    @property
    def spoils_its_daemon(self) -> bool:
        """Return whether it ends or stops the daemon, which then can't be a shared one."""
        return any("daemon" in step for step in self.steps)

    @property
    def needs_a_standin(self) -> bool:
        """Return whether the stand-in plays in it."""
        return "$standin" in str((self.environment, self.steps))

    @property
    def needs_an_impostor(self) -> bool:
        """Return whether another user poses as portd in it."""
        return "$impostor" in str((self.environment, self.steps))


def cases() -> dict[str, Case]:
    """Read all cases by their names, which are unique."""
    found: dict[str, Case] = {}
    for path in sorted(CASES.glob("*.toml")):
        for name, table in tomllib.loads(path.read_text()).items():
            if name in found:
                raise ValueError(f"two cases are called {name!r}")
            found[name] = read(name, table)
    return found


def read(name: str, table: Mapping[str, Any]) -> Case:
    """Read one case; raises ValueError for a step that the suite does not know, or would ignore."""
    for step in table["steps"]:
        verb, *rest = step
        if verb not in STEPS or not STEPS[verb].issuperset(rest) or {"expect", "error"} <= step.keys():
            raise ValueError(f"{name!r} has a step that is none: {step}")
    return Case(name, **table)


Stages = Callable[[Case], Stage]
"""Gives a case its daemon."""


class Play:
    """One performance of a case: a driver, the daemon, foreign listeners, and the variables that the steps share."""

    def __init__(self, case: Case, command: Sequence[str], stage: Stage, stack: ExitStack) -> None:
        self._case = case
        self._stage = stage
        self._stack = stack
        self._foreign_listeners: dict[int, socket.socket] = {}
        self._pending = 0  # the number of a call whose answer was not read yet
        self._answer: dict[str, Any] = {}
        self._variables: dict[str, Any] = {**stage.facts, "nowhere": NOWHERE}
        if case.needs_a_standin:
            self._standin_there = StandIn(stage.directory / "portd.sock", stage.directory / "standin.sock")
            stack.callback((stage.directory / "standin.sock").unlink)
            stack.callback(self._standin_there.close)
            self._variables["standin"] = self._standin_there.url
        if case.needs_an_impostor:
            self._impostor_there = Impostor()
            stack.callback(self._impostor_there.close)
            self._variables["impostor"] = self._impostor_there.url
            self._variables["impostor_http"] = self._impostor_there.http_url
            self._variables["impostor_tmp"] = str(self._impostor_there.temporary)
        words = [sys.executable, "-m", "portd", "run", *case.run, "--", *command] if case.run else command
        own = {name: str(value) for name, value in filled(case.environment, self._variables).items()}
        self._driver = Driver(words, {**stage.environ, **own})
        stack.callback(self._driver.close)
        self._variables["pid"] = self._driver.pid

    def play(self) -> None:
        """Play all steps; then the driver ends by itself, and leaves nothing behind."""
        for number, step in enumerate(self._case.steps, 1):
            self._take(number, step)
        if self._driver.is_running:
            self._take(len(self._case.steps) + 1, {"driver_ends": "eof"})

    def _take(self, number: int, step: dict[str, Any]) -> None:
        """Take one step; an error that no step expected ends the play at the next one."""
        try:
            verb = next(iter(step))
            if verb not in {"expect", "error"}:
                self._forget_answer()
            getattr(self, f"_{verb}")(step)
        except AssertionError as error:
            raise AssertionError(
                f"step {number}, {step}: {error}\nthe driver wrote: {self._driver.errors()}\n"
                f"the daemon wrote: {self._stage.log()[-2000:]}"
            ) from None

    # --- the driver ---

    def _call(self, step: dict[str, Any]) -> None:
        self._send({"send": step["call"], **step})
        self._receive()
        for outcome in {"expect", "error"} & step.keys():
            getattr(self, f"_{outcome}")(step)

    def _send(self, step: dict[str, Any]) -> None:
        self._pending = self._driver.send(step["send"], filled(step.get("with", {}), self._variables))

    def _expect(self, step: dict[str, Any]) -> None:
        self._compare(step["expect"], "result")

    def _error(self, step: dict[str, Any]) -> None:
        self._compare(step["error"], "error")

    def _forget_answer(self) -> None:
        """Turn to another step: an error must have been expected by now."""
        is_known = bool(self._answer.pop("is_known", None))
        assert is_known or "error" not in self._answer, f"before it: {self._answer}"
        self._answer = {}

    def _receive(self) -> None:
        if self._pending:
            self._answer, self._pending = self._driver.receive(self._pending), 0

    def _compare(self, expected: Any, outcome: str) -> None:
        self._receive()
        assert outcome in self._answer, f"the answer is {self._answer}"
        actual, self._answer["is_known"] = self._answer[outcome], True
        assert (difference := mismatch(expected, actual, self._variables)) is None, f"{difference}; it is {actual}"

    def _event(self, step: dict[str, Any]) -> None:
        expected = {"event": step["event"], **step.get("expect", {})}
        self._driver.event(lambda event: mismatch(expected, event, self._variables) is None)

    def _no_event(self, step: dict[str, Any]) -> None:
        assert not self._driver.has_event(step["no_event"]), "it has come"

    def _driver_ends(self, step: dict[str, Any]) -> None:
        how = step["driver_ends"]
        status = self._driver.end(how)
        assert status in ENDINGS[how], f"it ended with status {status}"
        assert not FAULTS.search(self._driver.errors()), "it wrote of a fault"
        assert how == "kill" or self._case.run or not self._stage.leases_of(self._driver.pid), (
            "it gave not everything back"
        )
        self._stage.wait_for_no_leases_of(self._driver.pid)

    # --- the daemon ---

    def _daemon(self, step: dict[str, Any]) -> None:
        self._stage.do(step["daemon"])

    def _ask(self, step: dict[str, Any]) -> None:
        method, path = filled(step["ask"], self._variables).split(" ")
        body = filled(step.get("body"), self._variables)
        end = time.monotonic() + (DEADLINE_S if method == "GET" else 0)
        while True:
            answer = self._stage.ask(method, path, body)
            difference = mismatch(step.get("expect", {}), answer or {}, self._variables)
            if difference is None:
                return
            assert time.monotonic() < end, f"{difference}; the answer is {answer}"
            time.sleep(0.01)

    def _standin(self, step: dict[str, Any]) -> None:
        self._standin_there.do(step["standin"])

    def _heard(self, step: dict[str, Any]) -> None:
        self._standin_there.wait_to_hear(step["heard"])

    def _impostor(self, step: dict[str, Any]) -> None:
        assert step["impostor"] == "poses"
        self._impostor_there.pose()

    def _unheard(self, step: dict[str, Any]) -> None:
        assert not self._impostor_there.has_received(step["unheard"]), "it was sent to another user"

    # --- the host ---

    def _foreign(self, step: dict[str, Any]) -> None:
        what, port = step["foreign"], filled(step["port"], self._variables)
        if what == "leaves":
            self._foreign_listeners.pop(port).close()
            return
        listener = self._stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        self._foreign_listeners[port] = listener

    def _serve(self, step: dict[str, Any]) -> None:
        port = filled(step["serve"], self._variables)
        lease = self._stage.ask("GET", f"/v1/ports/{port}")["lease"]
        listener = self._stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((lease["address"], port))
        listener.listen()
        self._ask({"ask": f"GET /v1/leases/{lease['id']}", "expect": {"state": "bound"}})

    def _dial(self, step: dict[str, Any]) -> None:
        address = (filled(step.get("address", "127.0.0.1"), self._variables), filled(step["dial"], self._variables))
        with socket.create_connection(address, DEADLINE_S) as caller, caller.makefile() as lines:
            assert lines.readline() == GREETING + "\n", "somebody else answers"
