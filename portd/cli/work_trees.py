"""The work tree that a command runs in: its directory, its branch, and the service that it is.

Reads git's files instead of running git: `portd run` must start fast, and in a directory without git too.
"""

from __future__ import annotations

import os

from portd.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OWN_FILE = ".portd.toml"
"""Names a work tree's services: `service = "web"`, `[services.web] endpoints = ["main", "metrics"]`."""
LABEL_MAX = 63


class WorkTree:
    """A git work tree, or a plain directory. `is_linked`: made by `git worktree add`; `main` is its repository's."""

    __slots__ = ("branch", "is_linked", "main", "root")

    def __init__(self, root: str, main: str, branch: str | None, *, is_linked: bool) -> None:
        self.root = root
        self.main = main
        self.branch = branch
        self.is_linked = is_linked

    @property
    def fields(self) -> dict[str, str]:
        """Return the fields that the tree adds to a lease request."""
        return {"workspace": self.root, **({"branch": self.branch} if self.branch else {})}

    @property
    def instance(self) -> str | None:
        """Return the instance that services of this tree are: the branch in a linked one, else None."""
        return to_label(self.branch or os.path.basename(self.root)) or None if self.is_linked else None


def find(directory: str) -> WorkTree:
    """Return the work tree that a directory is in; without git the directory itself."""
    for root in _upwards(os.path.realpath(directory)):
        git = os.path.join(root, ".git")
        if os.path.isdir(git):
            return WorkTree(root, root, _branch(git), is_linked=False)
        if pointer := _read(git):  # gitdir: /path/of/main/.git/worktrees/NAME (gitrepository-layout(5))
            git = os.path.join(root, pointer.removeprefix("gitdir:").strip())
            common = _read(os.path.join(git, "commondir"))
            is_linked = common is not None  # a submodule has no commondir
            main = os.path.dirname(os.path.normpath(os.path.join(git, common.strip()))) if common else root
            return WorkTree(root, main, _branch(git), is_linked=is_linked)
    return WorkTree(os.path.realpath(directory), os.path.realpath(directory), None, is_linked=False)


def infer_service(tree: WorkTree, directory: str) -> str:
    """Return the service of a directory: of the nearest file that names one, else of the repository's directory.

    Raises UsageError where nothing gives a name, or a file that would give one can't be parsed.
    """
    for place in _upwards(os.path.realpath(directory)):
        for file, read in ((OWN_FILE, _own_name), ("package.json", _node_name), ("pyproject.toml", _python_name),
                           ("go.mod", _go_name)):  # fmt: skip
            path = os.path.join(place, file)
            if (text := _read(path)) is None:
                continue
            try:
                name = to_label(read(text))
            except (ValueError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"{path} can't be parsed ({error}): name the service: portd run SERVICE -- …"
                ) from None
            if name:
                return name
        if place == tree.root:
            break
    if name := to_label(os.path.basename(tree.main)):
        return name
    raise UsageError("no service can be inferred from this directory: name it: portd run SERVICE -- …")


def to_label(text: str) -> str:
    """Turn a name into a DNS label: lower case, runs of other characters as one hyphen; "" where nothing is left."""
    words = "".join(char if char.isascii() and char.isalnum() else " " for char in text.lower()).split()
    return "-".join(words)[:LABEL_MAX].rstrip("-")


def read_own(tree: WorkTree) -> dict[str, Any]:
    """Return the content of the tree's `.portd.toml`, {} without one; raises UsageError for a broken one."""
    import tomllib

    path = os.path.join(tree.root, OWN_FILE)
    text = _read(path)
    try:
        return {} if text is None else tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: {error}") from None


def _own_name(text: str) -> str:
    import tomllib

    document = tomllib.loads(text)
    services = document.get("services", {})
    return str(document.get("service") or (next(iter(services)) if len(services) == 1 else ""))


def _node_name(text: str) -> str:
    import json

    return str(json.loads(text).get("name") or "").rpartition("/")[2]  # @scope/name


def _python_name(text: str) -> str:
    import tomllib

    document = tomllib.loads(text)
    return str(document.get("project", {}).get("name") or document.get("tool", {}).get("poetry", {}).get("name") or "")


def _go_name(text: str) -> str:
    for line in text.splitlines():
        if line.startswith("module "):
            parts = line.removeprefix("module ").strip().strip('"').split("/")
            is_version = len(parts) > 1 and parts[-1][:1] == "v" and parts[-1][1:].isdecimal()
            return parts[-2] if is_version else parts[-1]
    return ""


def _branch(git: str) -> str | None:
    """Return the branch that is checked out; None where HEAD is detached."""
    head = (_read(os.path.join(git, "HEAD")) or "").strip()
    return head.removeprefix("ref: refs/heads/") or None if head.startswith("ref: refs/heads/") else None


def _upwards(directory: str) -> list[str]:
    found = [directory]
    while (parent := os.path.dirname(found[-1])) != found[-1]:
        found.append(parent)
    return found


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None
