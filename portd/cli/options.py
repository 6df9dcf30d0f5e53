"""Options and arguments of commands, as data: one table parses a command line and writes its help.

argparse and its imports cost 8 ms, half of what `portd lease` may take. This module must not know any command.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

HELP_WIDTH = 80
"""Columns of a help text."""
HELP_COLUMN = 26
SHORT_OPTIONS = {"-h": "--help", "-j": "--json"}


class UsageError(Exception):
    """The command line is wrong; the message names the argument at fault and says what to type instead."""


class Option:
    """One `--option`. Without a `metavar` it is a switch.

    `read` turns the argument into a value, and raises ValueError with a reason. `many` collects a list. `bare` is the
    value of an option whose argument may be missing: it has one after `=`, or where `starts_value` accepts the next
    word of the command line.
    """

    __slots__ = ("bare", "help", "key", "many", "metavar", "name", "read", "starts_value")

    def __init__(
        self,
        name: str,
        metavar: str,
        help: str,
        read: Callable[[str], Any] = str,
        *,
        many: bool = False,
        bare: Any = None,
        starts_value: Callable[[str], bool] = lambda word: False,
    ) -> None:
        self.name = name
        self.key = name.lstrip("-").replace("-", "_")
        self.metavar = metavar
        self.help = help
        self.read = read
        self.many = many
        self.bare = bare
        self.starts_value = starts_value

    @property
    def usage(self) -> str:
        """Return the option as help and manual write it: `--port N`, `--wait[=SECONDS]`."""
        if self.bare is not None:
            return f"{self.name}[={self.metavar}]"
        return f"{self.name} {self.metavar}" if self.metavar else self.name


class Command:
    """One command.

    `arguments` names its positional arguments: "PORT"; "[SERVICE]" may be missing; "SERVICE…" is one or more;
    "-- COMMAND" is everything after `--`. `run` receives the values by key and returns the exit status. `refused` maps
    options that people try, and that this command has not, to what to do instead.
    """

    __slots__ = ("about", "arguments", "name", "options", "refused", "run", "summary")

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        summary: str,
        run: Callable[[dict[str, Any]], int],
        options: Sequence[Option] = (),
        about: str = "",
        refused: Mapping[str, str] = {},
    ) -> None:
        self.name = name
        self.arguments = tuple(arguments)
        self.summary = summary
        self.run = run
        self.options = (*options, HELP)
        self.about = about
        self.refused = refused

    @property
    def usage(self) -> str:
        """Return the usage line."""
        plain = " ".join(word for word in self.arguments if not word.startswith("-- "))
        tail = "".join(f" {word}…" for word in self.arguments if word.startswith("-- "))
        return f"portd {self.name}{' ' + plain if plain else ''} [options]{tail}"

    @property
    def runs_program(self) -> bool:
        """Return whether the command takes a program to run after `--`."""
        return any(word.startswith("-- ") for word in self.arguments)


HELP = Option("--help", "", "show this help and exit")
JSON = Option("--json", "", "print JSON; errors as problem documents")


def read(command: Command, words: Sequence[str]) -> dict[str, Any]:
    """Parse the words after a command's name: every option and argument by its key; missing ones are None, False or [].

    Raises UsageError. Parsing ends at a `--help` before `--`.
    """
    known = {option.name: option for option in command.options}
    values: dict[str, Any] = {
        option.key: [] if option.many else None if option.metavar else False for option in command.options
    }
    places = sum(not word.startswith("-- ") for word in command.arguments)
    plain: list[str] = []
    rest = list(words)
    program: list[str] | None = None
    while rest:
        word = rest.pop(0)
        if word == "--":
            program = rest
            break
        if not word.startswith("-") or word == "-":
            plain.append(_text(word))
            continue
        name, equals, value = _text(word).partition("=")
        option = known.get(SHORT_OPTIONS.get(name, name))
        if option is None:
            if command.runs_program and len(plain) > places:
                raise _missing_separator(command, plain)
            raise UsageError(_unknown(command, name, known))
        _set(option, value if equals else None, rest, values)
        if values["help"]:
            return values
    _assign(command, plain, program, values)
    return values


def number(text: str) -> int:
    """Read a whole number, 0 or more."""
    if not text.isascii() or not text.isdecimal():
        raise ValueError("expected a whole number")
    return int(text)


def port(text: str) -> int:
    """Read a port number."""
    value = number(text)
    if not 1 <= value <= 65535:
        raise ValueError("ports are 1 to 65535")
    return value


def port_argument(text: str) -> int:
    """Read a port as people copy it: 8080, :8080, localhost:8080, [::1]:8080, http://localhost:8080/."""
    _, scheme, rest = text.partition("://")
    authority = (rest if scheme else text).partition("/")[0] if scheme else text
    try:
        return port(authority.rpartition(":")[2])
    except ValueError as error:
        if str(error).startswith("ports"):
            raise
        raise ValueError("expected a port: 8080, :8080 or localhost:8080") from None


