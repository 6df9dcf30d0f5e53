"""Certificates for tests, valid since a day long past: a clock that is set back a little can't make one invalid."""

from __future__ import annotations

import subprocess
from pathlib import Path

SINCE = "20200101000000Z"
UNTIL = "20491231235959Z"
CONFIG = """\
[ca]
default_ca = it
[it]
dir = {records}
database = {records}/index
new_certs_dir = {records}
rand_serial = yes
default_md = sha256
policy = any
unique_subject = no
[any]
commonName = supplied
[v3]
{extensions}
"""


def make_key(key: Path) -> None:
    """Write a new private key (P-256)."""
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key)


def issue(cert: Path, key: Path, name: str, *extensions: str, ca: tuple[Path, Path] | None = None) -> None:
    """Write a certificate of `name` and its new key; signed by `ca` (certificate, key), or by itself.

    `extensions` are lines of OpenSSL's configuration, as "subjectAltName = IP:127.0.0.1". Raises CalledProcessError.
    """
    records = cert.with_suffix(".records")
    records.mkdir()
    (records / "index").touch()
    config, request = records / "ca.cnf", records / "request.pem"
    config.write_text(CONFIG.format(records=records, extensions="\n".join(extensions)))
    make_key(key)
    _openssl("req", "-new", "-key", key, "-subj", f"/CN={name}", "-out", request)
    signer = ("-selfsign", "-keyfile", key) if ca is None else ("-cert", ca[0], "-keyfile", ca[1])
    dates = ("-startdate", SINCE, "-enddate", UNTIL)
    wanted = ("-extensions", "v3", *dates, "-in", request, "-out", cert)
    _openssl("ca", "-batch", "-notext", "-config", config, *signer, *wanted)


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
