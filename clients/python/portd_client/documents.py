"""JSON documents, through the C half of the standard library's json alone.

`import json` compiles regular expressions that only its pure-Python half needs: 6 ms, as much as everything else that a
command does here. Where `_json` is missing (another Python than CPython), json itself does the work.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def _fast() -> tuple[Callable[[str], tuple[Any, int]], Callable[[Any], str]]:
    import _json

    class Rules:
        """What json.decoder.JSONDecoder() means by its defaults."""

        strict = True
        object_hook = object_pairs_hook = None
        parse_float = float
        parse_int = int
        memo: dict[str, str] = {}

        @staticmethod
        def parse_constant(name: str) -> float:
            raise ValueError(f"{name} is not JSON")

    def refuse(value: object) -> object:
        raise TypeError(f"{type(value).__name__} has no JSON form")

    scan = _json.make_scanner(Rules)  # type: ignore[arg-type]  # it reads attributes only
    write = _json.make_encoder({}, refuse, _json.encode_basestring_ascii, None, ":", ",", False, False, False)
    return (lambda text: scan(text, 0)), (lambda value: "".join(write(value, 0)))


def _plain() -> tuple[Callable[[str], tuple[Any, int]], Callable[[Any], str]]:
    import json

    return json.JSONDecoder().raw_decode, json.dumps


try:
    _scan, _write = _fast()
except (ImportError, AttributeError, TypeError):
    _scan, _write = _plain()


def decode(data: bytes) -> Any:
    """Decode one JSON document; raises ValueError on anything else."""
    text = data.decode("utf-8").strip()
    try:
        value, end = _scan(text)
    except StopIteration:
        raise ValueError("not JSON") from None
    if end != len(text):
        raise ValueError("more than one JSON document")
    return value


def encode(value: Any) -> bytes:
    """Encode a value as JSON, without spaces; raises TypeError or ValueError for what has no JSON form."""
    return _write(value).encode()
