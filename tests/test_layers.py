"""The direction of imports: core <- leasing <- cluster <- wiring; adapters know core and seams, never each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import portd

ROOT = Path(portd.__file__).parent
ENGINE = {"portd.leasing"}
IMPURE = {
    "asyncio",
    "datetime.now",
    "os",
    "pathlib",
    "random",
    "secrets",
    "select",
    "socket",
    "subprocess",
    "threading",
    "time",
    "aiohttp",
    "aiosqlite",
    "sqlite3",
    "zeroconf",
}
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


def allowed(module):
    """Return the packages of portd's that a module may import, and why."""
    if module.startswith("portd.core"):
        return {"portd.core"}, "the core knows nothing but itself"
    if module == "portd.leasing.seams":
        return {"portd.core", "portd.leasing.seams"}, "seams speak of the core's nouns"
    if module.startswith("portd.leasing"):
        return {"portd.core", "portd.leasing"}, "the engine knows the world through its seams alone"
    if module.startswith("portd.cluster"):
        return {"portd.core", "portd.leasing", "portd.cluster"}, "the cluster watches the engine's events"
    if module.startswith("portd.adapters.http"):
        return {
            "portd.core",
            "portd.leasing.seams",
            "portd.adapters.http",
            "portd.__version__",
            *ENGINE,
        }, "the HTTP module also receives the service"
    if module == "portd.inspector":
        return set(), "the inspector has rights that no other code of portd may have"
    if module.startswith("portd.adapters."):
        technology = ".".join(module.split(".")[:3])
        callers = {"portd.adapters.handoff", "portd.adapters.portserver", "portd.adapters.consul"}
        handoff = ENGINE if technology in callers else set()
        if technology == "portd.adapters.etcd":
            handoff = {"portd.cluster"}  # the shell of its state machines, as the HTTP module is of the service's
        if technology == "portd.adapters.gateway":
            handoff = {"portd._client"}  # a process of its own: a client of the daemon like any other
        return {
            "portd.core",
            "portd.leasing.seams",
            "portd.__version__",
            technology,
            *handoff,
            *({"portd.inspector"} if technology == "portd.adapters.kernel" else ()),
        }, "an adapter knows core and seams, never another adapter"
    if module.startswith("portd.testing"):
        return {"portd.core", "portd.leasing.seams", "portd.testing", *ENGINE}, "the fakes stand in for adapters"
    if module == "portd.cli.gateway":
        return {
            "portd.cli",
            "portd.core",
            "portd._client",
            "portd.runtime",
            "portd.adapters.gateway",
        }, "it runs the gateway"
    if module.startswith("portd.cli") or module == "portd.__main__":
        return {
            "portd.cli",
            "portd.__version__",
            "portd.daemon",
            "portd.config",
            "portd.core",
            "portd._client",
        }, "the command line speaks to the daemon as every client does"
    if module in ("portd.config", "portd.logs"):
        return {"portd.core"}, "settings are data"
    if module == "portd.runtime":
        return {"portd.core"}, "the runtime serves any program"
    if module == "portd.pruning":
        return {
            "portd.adapters.sqlite",
            "portd.config",
            "portd.core",
            "portd.leasing",
        }, "pruning knows the store and when it grows"
    if module == "portd.listeners":
        return {"portd.core", "portd.config"}, "listeners are sockets, whatever is spoken on them"
    if module == "portd.condition":
        return {"portd.adapters", "portd.config", "portd.leasing"}, "it only reads what the parts say of themselves"
    return {"portd"}, "wiring and the daemon know everybody"


@pytest.mark.parametrize(("path", "module"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_what_lies_below_it(path, module):
    may, why = allowed(module)
    for name in imports(path):
        if name == "portd" or not name.startswith("portd."):
            continue
        inside = any(name == base or name.startswith(base + ".") for base in may)
        assert inside, f"{module} imports {name}: {why}"


@pytest.mark.parametrize(
    ("path", "module"),
    [(p, r) for p, r in modules() if r.startswith("portd.core")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_core_is_pure(path, module):
    found = {name.partition(".")[0] for name in imports(path)} & IMPURE
    assert not found, f"{module} imports {found}: the core takes time and chance as arguments, and does no I/O"
    assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize(("path", "module"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_portd_uses_its_private_copy_of_the_client(path, module):
    foreign = {name for name in imports(path) if name.partition(".")[0] == "portd_client"}
    assert not foreign, f"{module} imports {foreign}: it belongs to another distribution; import portd._client"


def test_nothing_imports_the_composition_root():
    for path, module in modules():
        if module not in ("portd.daemon", "portd.cli.serving", "portd.cli.doctor"):
            found = {"portd.daemon", "portd.wiring"} & set(imports(path))
            assert not found, f"{module} imports {found}"
