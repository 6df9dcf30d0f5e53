"""What Debian 12's systemd lacks, systemd-resolved, and the next Python: portd on a Debian 13 of its own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from box import wait_for
from builds import TREE, bootstrap, build_package, build_venv_for

pytestmark = pytest.mark.systemd
INCLUDED = ["systemd", "systemd-sysv", "dbus", "python3", "iproute2", "curl", "systemd-resolved"]
SEED = """\
mkdir -p etc/portd/run
printf '[static.orders]\\nport = 20080\\n' >etc/portd/portd.toml
echo 'COMMAND=/usr/bin/python3 /opt/binds.py {host} {port}' >etc/portd/run/orders.env
"""
BINDS = """\
# Tell which ports may be bound, then listen on the leased one.
import json, socket, sys

host, leased, said = sys.argv[1], int(sys.argv[2]), {}
for kind in ("DGRAM", "STREAM"):
    for port in (leased + 1, 31999, leased):
        taken = socket.socket(type=getattr(socket, f"SOCK_{kind}"))
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        try:
            taken.bind((host, port))
            said[f"{kind} {port}"] = "bound"
        except OSError as error:
            said[f"{kind} {port}"] = error.strerror
taken.listen()
print(json.dumps(said), flush=True)
taken.accept()
"""
LINK_SERVER = """\
# A LAN's DNS server that knows every name as 192.0.2.7 (RFC 1035 section 4).
import socket

server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(("192.0.2.1", 53))
while True:
    query, client = server.recvfrom(4096)
    end = query.index(b"\\0", 12) + 5
    is_a = query[end - 4:end - 2] == b"\\0\\1"
    answer = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4\\xc0\\0\\2\\7" if is_a else b""
    counts = bytes([0, 1, 0, int(is_a), 0, 0, 0, 0])
    server.sendto(query[:2] + b"\\x81\\x80" + counts + query[12:end] + answer, client)
"""


@pytest.fixture(scope="module")
def root(venv, tmp_path_factory) -> Path:
    """Bootstrap a Debian 13."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("a Debian 13 needs mmdebstrap")
    place = tmp_path_factory.mktemp("trixie") / "root"
    bootstrap("trixie", INCLUDED, place)
    return place


@pytest.fixture(scope="module")
def next_venv(venv, tmp_path_factory) -> Path:
    """Lay out portd for the Python of Debian 13."""
    place = tmp_path_factory.mktemp("next") / "portd"
    build_venv_for("3.13", place, venv / "bin/python3")
    return place


@pytest.fixture(scope="module")
def box(root, next_venv, make_box):
    """Return a Debian 13 on a LAN, with portd installed from pip and in systemd-resolved."""
    box = make_box(root=root, venv=next_venv, seed=SEED)
    box.run(
        "ip link add lan type veth peer name far && ip link set far up && ip addr add 192.0.2.1/24 dev lan "
        "&& ip link set lan up && ip route add default via 192.0.2.9"
    )
    box.run(f"cat >/opt/binds.py <<'EOF'\n{BINDS}\nEOF\ncat >/opt/link.py <<'EOF'\n{LINK_SERVER}\nEOF")
    box.run("systemctl start systemd-resolved.service && portd install --resolved")
    return box


def binds(box):
    """Start the service on a leased port; return which ports it could bind."""
    box.run("systemctl restart portd-run@orders.service")
    wait_for(lambda: [one["state"] for one in box.leases("orders")] == ["bound"], "the service listens")
    said = box.run("journalctl -b -o cat -u portd-run@orders.service -n 1 -t portd -t python3")
    return json.loads(said)


def test_portd_runs_under_the_python_of_debian_13(box):
    assert box.run("readlink -f /proc/$(systemctl show -P MainPID portd.service)/exe").strip() == "/usr/bin/python3.13"
    assert box.api("/healthz") == {"status": "ok"}
    assert box.run("portd lease job --ttl 9").strip().isdigit()


