"""Who calls, and what they may do: users, tokens, pages of other origins, other networks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from portd.adapters.http.authenticator import WRONG_TOKEN_DELAY_S
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import NOBODY, Connection, Daemon, Reply, dial, listen_on, owner, wait_for
from tests.e2e.puppet import Puppet, receive
from tests.support.certificates import issue

TOKEN = "a token of the configuration"
ADMIN = "an admin's token"
HERE, THERE = f"198.18.{os.getpid() % 256}.1", f"198.18.{os.getpid() % 256}.2"
"""Two ends of a link of this run's own (RFC 2544 keeps the block for tests)."""


@pytest.fixture
def nobody(daemon: Daemon) -> Iterator[Puppet]:
    """A process of another user."""
    with Puppet(daemon, uid=NOBODY) as puppet:
        yield puppet


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_another_user_changes_nothing_of_mine_and_with_token_everything(
    daemon: Daemon, nobody: Puppet, over: str
) -> None:
    lease = daemon.lease("mine", ttl=60, check={"kind": "report"})
    path = f"/v1/leases/{lease['id']}"
    changes = [
        ("POST", f"{path}/renew", None),
        ("POST", f"{path}/drain", {"drain": True}),
        ("PATCH", path, {"tags": ["theirs"]}),
        ("PUT", f"{path}/health", {"status": "critical"}),
        ("POST", f"{path}/decline", None),
        ("DELETE", path, None),
    ]
    before = daemon.show(lease["id"])
    for wrong in ({}, {"Authorization": "Bearer wrong"}):
        for method, place, body in changes:
            reply = nobody.call(method, place, body, over=over, **wrong)
            assert (reply.status, reply.code) == (403, "not_owner"), (method, place)
            assert "root" in reply.body["detail"]
    assert daemon.show(lease["id"])["revision"] == before["revision"]
    for method, place, body in changes:
        reply = nobody.call(method, place, body, over=over, Authorization=f"Bearer {lease['token']}")
        assert reply.status in (200, 204), (method, place, reply)


def test_a_token_opens_its_own_lease_and_no_other(daemon: Daemon, nobody: Puppet) -> None:
    one, other = daemon.lease("one", ttl=60), daemon.lease("other", ttl=60)
    reply = nobody.call("DELETE", f"/v1/leases/{one['id']}", Authorization=f"Bearer {other['token']}")
    assert (reply.status, reply.code) == (403, "not_owner")


def test_the_token_is_shown_once_and_not_in_the_store(daemon: Daemon) -> None:
    lease = daemon.lease("secret", ttl=60)
    assert "token" not in daemon.show(lease["id"])
    stored = b"".join(path.read_bytes() for path in daemon.directory.glob("portd.db*"))
    assert lease["id"].encode() in stored
    assert lease["token"].encode() not in stored


def test_another_user_reads_everything_but_programs_and_command_lines(daemon: Daemon, nobody: Puppet) -> None:
    with owner() as process:
        mine = daemon.lease("readable", pid=process.pid, tags=["readable"])
        theirs = nobody.lease("readable-too", tags=["readable"])
        for over in ("unix", "tcp"):
            seen = {
                lease["id"]: lease for lease in nobody.call("GET", "/v1/leases?tag=readable", over=over).body["leases"]
            }
            assert (seen[mine["id"]]["owner"]["exe"], seen[mine["id"]]["owner"]["cmdline"]) == (None, None)
            assert seen[theirs["id"]]["owner"]["cmdline"][-2:] == ["tests.e2e.puppet", str(NOBODY)]
        assert daemon.show(mine["id"])["owner"]["cmdline"] == ["sleep", "1000"]
        for path in (
            f"/v1/ports/{mine['port']}",
            "/v1/services/readable?passing=false",
            "/v1/ports",
            f"/v1/ports/{mine['port']}/history",
        ):
            assert '"1000"' not in json.dumps(nobody.call("GET", path).body), path


