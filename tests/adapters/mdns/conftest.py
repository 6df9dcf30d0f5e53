"""Fixtures of the multicast DNS tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3]))  # the bed is shared with the bench, and is no test module

from tests.adapters.mdns.bed import Lan


@pytest.fixture
def lan() -> Iterator[Lan]:
    """A LAN without hosts; they go when it goes."""
    with Lan() as made:
        yield made