def duration(text: str) -> float:
    """Read seconds, or a number with s, m, h or d."""
    factor = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    try:
        value = float(text[:-1] if factor else text) * (factor or 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise ValueError("expected seconds, or a number with s, m, h or d: 30, 5m")
    return value


def starts_duration(word: str) -> bool:
    """Return whether a word can only be a duration: `--wait 5s` needs no `=`."""
    try:
        duration(word)
    except ValueError:
        return False
    return word[0].isdecimal()


def pair(text: str) -> tuple[str, str]:
    """Read KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError("expected KEY=VALUE")
    return key, value


def choice(*names: str) -> Callable[[str], str]:
    """Make a reader of one of some names."""

    def one_of(text: str) -> str:
        if text not in names:
            raise ValueError(f"expected {', '.join(names[:-1])} or {names[-1]}")
        return text

    return one_of


def label(text: str) -> str:
    """Read a name that becomes a DNS label: of a service, an instance, an endpoint."""
    if is_label(text):
        return text
    better = "-".join("".join(char if char.isascii() and char.isalnum() else " " for char in text.lower()).split())[:63]
    hint = f"; {better!r} would do" if is_label(better) else ""
    raise ValueError(f"a name has 1 to 63 lower-case letters, digits and inner hyphens{hint}")


def is_label(text: str) -> bool:
    """Return whether a text is a DNS label in lower case (RFC 1123, section 2.1)."""
    plain = text.replace("-", "a")
    return (
        0 < len(text) <= 63
        and plain.isascii()
        and plain.isalnum()
        and plain == plain.lower()
        and text[0] != "-"
        and text[-1] != "-"
    )


def help_text(command: Command) -> str:
    """Write a command's help."""
    lines = [f"usage: {command.usage}", "", command.summary + "."]
    if command.about:
        lines += ["", *command.about.strip("\n").rstrip().splitlines()]
    lines += ["", "options:"]
    for option in command.options:
        lines += described(option.usage, option.help + (" (repeatable)" if option.many else ""))
    return "\n".join(lines)


def described(left: str, right: str) -> list[str]:
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


def _set(option: Option, value: str | None, rest: list[str], values: dict[str, Any]) -> None:
    if not option.metavar:
        if value is not None:
            raise UsageError(f"{option.name} accepts no value")
        values[option.key] = True
        return
    if value is None and option.bare is not None:
        if not rest or not option.starts_value(rest[0]):
            values[option.key] = option.bare
            return
        value = rest.pop(0)
    if value is None:
        if not rest or rest[0] == "--":
            raise UsageError(f"{option.name} needs {option.metavar}")
        value = _text(rest.pop(0))
    try:
        parsed = option.read(value)
    except ValueError as error:
        raise UsageError(f"{option.name} {value!r}: {error}") from None
    if option.many:
        values[option.key].append(parsed)
    else:
        values[option.key] = parsed


def _assign(command: Command, plain: list[str], program: list[str] | None, values: dict[str, Any]) -> None:
    """Give the positional arguments their keys."""
    usage = f"usage: {command.usage}"
    for word in command.arguments:
        key = word.strip("[]-… ").lower()
        if word.startswith("-- "):
            if program is None and plain:
                raise _missing_separator(
                    command, [values[name.strip("[]").lower()] for name in command.arguments[:1]] + plain
                )
            if not program:
                raise UsageError(f"the command to run is missing: put it after '--' ({usage})")
            values[key], program = program, None
        elif word.endswith("…"):
            if not plain:
                raise UsageError(f"{word.rstrip('…')} is missing ({usage})")
            values[key], plain = [_argument(word, text) for text in plain], []
        elif plain:
            values[key] = _argument(word, plain.pop(0))
        elif word.startswith("["):
            values[key] = None
        else:
            raise UsageError(f"{word} is missing ({usage})")
    if extra := plain + (program or []):
        raise UsageError(f"unexpected argument {extra[0]!r} ({usage})")


_READERS: dict[str, Callable[[str], Any]] = {
    "PORT": port_argument,
    "SERVICE": label,
    "PID": number,
    "ACTION": choice("status"),
    "SHELL": choice("bash", "zsh", "fish"),
}
"""How positional arguments of these names are read."""


def _argument(word: str, text: str) -> Any:
    name = word.strip("[]…")
    try:
        return _READERS.get(name, str)(text)
    except ValueError as error:
        raise UsageError(f"{name} {text!r}: {error}") from None


def _text(word: str) -> str:
    """Return a word of the command line; raises UsageError where its bytes are no text (PEP 383)."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{word!a} is not valid UTF-8") from None
    return word


def _missing_separator(command: Command, plain: Sequence[str]) -> UsageError:
    return UsageError(f"put the command after '--': portd {command.name} {plain[0]} -- {' '.join(plain[1:])} …")


def _unknown(command: Command, name: str, known: Mapping[str, Option]) -> str:
    if name in command.refused:
        return f"{name}: {command.refused[name]}"
    from difflib import get_close_matches

    found = get_close_matches(name, known, 1)
    hint = f"; did you mean {found[0]}?" if found else f"; 'portd {command.name} --help' lists them"
    return f"portd {command.name} has no option {name}{hint}"
