"""schemathesis, by the API's own document: no server error, no answer beside the schema, nothing malformed accepted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import MakeDaemon

STATEFUL = "positive_data_acceptance"
"""The one check that is left out: it takes every refusal but 401, 403, 404, 409 and 429 of well-formed data for a
mistake, and the contract answers 410 for an ended lease, 422 for an address that the LAN can't reach."""


def test_schemathesis_finds_nothing(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    host, port = make_daemon(port_count=2500).start().tcp  # so many that none of its grants finds the pool empty
    run = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"http://{host}:{port}/openapi.json",
            "--max-examples",
            "10",
            "--phases",
            "examples,coverage,fuzzing",
            "--seed",
            "1",
            "--exclude-checks",
            STATEFUL,
            "--exclude-path",
            "/v1/events",
            "--request-timeout",
            "10",
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
