"""The field's words: no text in the tree uses a word that the glossary in CONTRIBUTING.md replaces.

Protocol names and texts of others are not searched; `ALLOWED` names the few lines that must quote a word.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SEARCHED = (
    *("portd/**/*.py", "portd/web/**/*", "tests/**/*.py", "systemd/**/*", "docs/**/*.md", "*.md"),
    *(f"clients/**/*.{ending}" for ending in ("py", "go", "js", "mjs", "ts", "md", "toml")),
)
NEVER = {
    r"mend(s|ed|ing)?": "fix",
    r"(un)?fold(s|ed|ing)?": "checkpoint",
    r"nudge(s|d)?": "wake",
    r"stranger(s|'s)?": "foreign process",
    r"by chance": "at random",
    r"at its word|kernel's (own )?word|by its word|own word": "per the kernel",
    r"told": "reported, notified, logged",
    r"wish(es|ed)?": "request",
    r"doubt(s|ed)?": "mark unwritable",
    r"tend(s|ed)?": "run due timers",
    r"vouches": "identifies",
    r"a look at|another look|looks? soon|to look at it|next look|due_looks?": "poll, check, query",
    r"this room|room of (its|their) own": "module",
    r"guest(s)?": "peer",
    r"fast ?lane|long way": "fast path, normal path",
    r"word too many": "unexpected argument",
    r"in (its|each other's|the) way": "conflict",
    r"nobody there": "no instances",
}
"""Pattern to what the field says instead."""
ALLOWED = {"CONTRIBUTING.md": r"\| .+ \| .+ \|"}
"""Lines that may contain the words, by file: the glossary itself."""


def files() -> list[Path]:
    found = {path for pattern in SEARCHED for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(
        path
        for path in found
        if path != Path(__file__) and "node_modules" not in path.parts and path.suffix not in (".png", ".svg")
    )


@pytest.mark.parametrize("word", NEVER)
def test_text_uses_the_fields_words(word: str) -> None:
    pattern = re.compile(rf"(?<![A-Za-z])({word})(?![A-Za-z])", re.IGNORECASE)
    hits = []
    for path in files():
        name = str(path.relative_to(ROOT))
        allowed = re.compile(ALLOWED.get(name, r"\Z."))
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line) and not allowed.fullmatch(line):
                hits.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not hits, f"{len(hits)} lines say {word!r}, the field says: {NEVER[word]}\n" + "\n".join(hits[:200])
