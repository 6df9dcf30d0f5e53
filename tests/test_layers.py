"""The direction of imports: core <- seams <- service <- daemon; adapters know core and seams, never each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import portd

ROOT = Path(portd.__file__).parent
SERVICE_ROOMS = {"portd.service", "portd.grants", "portd.journal", "portd.feed", "portd.clocks"}
IMPURE = {"asyncio", "datetime.now", "os", "pathlib", "random", "secrets", "select", "socket", "subprocess",
          "threading", "time", "aiohttp", "aiosqlite", "sqlite3", "zeroconf"}
"""What the core must not touch: I/O, clocks, chance."""


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Yield every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def allowed(room):
    """Return the packages of portd's that a room may import, and why."""
    if room.startswith("portd.core"):
        return {"portd.core"}, "the core knows nothing but itself"
    if room == "portd.seams":
        return {"portd.core", "portd.seams"}, "seams speak of the core's nouns"
    if room in SERVICE_ROOMS:
        return {"portd.core", "portd.seams", *SERVICE_ROOMS}, "the service knows the world through the seams alone"
    if room.startswith("portd.adapters.http"):
        return {"portd.core", "portd.seams", "portd.adapters.http", "portd.__version__", *SERVICE_ROOMS}, \
            "the HTTP room also receives the service"
    if room.startswith("portd.adapters."):
        technology = ".".join(room.split(".")[:3])
        handoff = SERVICE_ROOMS if technology == "portd.adapters.handoff" else set()
        return {"portd.core", "portd.seams", "portd.__version__", technology, *handoff}, \
            "an adapter knows core and seams, never another adapter"
    if room.startswith("portd.testing"):
        return {"portd.core", "portd.seams", "portd.testing", *SERVICE_ROOMS}, "the fakes stand in for adapters"
    if room.startswith("portd.cli") or room == "portd.__main__":
        return {"portd.cli", "portd.__version__", "portd.daemon", "portd.config", "portd.core"}, \
            "the command line speaks to the daemon as every client does"
    if room in ("portd.config", "portd.logs"):
        return {"portd.core"}, "settings are data"
    if room == "portd.doors":
        return {"portd.core", "portd.config"}, "doors are sockets, whatever is spoken on them"
    return {"portd"}, "the composition root knows everybody"


@pytest.mark.parametrize(("path", "room"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_room_imports_only_what_lies_below_it(path, room):
    may, why = allowed(room)
    for name in imports(path):
        if name == "portd" or not name.startswith("portd."):
            continue
        inside = any(name == base or name.startswith(base + ".") for base in may)
        assert inside or room == "portd.daemon", f"{room} imports {name}: {why}"


@pytest.mark.parametrize(("path", "room"), [(p, r) for p, r in modules() if r.startswith("portd.core")],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_the_core_is_pure(path, room):
    found = {name.partition(".")[0] for name in imports(path)} & IMPURE
    assert not found, f"{room} imports {found}: the core takes time and chance as arguments, and does no I/O"
    assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(ast.parse(path.read_text())))


def test_only_the_daemon_knows_everybody():
    for path, room in modules():
        if room not in ("portd.daemon", "portd.cli.serving", "portd.cli.doctor"):
            assert "portd.daemon" not in set(imports(path)), f"{room} imports the composition root"
