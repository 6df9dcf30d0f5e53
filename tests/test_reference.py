"""The generated pages say what their sources say, and links between pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.conftest import make_daemon, own_daemon, place  # noqa: F401  (fixtures)
from tests.e2e.harness import ROOT, Daemon
from tests.reference import DOCS, fetch_document, pages


def test_generated_pages_agree_with_their_sources(own_daemon: Daemon) -> None:  # noqa: F811
    stale = [name for name, text in pages(fetch_document(own_daemon)).items() if (DOCS / name).read_text() != text]
    assert not stale, f"run `python -m tests.reference`: {', '.join(stale)}"


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")]), ids=lambda path: path.name)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
