"""The options of `portd lease`, `portd run` and `portd adopt`, and the lease request that they make."""

from __future__ import annotations

from portd.cli.options import Option, UsageError, choice, duration, label, number, pair, port, starts_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CHECK_MAIN_FIELD = {"http": "path", "grpc": "service"}
"""The field that a check's first part without `=` fills: `http:/healthz`."""
CHECK_KINDS = ("http", "tcp", "grpc", "listen", "report", "command")
DURATIONS = {"interval", "timeout", "start_period", "start_interval", "ttl"}
WAIT_S = 60.0
"""Seconds that a bare `--wait` waits."""


def check(text: str) -> dict[str, Any]:
    """Read KIND[:K=V,…] into a check: `http:/healthz`, `http:/healthz,interval=5`, `tcp`, `report:ttl=30`.

    A dot makes a nested field: `tls.server_name=orders.example`, `headers.Accept=text/plain`.
    """
    kind, _, rest = text.partition(":")
    if kind.startswith("/"):
        raise ValueError(f"write http:{text} for an HTTP check of that path")
    if kind not in CHECK_KINDS:
        raise ValueError(f"a check is one of {', '.join(CHECK_KINDS)}: http:/healthz, tcp:interval=5")
    document: dict[str, Any] = {"kind": kind}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key.startswith("/"):
            if kind == "command":
                key, value = "command", part
            elif kind in CHECK_MAIN_FIELD:
                key, value = CHECK_MAIN_FIELD[kind], part
            else:
                raise ValueError(f"{part!r}: expected KEY=VALUE")
        outer, dot, inner = key.partition(".")
        if dot:
            nested = document.setdefault(outer, {})
            if not isinstance(nested, dict):
                raise ValueError(f"{outer!r} and {key!r} contradict each other")
            nested[inner] = _check_value(inner, value)
        else:
            document[key] = _check_value(key, value)
    if kind == "http" and not str(document.get("path", "/")).startswith("/"):
        raise ValueError(f"a path starts with '/': http:/{document['path']}")
    if kind == "http" and str(document.get("path", "")).startswith("//"):
        path = "/" + str(document["path"]).lstrip("/").partition("/")[2]
        raise ValueError(f"give the path alone, the check goes to the lease's own address: http:{path}")
    return document


def check_of_endpoint(text: str) -> tuple[str, dict[str, Any]]:
    """Read NAME=CHECK: `admin=http:/healthz`."""
    name, equals, rest = text.partition("=")
    if not equals or ":" in name:
        raise ValueError("expected NAME=CHECK: admin=http:/healthz")
    return label(name), check(rest)


def ports(text: str) -> Any:
    """Read ports in order of preference: `3000`, `3000,3001`, `8000-8010`; one number stays a number."""
    found: list[int | str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not dash:
            found.append(port(part))
        elif port(first) > port(last):
            raise ValueError(f"{part} ends before it begins")
        else:
            found.append(f"{port(first)}-{port(last)}")
    return found[0] if len(found) == 1 else found


def in_ports(number: int, wanted: Any) -> bool:
    """Return whether a port is among those that `--port` gave."""
    for part in wanted if isinstance(wanted, list) else [wanted]:
        first, _, last = str(part).partition("-")
        if int(first) <= number <= int(last or first):
            return True
    return False


def _check_value(key: str, value: str) -> Any:
    if key in DURATIONS:
        return duration(value) if value != "0" else 0
    if key in {"rise", "fall"}:
        return number(value)
    if key == "expect_status":
        return [number(part) for part in value.split("+")]
    if key in {"tls", "tls_verify", "verify"}:
        return {"true": True, "false": False}.get(value, value)
    return value.split() if key == "command" else value


PORT = Option("--port", "N[,N…]", "the preferred port, or several: 3000,3001,8000-8010; the first free one", ports)
PID = Option("--pid", "PID", "the process that the lease belongs to", number)
TTL = Option("--ttl", "SECONDS", "end the lease unless it is renewed in time (30, 5m, 1h)", duration)
REQUEST = (
    PORT,
    Option("--exact", "", "fail when no port given by --port is free; exit status 1"),
    Option(
        "--wait",
        "SECONDS",
        f"wait for an exact port, the instance's previous port or a free one ({WAIT_S:g} s)",
        duration,
        bare=WAIT_S,
        starts_value=starts_duration,
    ),
    Option("--instance", "NAME", "name of this process of the service (the lowest free SERVICE-N)", label),
    Option("--protocol", "PROTO", "tcp (default), udp, or both: one number for the two", choice("tcp", "udp", "both")),
    Option(
        "--address",
        "ADDR",
        "the address that the service binds: 127.0.0.1 (default), localhost (127.0.0.1 and ::1), 0.0.0.0, :: or "
        "another address of this host",
    ),
    Option("--own-address", "", "lease a loopback address of the instance's own, where any port is free"),
    Option("--pool", "NAME", "the pool of ports (default)", label),
    Option(
        "--hold",
        "KIND",
        "shared (default): programs that set SO_REUSEADDR can bind; none: for programs that report 'address in use' "
        "with the default; exclusive: only portd can open the port, and hands it over (--socket)",
        choice("shared", "none", "exclusive"),
    ),
)
SHOWN = (
    Option("--tag", "TAG", "a tag to select by", many=True),
    Option("--meta", "KEY=VALUE", "metadata, shown in lookups", pair, many=True),
    Option("--weight", "N", "share of the load among instances of one priority (1)", number),
    Option("--priority", "N", "lower is preferred, as in DNS SRV (0)", number),
    Option(
        "--check",
        "KIND[:K=V,…]",
        "a health check: http:/healthz, tcp, grpc, listen, report:ttl=30; also interval=5, timeout=2, rise=2, fall=3, "
        "start_period=10, endpoint=NAME, tls.server_name=NAME",
        check,
    ),
    Option(
        "--announce",
        "TYPE",
        "announce on the LAN as a DNS-SD service, _http._tcp for example",
        bare=True,
        starts_value=lambda word: word.startswith("_"),
    ),
)


def request(values: dict[str, Any]) -> dict[str, Any]:
    """Make the request for the main endpoint; raises UsageError for options that contradict each other."""
    if values.get("own_address") and values["address"] not in {None, "own"}:
        raise UsageError("--own-address and --address exclude each other")
    if values.get("exact") and values["port"] is None:
        raise UsageError("--exact needs --port")
    made: dict[str, Any] = {"service": values["service"]}
    for name in (
        "instance",
        "protocol",
        "address",
        "port",
        "pool",
        "hold",
        "ttl",
        "pid",
        "weight",
        "priority",
        "check",
    ):
        if values.get(name) is not None:
            made[name] = values[name]
    if values.get("exact"):
        made["exact"] = True
    if values.get("own_address"):
        made["address"] = "own"
    if values["tag"]:
        made["tags"] = values["tag"]
    if values["meta"]:
        made["metadata"] = dict(values["meta"])
    if values["announce"] is not None:
        made["announce"] = values["announce"] if values["announce"] is True else {"type": values["announce"]}
    return made
