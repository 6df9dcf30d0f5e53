"""Who portd is to etcd: TLS with client certificates, user and password, and clear errors for both."""

from __future__ import annotations

import asyncio
import subprocess

import pytest

from portd.adapters.etcd.addresses import login
from portd.adapters.etcd.gateway import Login
from portd.core.errors import ConfigError
from tests.adapters.etcd.bed import Member, Node, etcd, lease, needs_etcd, running, until

pytestmark = needs_etcd


def etcdctl(member: Member, *words: str) -> None:
    environ = {"ETCDCTL_API": "3", "PATH": "/usr/bin"}
    subprocess.run(["etcdctl", "--endpoints", member.url, *words], env=environ, check=True, capture_output=True)


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path):
    """Make an authority, and one certificate of it for servers and clients."""
    ca, key, cert = (str(tmp_path / name) for name in ("ca.pem", "key.pem", "cert.pem"))
    openssl(*("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "2"),
            *("-keyout", f"{ca}.key", "-out", ca))  # fmt: skip
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/O=portd", "-keyout", key, "-out", f"{cert}.csr")
    (tmp_path / "ext").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    openssl(*("x509", "-req", "-in", f"{cert}.csr", "-CA", ca, "-CAkey", f"{ca}.key", "-CAcreateserial"),
            *("-days", "2", "-extfile", str(tmp_path / "ext"), "-out", cert))  # fmt: skip
    return ca, cert, key


def test_user_and_password_open_an_etcd_with_authentication(tmp_path):
    async def scenario(members):
        a = Node("a", members, login=Login(None, "root", "secret"))
        b = Node("b", members, login=Login(None, "root", "secret"))
        wrong = Node("c", members, login=Login(None, "root", "guess"))
        a.put(lease("a", 1))
        async with running(a, b, wrong):
            await until(lambda: b.ids() == {"a-1"}, "b sees a's lease")
            await until(lambda: "password_file" in (wrong.session.condition()["problem"] or ""), "the error helps")
            assert not a.session.warnings()

    with etcd(tmp_path) as members:
        etcdctl(members[0], "user", "add", "root:secret")
        etcdctl(members[0], "auth", "enable")
        asyncio.run(scenario(members))


def test_client_certificates_open_an_etcd_with_tls(tmp_path, certificates):
    ca, cert, key = certificates

    async def scenario(url):
        known = login(ca, cert, key, "", "", is_tls=True)
        a, b = (Node(name, [], login=known, urls=[url]) for name in "ab")
        anonymous = Node("c", [], login=login(ca, "", "", "", "", is_tls=True), urls=[url])
        a.put(lease("a", 1))
        async with running(a, b, anonymous):
            await until(lambda: b.ids() == {"a-1"}, "b sees a's lease")
            assert anonymous.publisher.state == "waiting"

    member = Member(tmp_path)
    url = member.url = member.url.replace("http:", "https:")
    try:
        member.start("--cert-file", cert, "--key-file", key, "--trusted-ca-file", ca, "--client-cert-auth")
        asyncio.run(scenario(url))
    finally:
        member.kill()


def test_plain_http_without_authentication_is_a_warning():
    async def scenario():
        assert any("any page" in one for one in Node("a", [], urls=["http://127.0.0.1:1"]).session.warnings())

    asyncio.run(scenario())


def test_relative_password_file_is_a_credential_of_the_unit(tmp_path, monkeypatch):
    (tmp_path / "etcd").write_text("secret\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert login("", "", "", "portd", "etcd", is_tls=False).password == "secret"
    with pytest.raises(ConfigError, match=r"cluster\.password_file: .*nosuch can't be read"):
        login("", "", "", "portd", "nosuch", is_tls=False)


def test_unreadable_certificate_is_named():
    with pytest.raises(ConfigError, match=r"cluster\.tls_ca"):
        login("/nosuch.pem", "", "", "", "", is_tls=True)
