"""A running daemon, as the end-to-end tests have one."""

from __future__ import annotations

from tests.e2e.conftest import _shared, daemon

__all__ = ["_shared", "daemon"]