def test_user_over_tcp_leases_only_for_its_own_processes(daemon: Daemon, nobody: Puppet) -> None:
    with owner() as process:
        for over, known_by in (("unix", "peercred"), ("tcp", "socket")):
            lease = nobody.lease("theirs", over=over)
            assert (
                lease["owner"]["pid"],
                lease["owner"]["uid"],
                lease["owner"]["user"],
                lease["owner"]["known_by"],
            ) == (nobody.pid, NOBODY, "nobody", known_by)
            refused = nobody.call("POST", "/v1/leases", {"service": "theirs", "pid": process.pid}, over=over)
            assert (refused.status, refused.code, refused.body["pointer"]) == (403, "not_owner", "/pid")


def test_privileged_port_is_refused_except_on_an_own_address(daemon: Daemon, nobody: Puppet) -> None:
    refused = nobody.call("POST", "/v1/leases", {"service": "low", "port": 443, "exact": True})
    assert (refused.status, refused.code, refused.body["pointer"]) == (409, "port_reserved", "/port")
    assert nobody.lease("low", port=443, exact=True, address="own")["port"] == 443


def test_the_quota_of_one_user_stops_nobody_else(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.configure("[leases]\nquota_per_uid = 3")
    daemon.start()
    with Puppet(daemon, uid=NOBODY) as nobody:
        leases = [nobody.lease("greedy") for _ in range(3)]
        for over in ("unix", "tcp"):
            refused = nobody.call("POST", "/v1/leases", {"service": "greedy"}, over=over)
            assert (refused.status, refused.code) == (429, "quota_exceeded")
        refused = nobody.call("POST", "/v1/leases", [{"service": "greedy"}] * 2)
        assert (refused.status, refused.code) == (429, "quota_exceeded")
        assert daemon.lease("modest", ttl=60)
        assert nobody.call("DELETE", f"/v1/leases/{leases[0]['id']}").status == 204
        assert nobody.lease("greedy")
        assert len(daemon.leases()) == 4


def test_an_array_over_the_quota_leaves_nothing_behind(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.configure("[leases]\nquota_per_uid = 3")
    daemon.start()
    refused = daemon.call("POST", "/v1/leases", [{"service": "all-or-none", "ttl": 60}] * 4)
    assert (refused.status, refused.code, refused.body["pointer"]) == (429, "quota_exceeded", "/3")
    assert daemon.leases() == {}
    assert daemon.get("/v1/status")["pools"]["default"]["free"] == 100


# --- pages of other origins ---


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Host": "192.0.2.1"},
        {"Host": "[2001:db8::1]:80"},
        {"Host": "localhost@evil.example"},
        {"Host": "[localhost]evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_what_a_page_of_another_origin_could_send_is_refused(daemon: Daemon, headers: dict[str, str]) -> None:
    for method, path, body in (
        ("GET", "/v1/leases", None),
        ("POST", "/v1/leases", {"service": "evil", "ttl": 60}),
        ("GET", "/openapi.json", None),
        ("GET", "/healthz", None),
        ("GET", "/metrics", None),
        ("DELETE", "/v1/leases/some", None),
    ):
        reply = daemon.call(method, path, body, over="tcp", **headers)
        assert (reply.status, reply.code) == (403, "forbidden_origin"), (method, path)
    assert daemon.get("/v1/leases?service=evil")["leases"] == []


def test_its_own_names_and_its_own_pages_are_let_in(daemon: Daemon) -> None:
    port = daemon.tcp[1]
    own_page = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}", "Sec-Fetch-Site": "same-origin"}
    for headers in (
        {"Host": "localhost"},
        {"Host": f"127.0.0.1:{port}"},
        {"Host": "[::1]:80"},
        {"Host": "LOCALHOST."},
        {"Host": os.uname().nodename},
        {"Sec-Fetch-Site": "none"},
        own_page,
    ):
        assert daemon.call("GET", "/v1/leases", over="tcp", **headers).status == 200, headers


def test_no_page_speaks_over_the_unix_socket(daemon: Daemon) -> None:
    reply = daemon.call("GET", "/v1/leases", Origin="http://localhost")
    assert (reply.status, reply.code) == (403, "forbidden_origin")
    assert daemon.call("GET", "/v1/leases", Host="anything").status == 200


# --- other networks ---


@pytest.fixture
def network() -> Iterator[str]:
    """A network namespace with loopback, joined to ours: HERE is our address."""
    name, ours = f"portd-{os.getpid()}", f"portd{os.getpid()}"
    try:
        for words in (
            f"netns add {name}",
            f"-n {name} link set lo up",
            f"link add {ours} type veth peer name there netns {name}",
            f"addr add {HERE}/30 dev {ours}",
            f"link set {ours} up",
            f"-n {name} addr add {THERE}/30 dev there",
            f"-n {name} link set there up",
        ):
            subprocess.run(["ip", *words.split()], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "del", ours], check=False)
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.netns
def test_process_of_another_network_is_refused_whoever_asks_for_it(daemon: Daemon, network: str) -> None:
    with Puppet(daemon, "ip", "netns", "exec", network) as foreign:
        refused = foreign.call("POST", "/v1/leases", {"service": "foreign"})
        assert (refused.status, refused.code) == (422, "other_network")
        refused = foreign.call("POST", "/v1/leases", {"service": "foreign", "ttl": 60})
        assert (refused.status, refused.code) == (422, "other_network")
        refused = daemon.call("POST", "/v1/leases", {"service": "foreign", "pid": foreign.pid})
        assert (refused.status, refused.code, refused.body["pointer"]) == (422, "other_network", "/pid")
        answer, sockets = foreign.hand_over({"request": {"service": "foreign"}})
        assert (answer["problem"]["code"], sockets) == ("other_network", [])
        assert foreign.call("GET", "/v1/leases").status == 200, "reading is open to every local caller"
    assert daemon.get("/v1/leases?service=foreign")["leases"] == []


@pytest.mark.netns
def test_process_of_another_network_gets_no_port_and_no_socket(daemon: Daemon, network: str) -> None:
    with owner() as outside, Puppet(daemon, "ip", "netns", "exec", network) as foreign:
        lease = daemon.lease("mine", pid=outside.pid)
        bodies = (
            {"lease": lease["id"], "listen": True},
            {"request": {"service": "foreign", "pid": outside.pid}},
            {"request": {"service": "foreign", "ttl": 60}, "listen": True},
        )
        for body in bodies:
            answer, sockets = foreign.hand_over(body)
            assert (answer["problem"]["code"], sockets) == ("other_network", []), body
        refused = foreign.call("POST", "/v1/leases", {"service": "foreign", "pid": outside.pid})
        assert (refused.status, refused.code) == (422, "other_network")
        assert daemon.show(lease["id"])["state"] == "held"


OPENER = """
import socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"x"], [connection.fileno()])
"""
"""Opens a connection to the handoff socket, passes it on and exits."""


def test_a_connection_whose_opener_has_exited_gets_nothing(daemon: Daemon) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, owner() as process:
        lease = daemon.lease("mine", pid=process.pid)
        command = [sys.executable, "-c", OPENER, str(daemon.handoff), str(theirs.fileno())]
        subprocess.run(command, pass_fds=[theirs.fileno()], check=True)
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        with socket.socket(fileno=descriptors[0]) as connection:
            for body in ({"request": {"service": "orphan", "ttl": 60}}, {"lease": lease["id"], "listen": True}):
                connection.send(json.dumps(body).encode())
                data, sockets = receive(connection)
                assert (json.loads(data)["problem"]["code"], sockets) == ("other_network", []), body


def test_root_of_a_user_namespace_is_no_admin(daemon: Daemon, nobody: Puppet) -> None:
    lease = nobody.lease("theirs")
    with Puppet(daemon, "unshare", "-U", "-r") as contained:
        for over in ("unix", "tcp"):
            reply = contained.call("DELETE", f"/v1/leases/{lease['id']}", over=over)
            assert (reply.status, reply.code) == (403, "not_owner"), over
    assert daemon.call("DELETE", f"/v1/leases/{lease['id']}").status == 204


def test_pid_from_lower_pid_namespace_is_that_namespaces_own(daemon: Daemon) -> None:
    with Puppet(daemon, "unshare", "-p", "-f", "--kill-child", "--mount-proc") as inner:
        lease = inner.lease("inner", pid=1)
        assert lease["owner"]["cmdline"][-2:] == ["tests.e2e.puppet", "0"]
        refused = inner.call("POST", "/v1/leases", {"service": "inner", "pid": os.getpid()})
        assert (refused.status, refused.code, refused.body["pointer"]) == (400, "invalid_request", "/pid")
    wait_for(lambda: daemon.show(lease["id"])["state"] == "ended", "the lease ends with its process")


@pytest.fixture
def remote(make_daemon: MakeDaemon, network: str, place: Path) -> Daemon:
    """A daemon that serves HERE over TLS, and loopback too."""
    issue(place / "cert.pem", place / "key.pem", "portd", f"subjectAltName = IP:{HERE}, IP:127.0.0.1")
    tokens = "".join(
        f'[[auth.tokens]]\nname = "{name}"\nadmin = {admin}\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'
        for name, token, admin in (("ci", TOKEN, "false"), ("ops", ADMIN, "true"))
    )
    made = make_daemon()
    http = f'["{made.tcp[0]}:{made.tcp[1]}", "{HERE}:{made.tcp[1]}"]'
    made.configure(tokens, http=f'{http}\ntls_cert = "{place}/cert.pem"\ntls_key = "{place}/key.pem"')
    return made.start()


CURL = [
    "curl",
    "--silent",
    "--show-error",
    "--max-time",
    "10",
    "--noproxy",
    "*",
    "--write-out",
    "\n%{http_code} %{content_type}",
]


def curl(network: str, cert: Path, url: str, *words: str) -> Reply:
    """Send a request from the other network."""
    done = subprocess.run(
        ["ip", "netns", "exec", network, *CURL, "--cacert", str(cert), url, *words],
        check=True,
        capture_output=True,
        text=True,
    )
    body, _, last = done.stdout.rpartition("\n")
    status, media_type = last.split(" ", 1)
    return Reply(int(status), {"content-type": media_type}, json.loads(body) if body else "")


@pytest.mark.netns
def test_callers_from_elsewhere_need_tls_and_a_token(remote: Daemon, network: str, place: Path) -> None:
    cert, url = place / "cert.pem", f"https://{HERE}:{remote.tcp[1]}"
    lease_of_root = remote.lease("roots", ttl=60)
    request = json.dumps({"service": "far", "ttl": 60})
    for words in ([], ["-H", "Authorization: Bearer wrong"], ["-H", "Authorization: Basic eDp5"]):
        for path, body in (
            ("/v1/leases", []),
            ("/v1/leases", ["-d", request, "-H", "Content-Type: application/json"]),
            (f"/v1/leases/{lease_of_root['id']}", ["-X", "DELETE"]),
        ):
            refused = curl(network, cert, url + path, *words, *body)
            assert refused.status in (401, 403), (words, path, refused)
            assert refused.code in ("unauthenticated", "not_owner")
    bearer = ["-H", f"Authorization: Bearer {TOKEN}", "-H", "Content-Type: application/json"]
    assert curl(network, cert, f"{url}/v1/leases", *bearer).status == 200
    without_clock = curl(network, cert, f"{url}/v1/leases", *bearer, "-d", json.dumps({"service": "far"}))
    assert (without_clock.status, without_clock.code, without_clock.body["pointer"]) == (400, "invalid_request", "/ttl")
    granted = curl(network, cert, f"{url}/v1/leases", *bearer, "-d", request)
    assert (granted.status, granted.body["owner"]["pid"], granted.body["owner"]["known_by"]) == (201, None, "token")
    refused = curl(network, cert, f"{url}/v1/leases/{lease_of_root['id']}", *bearer, "-X", "DELETE")
    assert (refused.status, refused.code) == (403, "not_owner")
    own = ["-H", f"Authorization: Bearer {granted.body['token']}"]
    assert curl(network, cert, f"{url}/v1/leases/{granted.body['id']}", *own, "-X", "DELETE").status == 204
    admin = ["-H", f"Authorization: Bearer {ADMIN}"]
    assert curl(network, cert, f"{url}/v1/leases/{lease_of_root['id']}", *admin, "-X", "DELETE").status == 204
    assert curl(network, cert, f"{url}/healthz").status == 200
    evil = curl(network, cert, f"{url}/v1/leases", *bearer, "-H", "Host: evil.example")
    assert (evil.status, evil.code) == (403, "forbidden_origin")


@pytest.mark.netns
def test_wrong_tokens_are_delayed_counted_and_logged(remote: Daemon, network: str, place: Path) -> None:
    cert, url = place / "cert.pem", f"https://{HERE}:{remote.tcp[1]}"
    began = time.monotonic()
    for _ in range(2):
        assert curl(network, cert, f"{url}/v1/leases", "-H", "Authorization: Bearer guess").status == 401
    assert time.monotonic() - began >= 2 * WRONG_TOKEN_DELAY_S
    assert "portd_http_wrong_tokens 2.0" in remote.get("/metrics")
    assert "rejected 1 requests with a wrong token, the last one from" in remote.log()
    refused = curl(network, cert, f"{url}/v1/leases/none", "-H", f"Authorization: Bearer {TOKEN}", "-X", "DELETE")
    assert refused.status == 404
    assert "portd_http_wrong_tokens 2.0" in remote.get("/metrics"), "a token of the configuration is no wrong one"


@pytest.mark.netns
def test_tls_handshake_counts_as_a_connection_and_times_out(remote: Daemon) -> None:
    remote.stop()
    remote.prelude = "import portd.adapters.http.tls as tls; tls.HANDSHAKE_TIMEOUT_S = 1.0"
    remote.start()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(contextlib.closing(dial(remote.tcp))) for _ in range(3)]
        wait_for(lambda: remote.get("/v1/status")["counts"]["connections"] == 4, "handshakes are counted")
        for connection in silent:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        wait_for(lambda: remote.get("/v1/status")["counts"]["connections"] == 1, "they are closed")


