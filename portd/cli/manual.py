"""The manual pages portd(1) and portd.toml(5), from the options tables and from `Settings` (man(7)).

`python -m portd.cli.manual DIRECTORY` writes them; `portd install` and the Debian package install them.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect as types

from portd import __version__
from portd.cli import commands
from portd.cli.options import Command
from portd.config import Settings

DESCRIPTION = "leases ports to the processes of a host"
FILES = (
    ("/etc/portd/portd.toml, ~/.config/portd/portd.toml", "The configuration: portd.toml(5)."),
    ("/run/portd/portd.sock, $XDG_RUNTIME_DIR/portd/portd.sock", "HTTP, for clients on this host."),
    ("/run/portd/handoff.sock", "The handoff of bound sockets."),
    ("/var/lib/portd/portd.db, ~/.local/state/portd/portd.db", "Leases and their history."),
)
ENVIRONMENT = (
    ("PORTD_URL", "The daemon: unix:///path/portd.sock or http://host:port."),
    ("PORTD_TOKEN", "A bearer token for a daemon on another host; in a service, its lease's token."),
    ("PORT, HOST, PORTD_LEASE", "Set by portd run for its command; PORT_NAME and so on for other endpoints."),
)
STATUSES = (
    ("0", "Done."),
    ("1", "A clear no: nothing found, port taken, refused."),
    ("2", "Wrong usage."),
    ("3", "No daemon answers."),
    ("126, 127", "portd run: the command can't be executed, or is not found."),
)


def pages() -> dict[str, str]:
    """Return the pages by file name."""
    return {"portd.1": _program_page(), "portd.toml.5": _settings_page()}


def write(directory: Path) -> None:
    """Write the pages as DIRECTORY/man1/portd.1 and DIRECTORY/man5/portd.toml.5."""
    for name, text in pages().items():
        path = directory / f"man{name[-1]}" / name
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _program_page() -> str:
    lines = [*_head("portd", "1", DESCRIPTION), ".SH SYNOPSIS", ".B portd", ".I COMMAND", "\\&..."]
    lines += [
        ".SH DESCRIPTION",
        "portd is a daemon that leases ports to processes, knows which process has which port,",
    ]
    lines += ["checks their health, and announces them over HTTP, DNS and multicast DNS. The same program is its"]
    lines += ["client. A lease ends when its process exits, or when it is released."]
    by_name = {command.name: command for command in commands.every()}
    for title, modules in commands.GROUPS.items():
        lines.append(f".SH {_text(title.upper())}")
        for name in modules:
            lines += _command(by_name[name])
    lines += [".SH EXIT STATUS", *_table(STATUSES), ".SH ENVIRONMENT", *_table(ENVIRONMENT)]
    lines += [".SH FILES", *_table(FILES), ".SH SEE ALSO", ".BR portd.toml (5)"]
    return "\n".join(lines) + "\n"


def _command(command: Command) -> list[str]:
    lines = [f".SS {_text(command.usage)}", _text(command.summary + ".")]
    if command.about.strip():
        lines += [".PP", ".nf", *(_text(line) for line in command.about.strip("\n").rstrip().splitlines()), ".fi"]
    for option in command.options:
        repeatable = " (repeatable)" if option.many else ""
        lines += [".TP", f"\\fB{_text(option.usage)}\\fR", _text(option.help + repeatable)]
    return lines


def _settings_page() -> str:
    lines = [*_head("portd.toml", "5", "configuration of portd"), ".SH DESCRIPTION"]
    lines += ["A TOML file; every setting has a default. An unknown setting is an error.", "SIGHUP re\\-reads it, and"]
    lines += ["the log names the settings that need a restart.", ".B portd serve \\-\\-check\\-config"]
    lines += ["reports mistakes with their lines."]
    tables: list[str] = []
    plain: list[str] = []
    for field in types.type_info(Settings).fields:  # type: ignore[attr-defined]  # a StructType
        section, heading = table_of(field.type, field.encode_name)
        if section is None:
            plain += _setting(field)
            continue
        tables += [f".SH {_text(heading)}", _text(" ".join((inspect.getdoc(section) or "").split()).replace("`", ""))]
        for setting in types.type_info(section).fields:  # type: ignore[attr-defined]
            tables += _setting(setting)
            nested, _ = table_of(setting.type, "")
            for inner in types.type_info(nested).fields if nested else ():  # type: ignore[attr-defined]
                tables += _setting(inner, f"{setting.encode_name}.")
    lines += [".SH SETTINGS OUTSIDE OF TABLES", *plain, *tables, ".SH SEE ALSO", ".BR portd (1)"]
    return "\n".join(lines) + "\n"


def table_of(kind: types.Type, name: str) -> tuple[type | None, str]:
    """Return the table's type and heading; None for what is no table."""
    if isinstance(kind, types.StructType):
        return kind.cls, f"[{name}]"
    if isinstance(kind, types.DictType) and isinstance(kind.value_type, types.StructType):
        return kind.value_type.cls, f"[{name}.NAME]"
    if isinstance(kind, types.VarTupleType) and isinstance(kind.item_type, types.StructType):
        return kind.item_type.cls, f"[[{name}]]"
    return None, ""


def _setting(field: types.Field, prefix: str = "") -> list[str]:
    default = field.default if field.default is not msgspec.NODEFAULT else None
    written = "" if default is None or default == "" else f"; default {to_toml(default)}"
    return [".TP", f"\\fB{_text(prefix + field.encode_name)}\\fR", _text(f"{type_in_words(field.type)}{written}")]


def type_in_words(kind: types.Type) -> str:
    """Write a type in words, with its bounds."""
    match kind:
        case types.BoolType():
            return "true or false"
        case types.IntType() | types.FloatType():
            low, high = (kind.ge if kind.ge is not None else kind.gt), kind.le
            bounds = f" from {low:g} to {high:g}" if low is not None and high is not None else ""
            return ("a whole number" if isinstance(kind, types.IntType) else "a number") + bounds
        case types.StrType():
            return "a string"
        case types.LiteralType():
            return "one of " + ", ".join(to_toml(value) for value in kind.values)
        case types.UnionType():
            return " or ".join(type_in_words(one) for one in kind.types if not isinstance(one, types.NoneType))
        case types.VarTupleType():
            return f"a list, each {type_in_words(kind.item_type)}"
        case types.DictType():
            return f"a table, each value {type_in_words(kind.value_type)}"
        case types.StructType():
            return "a table"
        case _:
            raise TypeError(f"no words for {kind}")


def to_toml(value: Any) -> str:
    """Write a default as TOML does."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(to_toml(one) for one in value) + "]"
    return f"{value:g}" if isinstance(value, float) and value < 1e6 else str(value)


def _head(name: str, section: str, description: str) -> list[str]:
    return [f'.TH {name.upper()} {section} "" "portd {__version__}"', ".SH NAME", f"{_text(name)} \\- {description}"]


def _table(rows: tuple[tuple[str, str], ...]) -> list[str]:
    return [line for name, text in rows for line in (".TP", f"\\fB{_text(name)}\\fR", _text(text))]


def _text(text: str) -> str:
    """Escape text for roff: backslashes, hyphens that people copy, and control characters at the start of a line."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    write(Path(sys.argv[1]))
