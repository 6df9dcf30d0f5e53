"""Command-line entry point: finds the command, and maps every outcome to an exit status and one line.

0 done, 1 a clear "no", 2 wrong usage, 3 no daemon answers. Nothing heavy is imported here, nor by the modules that
`portd lease` and `portd run` need: other programs wait for them to start.
"""

from __future__ import annotations

import sys

from portd.cli import commands
from portd.cli.options import UsageError, help_text, read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from portd._client.errors import Problem
    from portd.cli.options import Command

DONE, NO, USAGE, NO_DAEMON = range(4)
INTERRUPTED = 130
OPTION_OF_FIELD = {"service": "SERVICE", "tags": "--tag", "metadata": "--meta", "seconds": "--ttl"}
"""Fields of a request whose option has another name."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line (sys.argv's by default) and return the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    _tolerate_unencodable()
    try:
        return _run(words)
    except UsageError as error:
        _complain(str(error), code="invalid_request", as_json=_wants_json(words))
        return USAGE
    except BrokenPipeError:
        _discard_stdout()
        return DONE
    except OSError as error:  # mostly a full disk
        _complain(error.strerror or str(error), code="failed", as_json=_wants_json(words))
        _discard_stdout()
        return NO
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in {"-h", "--help"}:
        print(commands.overview())
        return DONE if words else USAGE
    if words[0] in {"-V", "--version", "version"}:
        from portd import __version__

        print(f"portd {__version__}")
        return DONE
    command = commands.find(words[0])
    if command is None:
        raise UsageError(f"there is no command {words[0]!r}{commands.suggestion(words[0])}")
    values = read(command, words[1:])
    if values["help"]:
        print(help_text(command))
        return DONE
    from portd._client.errors import PortdError

    try:
        status = command.run(values)
        sys.stdout.flush()
    except PortdError as error:
        return _refused(command, error, as_json=bool(values.get("json")))
    return status


def _refused(command: Command, error: Exception, *, as_json: bool) -> int:
    """Print an error on stderr: one line, or a problem document."""
    from portd._client import documents
    from portd._client.errors import DaemonUnavailable, InvalidUrl, Problem, ProtocolError
    from portd.cli.printing import escaped

    if isinstance(error, Problem):
        if as_json:
            print(escaped(documents.encode(error.document).decode()), file=sys.stderr)
        else:
            _complain(_explained(command, error), code=error.code)
        return USAGE if error.code == "invalid_request" else NO
    is_away = isinstance(error, (DaemonUnavailable, ProtocolError))
    code = getattr(error, "code", "no_daemon" if is_away else "failed")
    _complain(str(error), code=code, as_json=as_json)
    return NO_DAEMON if is_away else USAGE if isinstance(error, InvalidUrl) else NO


def _explained(command: Command, problem: Problem) -> str:
    """Write a problem as one sentence that names the option at fault instead of the field."""
    field = next((part for part in (problem.pointer or "").split("/") if part and not part.isdecimal()), "")
    if not field:
        return problem.detail
    name = OPTION_OF_FIELD.get(field, "--" + field.replace("_", "-"))
    known = {option.name for option in command.options} | set(command.arguments)
    return f"{name}: {problem.detail}" if name in known else f"{problem.detail} (at {problem.pointer})"


def _complain(text: str, *, code: str, as_json: bool = False) -> None:
    from portd.cli import printing

    printing.error(text, code=code, as_json=as_json)


def _wants_json(words: Sequence[str]) -> bool:
    """Return whether a command line that may not be parsable asks for JSON."""
    own = words[: words.index("--")] if "--" in words else words
    return "--json" in own or "-j" in own


def _tolerate_unencodable() -> None:
    """Escape what the locale's encoding can't express (Latin-1, C), instead of failing half-way through the output."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard_stdout() -> None:
    """Let the last flush go nowhere: stdout can't be written, or its reader has gone (`portd ls | head -1`)."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
