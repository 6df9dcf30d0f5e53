"""The clients have the names of the README's table, and no others."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import portd_client
from portd_client import aio

HERE = Path(__file__).parent
COLUMNS = {"python": 1, "node": 2, "go": 3}


def surface(subject: str, language: str) -> set[str]:
    """Return the names of one table of the README: of the `package`, a `lease`, or a `client`."""
    text = (HERE / "README.md").read_text()
    (rows,) = re.findall(rf"^\| of (?:the|a) {subject} \|.*?\n\| ---.*?\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [row.strip("|").split("|")[COLUMNS[language]] for row in rows.splitlines()]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def public(subject: type) -> set[str]:
    """Return the public names of a class."""
    return {name for name in dir(subject) if not name.startswith("_")}


@pytest.mark.parametrize("lease", [portd_client.Lease, aio.AsyncLease])
def test_python_lease_has_the_tables_names(lease: type) -> None:
    assert public(lease) == surface("lease", "python")


@pytest.mark.parametrize("client", [portd_client.Client, aio.AsyncClient])
def test_python_client_has_the_tables_names(client: type) -> None:
    assert public(client) == surface("client", "python")


def test_python_package_has_the_tables_functions_in_both_worlds() -> None:
    names = surface("package", "python")
    assert {name for name in portd_client.__all__ if inspect.isfunction(getattr(portd_client, name))} == names
    assert all(inspect.isfunction(getattr(aio, name)) for name in names - {"release_on_signal"})


def test_python_calls_accept_the_same_arguments_in_both_worlds() -> None:
    for name in surface("client", "python"):
        blocking, awaited = getattr(portd_client.Client, name), getattr(aio.AsyncClient, name)
        if inspect.isfunction(blocking):
            assert list(inspect.signature(blocking).parameters) == list(inspect.signature(awaited).parameters), name


@pytest.mark.skipif(shutil.which("node") is None, reason="not installed: node")
def test_node_has_the_tables_names() -> None:
    code = """
    const portd = await import("./lib/index.js");
    const names = (kind) => Object.getOwnPropertyNames(kind.prototype).filter((name) => name !== "constructor");
    const isClass = (value) => /^class/.test(String(value));
    console.log(JSON.stringify({lease: names(portd.Lease), client: names(portd.Client),
      package: Object.keys(portd).filter((name) => !isClass(portd[name]))}));
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", code],
        cwd=HERE.parent / "node",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for subject, names in json.loads(done.stdout).items():
        assert set(names) == surface(subject, "node"), subject


@pytest.mark.skipif(shutil.which("go") is None, reason="not installed: go")
def test_go_has_the_tables_names() -> None:
    text = "\n".join(
        path.read_text() for path in (HERE.parent / "go").glob("*.go") if not path.name.endswith("_test.go")
    )
    for subject, receiver in {"lease": "Lease", "client": "Client"}.items():
        names = set(re.findall(rf"^func \(\w+ \*{receiver}\) ([A-Z]\w*)\(", text, re.MULTILINE))
        assert names == surface(subject, "go"), subject
    functions = set(re.findall(r"^func ([A-Z]\w*)\(ctx|^func (ReleaseOnSignal)", text, re.MULTILINE))
    assert {one or other for one, other in functions} == surface("package", "go")