@pytest.mark.netns
def test_plain_http_gets_nothing_where_tls_is_spoken(remote: Daemon) -> None:
    with Connection(remote.tcp) as connection, pytest.raises((ConnectionError, OSError)):
        connection.call("GET", "/v1/leases")


@pytest.mark.netns
def test_loopback_over_tls_is_known_by_the_kernel(remote: Daemon, place: Path) -> None:
    context = ssl.create_default_context(cafile=str(place / "cert.pem"))
    with Connection(remote.tcp) as connection:
        connection.connect()
        connection.sock = context.wrap_socket(connection.sock, server_hostname="127.0.0.1")
        reply = connection.call("POST", "/v1/leases", {"service": "near"})
    assert (reply.status, reply.body["owner"]["pid"], reply.body["owner"]["known_by"]) == (201, os.getpid(), "socket")


def test_a_cleartext_address_beyond_loopback_is_refused_at_the_start(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.configure("", http='"0.0.0.0:1"')
    assert daemon.launch().wait(20) == os.EX_CONFIG
    assert "tls_cert" in daemon.log()


@pytest.mark.netns
def test_callers_from_elsewhere_are_given_addresses_that_they_reach(remote: Daemon, network: str, place: Path) -> None:
    bearer = ("-H", f"Authorization: Bearer {TOKEN}")
    cert, url = place / "cert.pem", f"https://{HERE}:{remote.tcp[1]}"
    with ExitStack() as stack:
        for service, address in (("wild", "0.0.0.0"), ("local", "127.0.0.1"), ("fixed", HERE)):
            lease = remote.lease(service, address=address)
            stack.enter_context(listen_on(lease["port"], address))
            remote.wait_state(lease["id"], "bound")
        for service, found in (("wild", [HERE]), ("local", []), ("fixed", [HERE])):
            reply = curl(network, cert, f"{url}/v1/services/{service}?serving=true", *bearer)
            assert [one["address"] for one in reply.body["instances"]] == found
        targets = curl(network, cert, f"{url}/v1/prometheus", *bearer).body
        assert {one["labels"]["__meta_portd_service"] for one in targets} == {"wild", "fixed"}
        assert {one["targets"][0].rpartition(":")[0] for one in targets} == {HERE}
        assert remote.get("/v1/services/wild?serving=true")["instances"][0]["address"] == "127.0.0.1"
