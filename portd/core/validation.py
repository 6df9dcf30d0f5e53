"""What is wrong with a document that failed validation, in words and as a JSON pointer.

msgspec names the rule that was broken as its types do (`Expected str matching regex …`). A person needs the field and
an example instead; this module has the words for every rule of `requests.py` and `model.py`.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

_AT: Final = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`(?P<where>[^`]*)`)?$", re.DOTALL)
_FIELD: Final = re.compile(r"(?:missing required|contains unknown) field `(?P<name>.*)`", re.DOTALL)
_LABELS: Final = frozenset({"service", "instance", "endpoint", "name"})
_WORDS: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern, re.DOTALL), words)
    for pattern, words in (
        (r"Object missing required field `(.*)`", "'{0}' is missing"),
        (r"Object contains unknown field `(.*)`", "'{0}' is not a known field"),
        (r"Expected `str` matching regex .*", "{field} has a character that is not allowed"),
        (r"Expected `str` of length >= 1", "{field} must not be empty"),
        (r"Expected `(?:str)` of length >= (\d+)", "{field} must have at least {0} characters"),
        (r"Expected `(?:str)` of length <= (\d+)", "{field} must have at most {0} characters"),
        (r"Expected `(?:array|object)` of length >= 1", "{field} must not be empty"),
        (r"Expected `(?:array|object)` of length >= (\d+)", "{field} must have at least {0} entries"),
        (r"Expected `(?:array|object)` of length <= (\d+)", "{field} must have at most {0} entries"),
        (r"Expected `(?:int|float)` >= (\S+)", "{field} must be at least {0}"),
        (r"Expected `(?:int|float)` <= (\S+)", "{field} must be at most {0}"),
        (r"Integer value out of range", "{field} is out of range"),
        (r"Number out of range", "{field} is out of range"),
        (r"Invalid enum value (.*)", "{field} can't be {0}"),
        (r"Invalid value (.*)", "{field} can't be {0}"),
        (r"Invalid RFC3339 encoded datetime", "{field} must be a time like 2026-01-31T12:00:00Z"),
    )
)
_KINDS: Final = {
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
    "null": "null",
    "datetime": "a time like 2026-01-31T12:00:00Z",
}
_EXPECTED: Final = re.compile(r"Expected `(?P<wanted>[^`]*)`(?:, got `(?P<got>[^`]*)`)?")


def explain(error: msgspec.ValidationError) -> tuple[str, str]:
    """Return what is wrong, as a sentence without a full stop, and a JSON pointer (RFC 6901) to where."""
    found = _AT.match(str(error))
    assert found is not None
    what, where = found["what"], found["where"] or "$"
    steps = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]|\[(?:\.\.\.)\]", where.removeprefix("$"))
    names = [name or index for name, index in steps if name or index]
    pointer = "".join(f"/{name}" for name in names)
    if field := _FIELD.search(what):
        pointer += "/" + field["name"].replace("~", "~0").replace("/", "~1")
    return _words(what, names), pointer


def _plain(value: str) -> str:
    """Write a number as people do."""
    return value.removesuffix(".0")


def _words(what: str, names: list[str]) -> str:
    """Say a rule of msgspec's in a person's words; `names` is the path to the field."""
    named = [name for name in names if not name.isdecimal()]
    field = named[-1] if named else "the body"
    if field in _LABELS and what.startswith("Expected `str` ") and ("regex" in what or "length" in what):
        return f"{field} must be 1 to 63 lower-case letters, digits and hyphens: try 'my-app'"
    if field == "path" and "regex" in what:
        return "path must begin with '/' and have no spaces or control characters"
    for pattern, words in _WORDS:
        if found := pattern.fullmatch(what):
            return words.format(*map(_plain, found.groups()), field=field)
    if found := _EXPECTED.fullmatch(what):
        wanted = " or ".join(
            dict.fromkeys(_KINDS.get(kind.strip(), kind.strip()) for kind in found["wanted"].split("|"))
        )
        got = _KINDS.get(found["got"] or "", "")
        return f"{field} must be {wanted}" + (f", not {got}" if got else "")
    return what
