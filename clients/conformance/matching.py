"""Expectations: what a case writes down, compared with what came, and the variables that the two have in common.

A table expects at least its keys, a list exactly its elements in any order, anything else itself, but for strings:
`$name` expects the value of a variable (and gives it one where it has none yet), `~text` something with that text in
it, `!value` anything else than that value, and `*` anything but null.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Variables = dict[str, Any]
_NAME = re.compile(r"\$([a-z_]+)")


def filled(value: Any, variables: Mapping[str, Any]) -> Any:
    """Put the variables' values in; a string that is one variable becomes its value, a number too."""
    if isinstance(value, dict):
        return {key: filled(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, variables) for item in value]
    if not isinstance(value, str):
        return value
    if whole := _NAME.fullmatch(value):
        return variables[whole[1]]
    return _NAME.sub(lambda found: str(variables[found[1]]), value)


def mismatch(expected: Any, actual: Any, variables: Variables, where: str = "") -> str | None:
    """Say where and how something differs from what is expected; None when it fits, and then new variables are set."""
    trial = dict(variables)
    if (difference := _differs(expected, actual, trial, where)) is None:
        variables.update(trial)
    return difference


def _differs(expected: Any, actual: Any, variables: Variables, where: str) -> str | None:
    if isinstance(expected, dict):
        if not isinstance(actual, dict):
            return f"{where or 'it'} is {actual!r}, not a table"
        for key, item in expected.items():
            if difference := _differs(item, actual.get(key), variables, f"{where}.{key}".lstrip(".")):
                return difference
        return None
    if isinstance(expected, list):
        return _list_differs(expected, actual, variables, where)
    if isinstance(expected, str):
        return _text_differs(expected, actual, variables, where)
    return None if actual == expected else f"{where} is {actual!r}, not {expected!r}"


def _list_differs(expected: list[Any], actual: Any, variables: Variables, where: str) -> str | None:
    """Give each expected element the first that fits and is left: cases are written so that this finds the way."""
    if not isinstance(actual, list) or len(actual) != len(expected):
        return f"{where} is {actual!r}, not a list of {len(expected)}"
    left = list(actual)
    for item in expected:
        fitting = (one for one in left if mismatch(item, one, variables, where) is None)
        if (found := next(fitting, None)) is None:
            return f"{where} has nothing like {filled_where_known(item, variables)!r} in {left!r}"
        left.remove(found)
    return None


def _text_differs(expected: str, actual: Any, variables: Variables, where: str) -> str | None:
    if expected == "*":
        return f"{where} is null" if actual is None else None
    if (name := _NAME.fullmatch(expected)) and name[1] not in variables:
        variables[name[1]] = actual
        return None
    mark, text = (expected[0], expected[1:]) if expected[:1] in {"~", "!"} else ("", expected)
    wanted = filled(text, variables)
    if mark == "~":
        found = actual if isinstance(actual, str) else json.dumps(actual)
        return None if str(wanted) in found else f"{where} is {actual!r}, without {wanted!r}"
    if mark == "!":
        return f"{where} is {actual!r} again" if str(actual) == str(wanted) else None
    return None if actual == wanted else f"{where} is {actual!r}, not {wanted!r}"


def filled_where_known(value: Any, variables: Mapping[str, Any]) -> Any:
    """Put in what is known, for a message: unknown variables stay as they are written."""
    return filled(value, _Known(variables))


class _Known(dict[str, Any]):
    def __missing__(self, name: str) -> str:
        return f"${name}"
