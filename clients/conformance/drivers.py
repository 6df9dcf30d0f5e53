"""A running driver: calls go in, answers and events come out, each a line of JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

DEADLINE_S = 20.0
"""Seconds for what must happen: far more than anything takes, so that only what never happens fails."""
GREETING = "at your service"
"""What a driver answers whoever connects: its first argument."""


class Driver:
    """One driver process. `end` ends it, by whatever way; each is ended once."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("a+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [*words, GREETING],
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.pid = self._process.pid
        self.is_running = True
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._last_id = 0
        self._is_at_end = False
        self._arrival = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="driver's lines")
        self._reader.start()

    def send(self, call: str, arguments: Mapping[str, Any]) -> int:
        """Send a call and return its number, for `receive`."""
        assert self.is_running, "the driver was ended before"
        self._last_id += 1
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"id": self._last_id, "call": call, "with": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(f"the driver has ended: {self.errors()}") from None
        return self._last_id

    def receive(self, number: int) -> dict[str, Any]:
        """Wait for the answer to a call: {"result": …} or {"error": …}."""
        return self._wait(lambda: self._answers.pop(number, None), f"an answer to call {number}")

    def event(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for an event; those before it are forgotten."""

        def taken() -> dict[str, Any] | None:
            while self._events:
                if is_wanted(event := self._events.pop(0)):
                    return event
                passed.append(event)
            return None

        passed: list[dict[str, Any]] = []
        return self._wait(taken, lambda: f"the event; others came: {passed}")

    def has_event(self, name: str) -> bool:
        """Return whether such an event has come and was not waited for."""
        with self._arrival:
            return any(event["event"] == name for event in self._events)

    def end(self, how: str) -> int:
        """End the driver by "eof", "term" or "kill" and return its status (a signal's is negative)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.is_running = False
        try:
            {"eof": self._process.stdin.close, "term": self._process.terminate, "kill": self._process.kill}[how]()
            return self._process.wait(DEADLINE_S)  # by that way alone: its input stays open for a signal
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver did not end by {how}: {self.errors()}") from None
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()

    def errors(self) -> str:
        """Return what the driver wrote on stderr."""
        self._errors.seek(0)
        return self._errors.read()

    def close(self) -> None:
        """Forget the driver; kills it if it still runs."""
        if self.is_running:
            self.end("kill")
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                message = {"event": "not JSON", "line": line}
            with self._arrival:
                if "id" in message:
                    self._answers[message["id"]] = message
                else:
                    self._events.append(message)
                self._arrival.notify()
        with self._arrival:
            self._is_at_end = True
            self._arrival.notify()

    def _wait(self, found: Callable[[], dict[str, Any] | None], what: str | Callable[[], str]) -> dict[str, Any]:
        end = time.monotonic() + DEADLINE_S
        with self._arrival:
            while (one := found()) is None:
                left = end - time.monotonic()
                if self._is_at_end or left <= 0:
                    why = "the driver ended" if self._is_at_end else f"{DEADLINE_S:g} s passed"
                    raise AssertionError(f"{why} without {what if isinstance(what, str) else what()}\n{self.errors()}")
                self._arrival.wait(left)
        return one


SIGNAL_STATUSES = {-signal.SIGTERM, 128 + signal.SIGTERM}
"""How a program that minds SIGTERM may end by it: re-raised, or as a shell would report it."""
