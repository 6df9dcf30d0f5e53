"""What a command takes, as data: one table both reads the words of a command line and writes its help.

argparse and what it needs cost 8 ms before the first word is read, half of what `portd lease` may take. This module must
not know any command.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

HELP_WIDTH = 100
"""Columns of a help text; terminals narrower than this wrap it themselves."""
HELP_COLUMN = 26


class UsageError(Exception):
    """The words make no command; the message says which, and what would."""


class Option:
    """One `--option`. Without a `metavar` it is a switch.

    `read` turns the word into a value, and raises ValueError with a reason. `many` gathers a list. `bare` is the value
    of an option whose word may be missing: the word is there when `=` says so, or when the next one begins with `_`, as
    only DNS-SD types do.
    """

    __slots__ = ("bare", "help", "key", "many", "metavar", "name", "read")

    def __init__(
        self,
        name: str,
        metavar: str,
        help: str,
        read: Callable[[str], Any] = str,
        *,
        many: bool = False,
        bare: Any = None,
    ) -> None:
        self.name = name
        self.key = name.lstrip("-").replace("-", "_")
        self.metavar = metavar
        self.help = help
        self.read = read
        self.many = many
        self.bare = bare


class Command:
    """One command. `takes` names its words: "PORT", "[SERVICE]" may be missing, "-- COMMAND" takes all after `--`.

    `about` is what the help says below the usage line; `run` gets the values by key and returns the exit status.
    """

    __slots__ = ("about", "name", "options", "run", "summary", "takes")

    def __init__(
        self,
        name: str,
        takes: Sequence[str],
        summary: str,
        run: Callable[[dict[str, Any]], int],
        options: Sequence[Option] = (),
        about: str = "",
    ) -> None:
        self.name = name
        self.takes = tuple(takes)
        self.summary = summary
        self.run = run
        self.options = (*options, HELP)
        self.about = about


HELP = Option("--help", "", "show this and do nothing else")
JSON = Option("--json", "", "print JSON; errors as problem documents")


def read(command: Command, words: Sequence[str]) -> dict[str, Any]:
    """Read the words that follow a command's name: every option and word by its key, missing ones None, False or [].

    Raises UsageError. A `--help` anywhere before `--` ends the reading.
    """
    known = {option.name: option for option in command.options}
    values: dict[str, Any] = {
        option.key: [] if option.many else None if option.metavar else False for option in command.options
    }
    plain: list[str] = []
    rest = list(words)
    command_words: list[str] | None = None
    while rest:
        word = rest.pop(0)
        if word == "--":
            command_words = rest
            break
        if not word.startswith("-") or word == "-":
            plain.append(word)
            continue
        name, equals, value = word.partition("=")
        option = known.get({"-h": "--help", "-j": "--json"}.get(name, name))
        if option is None:
            raise UsageError(f"portd {command.name} has no option {name}{_closest(name, known)}")
        _take(option, value if equals else None, rest, values)
        if values["help"]:
            return values
    _place(command, plain, command_words, values)
    return values


def number(text: str) -> int:
    """Read a whole number, 0 or more."""
    if not text.isascii() or not text.isdecimal():
        raise ValueError("a whole number is wanted")
    return int(text)


def port(text: str) -> int:
    """Read a port number."""
    value = number(text)
    if not 1 <= value <= 65535:
        raise ValueError("ports are 1 to 65535")
    return value


def duration(text: str) -> float:
    """Read seconds, or a number with s, m, h or d."""
    factor = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    try:
        value = float(text[:-1] if factor else text) * (factor or 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise ValueError("seconds are wanted, or a number with s, m, h or d")
    return value


def pair(text: str) -> tuple[str, str]:
    """Read KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError("KEY=VALUE is wanted")
    return key, value


def help_text(command: Command) -> str:
    """Write a command's help."""
    takes = " ".join(word for word in command.takes if not word.startswith("-- "))
    tail = "".join(f" {word}…" for word in command.takes if word.startswith("-- "))
    lines = [f"usage: portd {command.name}{' ' + takes if takes else ''} [options]{tail}", "", command.summary + "."]
    if command.about:
        lines += ["", *command.about.strip().splitlines()]
    lines += ["", "options:"]
    for option in command.options:
        metavar = f"[={option.metavar}]" if option.bare is not None else f" {option.metavar}" if option.metavar else ""
        lines += _described(option.name + metavar, option.help + (" (repeatable)" if option.many else ""))
    return "\n".join(lines)


def _described(left: str, right: str) -> list[str]:
    """Set a description beside a name, wrapped."""
    lines, line = [], ""
    for word in right.split():
        if line and HELP_COLUMN + len(line) + len(word) >= HELP_WIDTH:
            lines.append(line)
            line = ""
        line += (" " if line else "") + word
    lines.append(line)
    first = f"  {left}"
    gap = " " * HELP_COLUMN
    start = [first.ljust(HELP_COLUMN) + lines[0]] if len(first) < HELP_COLUMN else [first, gap + lines[0]]
    return start + [gap + line for line in lines[1:]]


def _take(option: Option, value: str | None, rest: list[str], values: dict[str, Any]) -> None:
    if not option.metavar:
        if value is not None:
            raise UsageError(f"{option.name} takes no value")
        values[option.key] = True
        return
    if value is None and option.bare is not None:
        value = rest.pop(0) if rest and rest[0].startswith("_") else None
        if value is None:
            values[option.key] = option.bare
            return
    if value is None:
        if not rest or rest[0] == "--":
            raise UsageError(f"{option.name} needs {option.metavar}")
        value = rest.pop(0)
    try:
        taken = option.read(value)
    except ValueError as error:
        raise UsageError(f"{option.name} {value!r}: {error}") from None
    if option.many:
        values[option.key].append(taken)
    else:
        values[option.key] = taken


def _place(command: Command, plain: list[str], command_words: list[str] | None, values: dict[str, Any]) -> None:
    usage = f"usage: portd {command.name} {' '.join(command.takes)}"
    for word in command.takes:
        key = word.strip("[]- ").lower()
        if word.startswith("-- "):
            if not command_words:
                raise UsageError(f"the command to run is missing: put it after '--' ({usage}…)")
            values[key], command_words = command_words, None
        elif plain:
            values[key] = _plain_value(word, plain.pop(0))
        elif word.startswith("["):
            values[key] = None
        else:
            raise UsageError(f"{word} is missing ({usage})")
    if extra := plain + (command_words or []):
        raise UsageError(f"{extra[0]!r} is one word too many ({usage})")


def _plain_value(word: str, text: str) -> Any:
    if word.strip("[]") != "PORT":
        return text
    try:
        return port(text)
    except ValueError as error:
        raise UsageError(f"PORT {text!r}: {error}") from None


def _closest(name: str, known: dict[str, Option]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(name, known, 1)
    return f"; did you mean {found[0]}?" if found else ", see --help"
