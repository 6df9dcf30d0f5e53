"""The variables that describe leases to programs, and how shells and .env files write them."""

from __future__ import annotations

import os

from portd._client.errors import PortdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

NEW_FILE_MODE = 0o600
"""The file has the lease's token."""
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:@%+,=")


def variables(leases: Mapping[str, Any], url: str) -> dict[str, str]:
    """Return the environment for leases by endpoint; endpoints other than `main` get theirs with _NAME."""
    first = next(iter(leases.values()))
    made = {"PORTD_URL": url, "HOST": first["address"]}
    for name, lease in leases.items():
        suffix = "" if name == "main" else "_" + name.upper().replace("-", "_")
        made[f"PORT{suffix}"] = str(lease["port"])
        made[f"PORTD_LEASE{suffix}"] = lease["id"]
        made[f"PORTD_TOKEN{suffix}"] = lease.get("token", "")
    return made


def shell_lines(made: Mapping[str, str]) -> str:
    """Write assignments that `eval` accepts in every POSIX shell."""
    return "".join(f"export {name}={_quoted(value)}\n" for name, value in made.items())


def write_env_file(path: str, made: Mapping[str, str]) -> None:
    """Set variables in a .env file, whole or not at all; other lines, and the file's mode, stay.

    Raises PortdError where the file can't be read or written.
    """
    target = os.path.realpath(path)  # a link stays one
    try:
        lines, mode = _read(target)
        kept = [line for line in lines if _name(line) not in made]
        text = "".join(f"{line}\n" for line in [*kept, *(f"{name}={_quoted(value)}" for name, value in made.items())])
        fresh = f"{target}.portd-{os.getpid()}"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, NEW_FILE_MODE)
        try:
            os.fchmod(descriptor, mode)
            with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
            os.replace(fresh, target)
        except BaseException:
            os.unlink(fresh)
            raise
    except OSError as error:
        raise PortdError(f"--env-file {path}: {error.strerror or error}") from error


def _read(path: str) -> tuple[list[str], int]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines(), os.fstat(file.fileno()).st_mode & 0o7777
    except FileNotFoundError:
        return [], NEW_FILE_MODE


def _name(line: str) -> str:
    return line.strip().removeprefix("export ").partition("=")[0].strip()


def _quoted(value: str) -> str:
    return value if value and not set(value) - PLAIN else "'" + value.replace("'", "'\\''") + "'"
