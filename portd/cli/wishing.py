"""From the options of `portd lease` and `portd run` to the wish that is sent: what a lease may be asked for."""

from __future__ import annotations

from portd.cli.options import Option, UsageError, duration, number, pair, port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CHECK_MAIN_FIELD = {"http": "path", "grpc": "service"}
"""The field that a check's first word without `=` fills: `http:/healthz`."""
CHECK_KINDS = ("http", "tcp", "grpc", "listen", "report", "command")


def check(text: str) -> dict[str, Any]:
    """Read KIND[:k=v,…] into a check: `http:/healthz`, `http:/healthz,interval=5`, `tcp`, `report:ttl=30`."""
    kind, _, rest = text.partition(":")
    if kind not in CHECK_KINDS:
        raise ValueError(f"a check is one of {', '.join(CHECK_KINDS)}, like http:/healthz or tcp:interval=5")
    document: dict[str, Any] = {"kind": kind}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key.startswith("/"):
            if kind == "command":
                key, value = "command", part
            elif kind in CHECK_MAIN_FIELD:
                key, value = CHECK_MAIN_FIELD[kind], part
            else:
                raise ValueError(f"{part!r}: KEY=VALUE is wanted")
        document[key] = _check_value(key, value)
    return document


def _check_value(key: str, value: str) -> Any:
    if key in {"interval", "timeout", "start_period", "ttl"}:
        return duration(value) if value != "0" else 0
    if key in {"rise", "fall"}:
        return number(value)
    if key == "expect_status":
        return [number(part) for part in value.split("+")]
    if key in {"tls", "tls_verify"}:
        return {"true": True, "false": False}.get(value, value)
    return value.split() if key == "command" else value


OPTIONS = (
    Option("--port", "N", "the port to have, if it is free; another is granted when it is not", port),
    Option("--exact", "", "that port or none: exit status 1 when it is taken"),
    Option("--instance", "NAME", "which of the service's processes this is; the lowest free SERVICE-N unless given"),
    Option("--protocol", "PROTO", "tcp (the default), udp, or both: the same number for the two"),
    Option(
        "--address", "ADDR", "what the service binds: 127.0.0.1 (the default), 0.0.0.0, ::, or an address of this host"
    ),
    Option("--own-address", "", "a loopback address that no other instance has, on which any port is free to take"),
    Option("--pool", "NAME", "the pool of ports to take from"),
    Option("--hold", "KIND", "shared (the default), exclusive (nobody can bind it: by handoff only), or none"),
    Option("--ttl", "SECONDS", "the lease ends unless it is renewed in time; else it ends with its process", duration),
    Option("--pid", "PID", "the process that the lease belongs to", number),
    Option("--tag", "TAG", "a tag that look-ups can ask for", many=True),
    Option("--meta", "KEY=VALUE", "metadata, shown to whoever looks the service up", pair, many=True),
    Option(
        "--check",
        "KIND[:K=V,…]",
        "a health check: http:/healthz, tcp, grpc, listen, report:ttl=30; more as "
        "interval=5,timeout=2,rise=2,fall=3,start_period=10",
        check,
    ),
    Option("--announce", "TYPE", "announce it on the LAN as a DNS-SD service, _http._tcp for example", bare=True),
)


def wish(values: dict[str, Any]) -> dict[str, Any]:
    """Make the wish for the main endpoint; raises UsageError for options that contradict each other."""
    if values["own_address"] and values["address"] not in {None, "own"}:
        raise UsageError("--own-address and --address exclude each other")
    if values["exact"] and values["port"] is None:
        raise UsageError("--exact needs --port")
    made: dict[str, Any] = {"service": values["service"]}
    for name in ("instance", "protocol", "address", "port", "pool", "hold", "ttl", "pid", "check"):
        if values.get(name) is not None:
            made[name] = values[name]
    if values["exact"]:
        made["exact"] = True
    if values["own_address"]:
        made["address"] = "own"
    if values["tag"]:
        made["tags"] = values["tag"]
    if values["meta"]:
        made["metadata"] = dict(values["meta"])
    if values["announce"] is not None:
        made["announce"] = values["announce"] if values["announce"] is True else {"type": values["announce"]}
    return made
