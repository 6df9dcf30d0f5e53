"""`{port}` and the like in the command of `portd run` and the values of `--env`.

A pure function of text and leases. `${…}` is the shell's and stays; `{{port}}` is a literal `{port}`; other braces, as
in JSON or Go templates, stay as they are.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

NAMES = ("port", "host", "url")
SHOWN = "{port}, {host}, {url} and {port:NAME}"
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def fill(text: str, leases: Mapping[str, Any]) -> str:
    """Fill the placeholders in; `leases` are by endpoint, `main` among them. Unknown ones stay."""
    parts = []
    for literal, name in split(text):
        parts.append(literal)
        if name is not None:
            base, _, endpoint = name.partition(":")
            parts.append(_value(base, leases[endpoint or "main"]))
    return "".join(parts)


def split(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield literal text and the name of the placeholder after it (None at the end)."""
    literal, rest = "", text
    while (at := rest.find("{")) >= 0:
        literal += rest[:at]
        before, rest = rest[:at], rest[at:]
        is_escaped = rest.startswith("{{")
        name, end, after = rest[2 if is_escaped else 1 :].partition("}")
        if end and is_escaped and is_placeholder(name):
            literal += "{" + name + "}"
            rest = after.removeprefix("}")
        elif end and not is_escaped and is_placeholder(name) and not before.endswith("$"):
            yield literal, name
            literal, rest = "", after
        else:
            literal += "{"
            rest = rest[1:]
    yield literal + rest, None


def is_placeholder(name: str) -> bool:
    """Return whether `{name}` is filled in: port, host, url, port:NAME, url:NAME."""
    base, colon, endpoint = name.partition(":")
    return base in NAMES if not colon else base in ("port", "url") and bool(endpoint)


def missing_endpoint(texts: Sequence[str], endpoints: Sequence[str]) -> str | None:
    """Return the first placeholder of an endpoint that is not leased, as it was typed."""
    for text in texts:
        for _, name in split(text):
            if name is not None and ":" in name and name.partition(":")[2] not in endpoints:
                return "{" + name + "}"
    return None


def suspicious(texts: Sequence[str]) -> str | None:
    """Return the first `{word}` that looks like a mistyped placeholder: {PORT}, {prot}, {host:metrics}."""
    for text in texts:
        for literal, _ in split(text):
            for at, part in enumerate(literal.split("{")):
                word, end, _ = part.partition("}")
                if at and end and _is_near(word) and not literal.split("{")[at - 1].endswith(("$", "%")):
                    return "{" + word + "}"
    return None


def url(lease: Mapping[str, Any]) -> str:
    """Return the URL at which this host reaches a lease."""
    host = WILDCARDS.get(lease["address"], lease["address"])
    check = lease.get("check") or {}
    scheme = "udp" if lease["protocol"] == "udp" else "https" if check.get("tls") else "http"
    return f"{scheme}://[{host}]:{lease['port']}" if ":" in host else f"{scheme}://{host}:{lease['port']}"


def _value(base: str, lease: Mapping[str, Any]) -> str:
    if base == "port":
        return str(lease["port"])
    return str(lease["address"]) if base == "host" else url(lease)


def _is_near(word: str) -> bool:
    base = word.partition(":")[0]
    if not base.isascii() or not base.isalnum() or is_placeholder(word):
        return False
    if base.lower() in NAMES or base.lower().rstrip("0123456789") in NAMES:
        return True
    return len(base) == 4 and sorted(base.lower()) in (sorted("port"), sorted("host"))  # prot, hots
