"""`kill -9` at any moment under load, 500 times: `lost`, `doubled` and `risen` must be 0."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from tests.e2e.torture import torture

ROUNDS: Final = 500


async def measure(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Return one row of counts; takes about a second for each round."""
    return [await asyncio.to_thread(torture, rounds)]
