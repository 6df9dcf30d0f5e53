"""Every case, in every language that this machine has."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from clients.conformance.languages import LANGUAGES, command
from clients.conformance.runner import Case, Play, Stages, cases


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("case", cases().values(), ids=lambda case: case.name)
def test_conformance(case: Case, language: str, stages: Stages, workshop: Path) -> None:
    if why := LANGUAGES[language].missing:
        pytest.skip(why)
    if "root" in case.needs and os.geteuid():
        pytest.skip("only root can start a process of another user")
    if missing := LANGUAGES[language].cannot & set(case.needs):
        pytest.skip(f"{language} can't: {', '.join(missing)}")
    with ExitStack() as stack:
        Play(case, command(language, workshop), stages(case), stack).play()
