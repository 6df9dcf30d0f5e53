"""Manual pages and completions agree with the tables that they are made from, and the programs that read them agree."""

from __future__ import annotations

import shutil
import subprocess

import msgspec
import pytest

from portd.cli import commands, manual
from portd.cli.completion import script
from portd.config import Settings

ROFF_HYPHEN = "\\-"


def plain(page: str) -> str:
    return page.replace(ROFF_HYPHEN, "-")


def test_the_program_page_has_every_command_and_option() -> None:
    page = plain(manual.pages()["portd.1"])
    for command in commands.every():
        assert f".SS {command.usage}" in page
        for option in command.options:
            assert f"\\fB{option.usage}\\fR" in page


def settings(section: type, prefix: str = "") -> list[str]:
    """Return the dotted keys below a section, tables of named tables as `section.NAME`."""
    return [prefix + field.encode_name for field in msgspec.structs.fields(section)]


def test_the_settings_page_has_every_table_and_setting() -> None:
    page = plain(manual.pages()["portd.toml.5"])
    for field in msgspec.inspect.type_info(Settings).fields:  # type: ignore[attr-defined]
        section, heading = manual.table_of(field.type, field.encode_name)
        assert f".SH {heading}" in page if section else f"\\fB{field.encode_name}\\fR" in page
        for key in settings(section) if section else ():
            assert f"\\fB{key}\\fR" in page.partition(f".SH {heading}\n")[2].partition("\n.SH ")[0]


@pytest.mark.parametrize("name", sorted(manual.pages()))
def test_groff_formats_the_pages_without_a_warning(name: str) -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    done = subprocess.run(
        ["groff", "-ww", "-man", "-Kutf8", "-Tutf8"],
        input=manual.pages()[name],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert "portd" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_have_every_command_and_option(shell: str) -> None:
    text = script(shell)
    for command in commands.every():
        assert command.name in text
        for option in command.options:
            assert (f"-l {option.name[2:]}" if shell == "fish" else option.name) in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_accepts_its_completion_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n"], input=script(shell), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (["portd", "re"], {"renew", "release", "resolve"}),
        (["portd", "lease", "web", "--own"], {"--own-address"}),
        (["portd", "run", "web", "--protocol", ""], {"tcp", "udp", "both"}),
        (["portd", "help", "dra"], {"drain"}),
    ],
)
def test_bash_completes_commands_options_and_values(line: list[str], offered: set[str]) -> None:
    words = " ".join(f"'{word}'" for word in line)
    ask = f"COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; _portd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", script("bash") + ask], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered
