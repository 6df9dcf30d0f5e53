"""What the work tree says of a service: its name, its branch, its directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.cli import work_trees
from portd.cli.options import UsageError, label
from tests.cli.bed import ROOT, Daemon

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="not installed: git")


def git(directory: Path, *words: str) -> None:
    """Run git without the user's settings."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, "-C", str(directory), *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit."""
    made = tmp_path / "Web Shop"
    made.mkdir()
    git(made, "init")
    git(made, "commit", "--allow-empty", "-m", "x")
    return made


def infer(directory: Path) -> str:
    return work_trees.infer_service(work_trees.find(str(directory)), str(directory))


@given(st.text(max_size=100))
def test_any_name_becomes_a_label_or_nothing(text: str) -> None:
    if made := work_trees.to_label(text):
        assert label(made) == made


@pytest.mark.parametrize(
    ("file", "text", "service"),
    [
        ("package.json", '{"name": "@acme/Front_End"}', "front-end"),
        ("pyproject.toml", '[project]\nname = "My.App"', "my-app"),
        ("pyproject.toml", '[tool.poetry]\nname = "poems"', "poems"),
        ("go.mod", "// x\nmodule example.com/acme/orders/v2\n", "orders"),
        (".portd.toml", 'service = "named"', "named"),
        (".portd.toml", "[services.only]", "only"),
        ("package.json", '{"private": true}', "web-shop"),
    ],
)
def test_the_service_is_named_by_the_nearest_file(tmp_path: Path, file: str, text: str, service: str) -> None:
    directory = tmp_path / "Web Shop"
    directory.mkdir()
    (directory / file).write_text(text)
    assert infer(directory) == service


@needs_git
def test_a_file_above_the_work_tree_does_not_count(repository: Path) -> None:
    (repository.parent / "package.json").write_text('{"name": "above"}')
    (repository / "src").mkdir()
    assert infer(repository / "src") == "web-shop"


def test_a_broken_file_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text("[1]")
    with pytest.raises(UsageError, match=r"package\.json"):
        infer(tmp_path)


@needs_git
def test_a_second_work_tree_has_the_branch_as_instance(repository: Path) -> None:
    linked = repository.parent / "elsewhere"
    git(repository, "worktree", "add", "-b", "fix/UI", str(linked))
    first, second = work_trees.find(str(repository)), work_trees.find(str(linked))
    assert (first.instance, first.branch) == (None, "main")
    assert (second.instance, second.branch, second.root) == ("fix-ui", "fix/UI", str(linked))
    assert infer(linked) == infer(repository) == "web-shop"


@needs_git
def test_run_without_a_service_leases_for_the_work_tree(daemon: Daemon, repository: Path) -> None:
    linked = repository.parent / "elsewhere"
    git(repository, "worktree", "add", "-b", "fix-ui", str(linked))
    source = "import os, sys; sys.stdout.write(os.environ['PORTD_LEASE'] + ' ' + os.environ['PORTD_PUBLIC_URL'])"
    seen = []
    for directory in (repository, linked):
        done = subprocess.run(
            [sys.executable, "-m", "portd", "run", "--", sys.executable, "-c", source],
            cwd=directory,
            env=daemon.environ,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        lease_id, url = done.stdout.split()
        lease: dict[str, object] = {**daemon.client.lease(lease_id)}
        seen.append((lease["service"], lease["instance"], lease["workspace"], lease["branch"], url))
    assert seen == [
        ("web-shop", "web-shop-1", str(repository), "main", "http://web-shop.localhost:7780"),
        ("web-shop", "fix-ui", str(linked), "fix-ui", "http://fix-ui.web-shop.localhost:7780"),
    ]


def test_who_shows_the_directory_of_a_lease(daemon: Daemon) -> None:
    running = daemon.start_portd("run", "shown-dir", "--", sys.executable, "-c", "print(1, flush=True); input()")
    try:
        assert running.stdout is not None
        running.stdout.readline()
        port = json.loads(daemon.portd("ls", "shown-dir", "--json").stdout)["leases"][0]["port"]
        assert str(ROOT) in daemon.portd("who", str(port)).stdout
    finally:
        running.communicate("\n", timeout=20)
