"""`portd completion`: scripts that complete portd's commands, options and names in bash, zsh and fish.

They are written from the options tables, so they are never out of date; names of services and instances come from
`portd ls` when Tab is pressed.
"""

from __future__ import annotations

from portd.cli import commands
from portd.cli.options import Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

VALUES = {
    "--protocol": "tcp udp both",
    "--hold": "shared none exclusive",
    "--scope": "local cluster lan all",
    "--check": "http:/ tcp grpc listen report:",
}
"""What the arguments of options may be, where there are few."""
FILES = {"--config", "--env-file"}
NAMES = {"SERVICE": 1, "X": 2}
"""Columns of `portd ls` in a pipe that have the names for an argument."""

BASH = """\
# bash completion of portd: eval "$(portd completion bash)"
_portd() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} at
  COMPREPLY=()
  for ((at = 2; at < COMP_CWORD; at++)); do
    if [[ ${{COMP_WORDS[at]}} == -- ]]; then
      if declare -F _command_offset >/dev/null; then _command_offset $((at + 1)); fi
      return
    fi
  done
  if ((COMP_CWORD == 1)) || [[ $command == help ]]; then
    mapfile -t COMPREPLY < <(compgen -W '{commands}' -- "$word")
    return
  fi
  case $previous in
{values}
    {files}) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
  esac
  case $command in
{options}
  esac
}}
complete -o default -F _portd portd
"""
ZSH = """\
#compdef portd
# zsh completion of portd: eval "$(portd completion zsh)", or this file as _portd in a directory of $fpath
_portd() {{
  local -a commands options
  commands=(
{commands}
  )
  if (( CURRENT == 2 )) || [[ $words[2] == help ]]; then
    _describe command commands
    return
  fi
  local at=${{words[(i)--]}}
  if (( at < CURRENT )); then
    shift $at words
    (( CURRENT -= at ))
    _normal
    return
  fi
  case $words[CURRENT-1] in
{values}
    {files}) _files; return ;;
  esac
  case $words[2] in
{options}
  esac
}}
if [[ $funcstack[1] == _portd ]]; then _portd "$@"; else compdef _portd portd; fi
"""
FISH = """\
# fish completion of portd: portd completion fish | source
complete -c portd -f
{commands}
{options}
"""


def completion(values: dict[str, Any]) -> int:
    """Print the completion script of a shell."""
    print(script(values["shell"]), end="")
    return 0


def script(shell: str) -> str:
    """Write the completion script of bash, zsh or fish."""
    write: dict[str, Callable[[list[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return write[shell](list(commands.every()))


def _bash(every: list[Command]) -> str:
    lines = [
        f"    {name}) mapfile -t COMPREPLY < <(compgen -W '{words}' -- \"$word\"); return ;;"
        for name, words in VALUES.items()
    ]
    return BASH.format(
        commands=" ".join(command.name for command in every),
        values="\n".join(lines),
        files="|".join(sorted(FILES)),
        options="\n".join(
            f"    {command.name}) mapfile -t COMPREPLY < <(compgen -W '{_options(command)}'{_bash_names(command)} "
            '-- "$word") ;;'
            for command in every
        ),
    )


def _bash_names(command: Command) -> str:
    return f'" $({_listed(command)})"' if _listed(command) else ""


def _zsh(every: list[Command]) -> str:
    options = []
    for command in every:
        described = " ".join(_zsh_quoted(f"{option.name}:{option.help}") for option in command.options)
        names = f'; compadd -- ${{(f)"$({_listed(command)})"}}' if _listed(command) else ""
        options.append(f"    {command.name}) options=({described}); _describe -o option options{names} ;;")
    return ZSH.format(
        commands="\n".join("    " + _zsh_quoted(f"{command.name}:{command.summary}") for command in every),
        values="\n".join(f"    {name}) compadd -- {words}; return ;;" for name, words in VALUES.items()),
        files="|".join(sorted(FILES)),
        options="\n".join(options),
    )


def _fish(every: list[Command]) -> str:
    first = "complete -c portd -n __fish_use_subcommand -a"
    made = []
    for command in every:
        seen = f"-n '__fish_seen_subcommand_from {command.name}'"
        if _listed(command):
            made.append(f"complete -c portd {seen} -a '({_listed(command)})'")
        for option in command.options:
            value = " -r" if option.metavar and option.bare is None else ""
            value += " -F" if option.name in FILES else f" -a '{VALUES[option.name]}'" if option.name in VALUES else ""
            made.append(f"complete -c portd {seen} -l {option.name[2:]}{value} -d {_fish_quoted(option.help)}")
    return FISH.format(
        commands="\n".join(f"{first} {command.name} -d {_fish_quoted(command.summary)}" for command in every),
        options="\n".join(made),
    )


def _options(command: Command) -> str:
    return " ".join(option.name for option in command.options)


def _listed(command: Command) -> str:
    """Return the shell command that lists names for a command's first argument; "" where there is none."""
    first = command.arguments[0].strip("[]…") if command.arguments else ""
    return f"portd ls 2>/dev/null | cut -f{NAMES[first]} | cut -d: -f1 | sort -u" if first in NAMES else ""


def _zsh_quoted(text: str) -> str:
    name, colon, help = text.partition(":")
    return "'" + (name + colon + help.replace(":", "\\:")).replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


COMMANDS = (
    Command(
        "completion",
        ["SHELL"],
        "Print the completion script of bash, zsh or fish",
        completion,
        about="""
bash, in ~/.bashrc:               eval "$(portd completion bash)"
zsh, in ~/.zshrc after compinit:  eval "$(portd completion zsh)"
fish:  portd completion fish >~/.config/fish/completions/portd.fish""",
    ),
)
