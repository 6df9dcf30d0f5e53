"""What people read when they type something else than portd accepts: the words that help, and the exit status."""

from __future__ import annotations

import json
import re

import pytest

from portd.__main__ import main
from portd.cli import commands
from portd.cli.options import help_text
from tests.cli.bed import Daemon
from tests.test_wording import NEVER

USAGE = 2


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command line that is wrong by itself, and return its one line."""
    status = main(words)
    written = capsys.readouterr()
    assert (status, written.out, written.err.count("\n")) == (USAGE, "", 1)
    return written.err


@pytest.mark.parametrize(
    ("words", "help"),
    [
        ("run web python3 -m http.server {port}", "put the command after '--': portd run web -- python3"),
        ("run web python3 app.py", "put the command after '--': portd run web -- python3 app.py"),
        ("run web --", "the command to run is missing"),
        ("run web --ttl 2 -- true", "lasts as long as COMMAND"),
        ("run web --pid 1 -- true", "belongs to COMMAND"),
        ("run web --name api -- true", "--instance"),
        ("run web --hold exclusive -- true", "--hold exclusive needs --socket"),
        ("run my_app -- true", "'my-app' would do"),
        ("run MyApp -- true", "'myapp' would do"),
        ("run web --endpoint Metrics -- true", "'metrics' would do"),
        ("run web --endpoint main:80 -- true", "--port"),
        ("run web --check http:healthz -- true", "a path starts with '/'"),
        ("run web --check http://localhost/healthz -- true", "http:/healthz"),
        ("run web --check /healthz -- true", "write http:/healthz"),
        ("run web --check magic -- true", "a check is one of http, tcp"),
        ("run web --check-endpoint admin=tcp -- true", "add --endpoint admin"),
        ("run web --endpoint bus:+x -- true", "expected a whole number"),
        ("run web --env 1x=2 -- true", "environment variable"),
        ("run web -- echo {port:metrics}", "add --endpoint metrics"),
        ("run web --port 3000,80a -- true", "expected a whole number"),
        ("lease web --port 8010-8000", "ends before it begins"),
        ("lease web --protocol http", "expected tcp, udp or both"),
        ("lease web --hold tight", "expected shared, none or exclusive"),
        ("lease web extra", "unexpected argument 'extra'"),
        ("lease web --prot 80", "did you mean --port?"),
        ("who web", "expected a port: 8080, :8080 or localhost:8080"),
        ("who 70000", "ports are 1 to 65535"),
        ("list", "did you mean 'ls'?"),
        ("runn web", "did you mean 'run'?"),
    ],
)
def test_wrong_usage_names_what_to_type(words: str, help: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert help in refused(capsys, *words.split())


def test_no_usage_message_shows_a_pattern_or_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["run", "My App", "--", "true"], ["lease", "a" * 64], ["lease", "-"], ["lease", "\udcff"]):
        text = refused(capsys, *words)
        assert not any(part in text for part in ("regex", "[a-z", "Traceback", "enum"))


def test_bytes_that_are_no_text_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not valid UTF-8" in refused(capsys, "lease", "web", "--tag", "\udcff")
    assert "not valid UTF-8" in refused(capsys, "ls", "\udce9")


@pytest.mark.parametrize("words", [("help", "run"), ("run", "--help"), ("run", "-h")])
def test_help_of_a_command_shows_its_options(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "--endpoint NAME" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "status", "help"),
    [
        (["python3 -m http.server {port}"], 127, "leave out the quotes, or use: sh -c"),
        (["cd", "/"], 127, "shell builtin"),
        (["PORT=1", "env"], 127, "write --env PORT=1 before '--'"),
        (["no-such-program-anywhere"], 127, "no such program in PATH"),
        (["/nonexistent/program"], 127, "no such file"),
        (["/etc/passwd"], 126, "chmod +x /etc/passwd"),
        (["/etc"], 126, "permission denied"),
    ],
)
def test_a_command_that_cannot_run_is_explained(daemon: Daemon, command: list[str], status: int, help: str) -> None:
    done = daemon.portd("run", "unrun", "--", *command)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert help in done.stderr


def test_problem_of_daemon_names_option_that_was_typed(daemon: Daemon) -> None:
    done = daemon.portd("lease", "web", "--ttl", "1", "--address", "192.0.2.77")
    assert done.returncode == USAGE
    assert done.stderr.startswith("portd: --address: ")


def test_x_is_an_id_an_instance_or_a_port(daemon: Daemon) -> None:
    for name in ("id", "instance", "port"):
        daemon.portd("lease", "aimed", "--instance", f"aimed-{name}", "--ttl", "60")
    by_name = {lease["instance"]: lease for lease in daemon.client.leases(service="aimed")}
    targets = by_name["aimed-id"]["id"], "aimed-instance", f"localhost:{by_name['aimed-port']['port']}"
    assert [daemon.portd("release", target).returncode for target in targets] == [0, 0, 0]
    assert not list(daemon.client.leases(service="aimed"))


def test_an_instance_name_means_all_of_its_endpoints(daemon: Daemon) -> None:
    for endpoint in ("main", "metrics"):
        daemon.portd("lease", "whole", "--instance", "whole-1", "--endpoint", endpoint, "--ttl", "60")
    assert daemon.portd("release", "whole-1").returncode == 0
    assert not list(daemon.client.leases(service="whole"))


def test_a_name_of_two_services_instances_is_not_guessed(daemon: Daemon) -> None:
    for service in ("left", "right"):
        daemon.portd("lease", service, "--instance", "twin", "--ttl", "60")
    done = daemon.portd("release", "twin")
    assert (done.returncode, done.stderr.count("\n")) == (USAGE, 1)
    assert daemon.portd("release", "left/twin").returncode == 0
    assert daemon.portd("release", "twin").returncode == 0


def test_service_name_in_place_of_instance_lists_its_instances(daemon: Daemon) -> None:
    daemon.portd("lease", "plural", "--ttl", "60")
    done = daemon.portd("release", "plural")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "plural-1" in done.stderr


@pytest.mark.parametrize("form", ["{}", ":{}", "localhost:{}", "127.0.0.1:{}", "[::1]:{}", "http://localhost:{}/x"])
def test_who_accepts_a_port_as_people_copy_it(daemon: Daemon, form: str) -> None:
    port = daemon.portd("lease", "copied", "--instance", "copied-1", "--ttl", "60").stdout.strip()
    assert "copied-1" in daemon.portd("who", form.format(port)).stdout


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_no_locale_breaks_output(daemon: Daemon, locale: str) -> None:
    daemon.portd("lease", "spoken", "--instance", "spoken-1", "--ttl", "60", "--meta", "name=Zoë\u202e\u009b")
    for words in (["ls"], ["ls", "--json"], ["who", "80"], ["services"], ["run", "--help"], ["ls", "naïve"]):
        done = daemon.portd(*words, LC_ALL=locale, PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
        assert "Traceback" not in done.stderr, done


def test_json_keeps_its_values_and_escapes_terminal_controls(daemon: Daemon) -> None:
    name = "Zoë\u202e\u009b\u2066"
    daemon.portd("lease", "escaped", "--ttl", "60", "--meta", f"name={name}")
    for encoding in ("utf-8", "latin-1"):
        text = daemon.portd("ls", "escaped", "--json", PYTHONIOENCODING=encoding).stdout
        assert not set(text) & set("\u202e\u009b\u2066\u007f")
        assert json.loads(text)["leases"][0]["metadata"]["name"] == name


def test_help_uses_the_fields_words() -> None:
    texts = [commands.overview(), *(help_text(command) for command in commands.every())]
    avoided = re.compile(rf"\b({'|'.join([*NEVER, 'tells?', 'somebody', 'asks?( for)?', 'finding'])})\b", re.IGNORECASE)
    found = [match.group() for text in texts for match in avoided.finditer(text)]
    assert not found


def test_help_fits_eighty_columns() -> None:
    for command in commands.every():
        assert max(map(len, help_text(command).splitlines())) <= 80, command.name


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (["lease", "Bad_Name", "--json"], USAGE, "invalid_request"),
        (["ls", "nobody-here", "--json"], 1, "not_found"),
        (["resolve", "nobody-here", "--json"], 1, "not_found"),
        (["wait", "nobody-here", "--timeout", "0.1", "--json"], 1, "not_found"),
        (["history", "1", "--json"], 1, "not_found"),
        (["release", "nobody-1", "--json"], 1, "not_found"),
    ],
)
def test_errors_with_json_are_problem_documents(daemon: Daemon, words: list[str], status: int, code: str) -> None:
    done = daemon.portd(*words)
    document = json.loads(done.stderr)
    assert (done.returncode, document["code"]) == (status, code)
    assert document["detail"]