def test_service_with_drop_in_binds_only_its_leased_port(box):
    drop_in = "/etc/systemd/system/portd-run@orders.service.d"
    assert set(binds(box).values()) == {"bound"}  # without it: any
    text = (TREE / "systemd/bind-only-leased-port.conf").read_text()
    box.run(f"mkdir {drop_in} && cat >{drop_in}/port.conf <<'EOF'\n{text}\nEOF\nsystemctl daemon-reload")
    bound = binds(box)
    box.run(f"rm -r {drop_in} && systemctl daemon-reload && systemctl stop portd-run@orders.service")
    assert bound.pop("STREAM 20080") == "bound"
    assert set(bound.values()) == {"Operation not permitted"}
    assert len(bound) == 5


def test_resolved_asks_portd_for_names_in_its_zone(box):
    lease = box.api("/v1/leases", {"service": "web", "instance": "web-1", "address": "own", "ttl": 600})
    box.run(f"systemd-run --unit web python3 -m http.server --bind {lease['address']} {lease['port']}")
    wait_for(lambda: box.api("/v1/services/web?serving=true")["instances"], "the instance serves")
    endpoint = f"web-1.web.portd.internal:{lease['port']}"
    assert box.run("resolvectl query --legend=no web.portd.internal").split()[1] == lease["address"]
    assert box.run("getent ahostsv4 web-1.web.portd.internal").split()[0] == lease["address"]
    assert endpoint in box.run("resolvectl service --legend=no _web._tcp.portd.internal")
    assert "not found" in box.ask("resolvectl query nosuch.portd.internal")[2]


def test_resolved_goes_on_asking_links_own_server_for_other_names(box):
    box.run("systemd-run --unit link-server python3 /opt/link.py && resolvectl dns lan 192.0.2.1")
    wait_for(lambda: "192.0.2.1:53" in box.run("ss -Hlun"), "the LAN's server listens")
    found = [box.run("resolvectl query --legend=no --cache=no example.org").split()[1] for _ in range(10)]
    box.run("systemctl stop link-server && resolvectl revert lan")
    assert found == ["192.0.2.7"] * 10


def test_resolver_that_has_servers_for_whole_host_is_left_alone(box):
    place = "/etc/systemd/resolved.conf.d/lan.conf"
    box.run(f"printf '[Resolve]\\nDNS=192.0.2.1\\n' >{place}")
    status, out, err = box.ask("portd install --resolved")
    box.run(f"rm {place}")
    assert (status, out) == (1, "")
    assert place in err


def test_after_an_uninstall_resolved_knows_portd_no_more(box):
    assert "127.0.0.1:8600" in box.run("resolvectl dns")
    box.run("portd uninstall")
    known = box.run("resolvectl dns")
    box.run("portd install --resolved")
    assert "127.0.0.1:8600" not in known


def test_the_debian_package_works_there_too(root, next_venv, make_box, tmp_path):
    package = build_package(tmp_path, "0.9.1", next_venv, PORTD_BUILD_PYTHON=sys.executable, PYTHONPATH=str(TREE))
    box = make_box(root=root, venv=None, seed=f"cp {package} opt/portd.deb")
    box.run("dpkg --install /opt/portd.deb")
    assert box.api("/healthz") == {"status": "ok"}
    box.run("mkdir /etc/portd/run && echo COMMAND=/bin/true >/etc/portd/run/orders.env")
    assert box.ask("systemd-analyze verify --man=no portd.service portd.socket portd-run@orders.service") == (0, "", "")
    lease = box.api("/v1/leases", {"service": "web", "ttl": 600})
    box.run("systemctl restart portd.service")
    assert [one["id"] for one in box.leases()] == [lease["id"]]
    box.run("dpkg --purge portd")
    assert box.ask("ls -d /etc/portd /var/lib/portd /usr/lib/portd")[1] == ""
