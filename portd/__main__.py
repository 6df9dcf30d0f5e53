"""The command line's door: finds the command, and turns every way that it can end into an exit status and one line.

0 done, 1 a clear "no", 2 wrong usage, 3 no daemon answers. Nothing heavy is imported here, nor by the rooms that
`portd lease` and `portd run` need: their whole run is as long as the start of other programs.
"""

from __future__ import annotations

import sys

from portd.cli import commands
from portd.cli.options import UsageError, help_text, read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

DONE, NO, USAGE, NO_DAEMON = range(4)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line (sys.argv's unless given); returns the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        return _run(words)
    except UsageError as error:
        print(f"portd: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        _discard_stdout()
        return DONE
    except OSError as error:  # a full disk, mostly
        print(f"portd: {error.strerror or error}", file=sys.stderr)
        _discard_stdout()
        return NO
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(commands.overview())
        return DONE if words else USAGE
    if words[0] in {"-V", "--version"}:
        from portd import __version__

        print(f"portd {__version__}")
        return DONE
    command = commands.find(words[0])
    if command is None:
        raise UsageError(f"there is no command {words[0]!r}{_closest(words[0])}")
    values = read(command, words[1:])
    if values["help"]:
        print(help_text(command))
        return DONE
    from portd._client.errors import PortdError

    try:
        status = command.run(values)
        sys.stdout.flush()
    except PortdError as error:
        return _refused(error, as_json=bool(values.get("json")))
    return status


def _refused(error: Exception, *, as_json: bool) -> int:
    """Tell an error on stderr, in one line or as a problem document."""
    from portd._client import documents
    from portd._client.errors import DaemonUnavailable, InvalidUrl, Problem, ProtocolError

    if isinstance(error, Problem):
        status = USAGE if error.code == "invalid_request" else NO
        document, text = error.document, error.detail + (f" (at {error.pointer})" if error.pointer else "")
    else:
        is_away = isinstance(error, (DaemonUnavailable, ProtocolError))
        status, text = NO_DAEMON if is_away else USAGE if isinstance(error, InvalidUrl) else NO, str(error)
        document = {"code": "no_daemon" if is_away else "failed", "detail": text}
    print(documents.encode(document).decode() if as_json else "portd: " + " ".join(text.split()), file=sys.stderr)
    return status


def _closest(name: str) -> str:
    from difflib import get_close_matches

    found = get_close_matches(name, commands.names(), 1)
    return f"; did you mean {found[0]!r}?" if found else "; 'portd --help' lists them"


def _discard_stdout() -> None:
    """Our output can't be written, or who read it has gone (`portd ls | head -1`): let the last flush go nowhere."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
