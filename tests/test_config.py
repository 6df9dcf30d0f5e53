"""The configuration: a mistake is reported with its line; a valid value is kept as it is."""

from __future__ import annotations

import pytest

from portd.config import Paths, Settings, http_addresses, load, parse, pool_ports, system_paths, user_paths
from portd.core.errors import ConfigError

CLUSTER = "[cluster]\nengine = 'etcd'\nendpoints = ['http://10.0.0.1:2379']\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not TOML"),
        ("[lease]\nmax_ttl = 1", "lease: unknown setting"),
        ("[leases]\n\nmax_ttl = 'x'", "f.toml:3: leases.max_ttl: Expected `float`, got `str`"),
        ("[leases]\nmax_ttl = 1\ncooldwn = 3", "f.toml:3: leases.cooldwn: unknown setting"),
        ("[leases]\ncooldown = -1", "f.toml:2: leases.cooldown"),
        ("[pools.default]\nranges = ['30-20']", "f.toml:1: pools.default: '30-20' is not within 1-65535"),
        ("[pools.default]\nranges = ['a']", "'a' is not a port or a range"),
        ("[pools.default]\nranges = [70000]", "pools"),
        ("[pools.default]\nranges = ['5-6']\nexclude = ['5-6']", "pools.default: has no port"),
        ("[pools.default]\nranges = ['5-6']\n[pools.b]\nranges = ['6-7']", "pools.b: overlaps pool default"),
        ("[pools.b]\nranges = ['6-7']", "there must be a pool named 'default'"),
        ("own_addresses = '10.0.0.0/8'", "f.toml:1: own_addresses: must be a block"),
        ("own_addresses = '127.77.0.1/16'", "own_addresses"),
        ("[static.a]\nport = 80\n[static.b]\nport = 80", "static.b.port: 80 is static for a already"),
        ("[static.a]\nport = 80\naddress = 'x'", "f.toml:3: static.a.address"),
        ("[listen]\nhttp = 'localhost'", "listen.http"),
        ("[listen]\nhttp = '192.0.2.1:80'", "is not loopback: tokens would cross the network in the clear"),
        ("[listen]\ntls_cert = 'x'", "tls_cert and tls_key go together"),
        ("[dns]\nlisten = 'x'", "dns.listen"),
        ("[dns]\nzone = 'a..b'", "f.toml:2: dns.zone"),
        ("[dns]\nzone = '" + "a." * 40 + "'", "dns.zone"),
        ("[health]\nallow_commands = ['x']", "'x' is not an absolute path"),
        ("[cluster]\nnode = 'a'", "f.toml:1: cluster.engine: must be set"),
        ("[cluster]\nengine = 'etcd'", "cluster.endpoints: needs the client URLs of etcd"),
        ("[cluster]\nengine = 'etcd'\nendpoints = ['10.0.0.1:2379']", "f.toml:3: cluster.endpoints: '10.0.0.1:2379'"),
        (CLUSTER + "node = 'A_B'", "cluster.node: 'A_B' is not a name"),
        (CLUSTER + "advertise = '127.0.0.1'", "cluster.advertise: 127.0.0.1 is not an address that other hosts reach"),
        (CLUSTER + "advertise = 'a b'", "neither an address nor the name of an interface"),
        (CLUSTER + "tls_cert = '/c.pem'", "cluster.tls_cert: tls_cert and tls_key go together"),
        (CLUSTER + "tls_ca = '/c.pem'", "must begin with https://"),
        (CLUSTER + "user = 'portd'", "cluster.user: user and password_file go together"),
        (CLUSTER + "ttl = 2", "cluster.ttl"),
        (CLUSTER + "single = true", "f.toml:4: cluster.single: unknown setting"),
        ("[compat]\nconsul = '0.0.0.0:8500'", "f.toml:2: compat.consul: 0.0.0.0 is not a loopback address"),
        ("[compat]\nconsol = 1", "f.toml:2: compat.consol: unknown setting"),
        ("[dns]\nlisten = ['127.0.0.1:1', 'x']", "dns.listen: 'x' is not ADDRESS:PORT"),
        ("[static.a]\nprotocol = 'udp'", "static.a: needs either 'port' or 'ports'"),
        ("[static.a]\nport = 1\nports = {main = 2}", "static.a: needs either 'port' or 'ports'"),
        ("[static.a]\nports = {main = 80, x = 81}\n[static.b]\nport = 81", "static.b.port: 81 is static for a already"),
        ("[services.a]\nusers = ['x y']", "f.toml:2: services.a.users: 'x y' is not a user"),
        ("[services.a]\nwhen_all_critical = 'x'", "f.toml:2: services.a.when_all_critical"),
        ("[static.a]\nport = 1\n[static.B]\nport = 2", "f.toml:3: static.B: is not a name of 1 to 63"),
        ("[leases]\nnames = 'x'", "f.toml:2: leases.names"),
        ("[store]\nhistory_mib = 1\nhistory_mib_per_user = 2", "f.toml:3: store.history_mib_per_user: must not exceed"),
        (
            "[[auth.tokens]]\nname = 'ci'\nsha256 = '"
            + "0" * 64
            + "'\n" * 1
            + "[[auth.tokens]]\nname = 'ci'\nsha256 = '"
            + "1" * 64
            + "'",
            "two tokens are named 'ci'",
        ),
        ("x = " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("[[auth.tokens]]\nname = 'ci'\nsha256 = 'x'", "is not a SHA-256 in 64 hexadecimal digits"),
    ],
)
def test_mistake_is_reported_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text, "f.toml")
    assert message in str(refused.value)
    assert str(refused.value).startswith("f.toml")


def test_an_empty_file_is_the_defaults() -> None:
    assert parse("") == Settings()


def test_pools_are_ranges_less_what_is_excluded() -> None:
    settings = parse("[pools.default]\nranges = ['10-12', 20, '11-13']\nexclude = [12]")
    assert pool_ports(settings.pools["default"]) == [10, 11, 13, 20]


def test_the_default_pool_is_outside_the_kernels_ephemeral_range() -> None:
    assert max(pool_ports(Settings().pools["default"])) < 32768


def test_a_listener_is_switched_off_by_an_empty_string() -> None:
    paths = system_paths()
    assert http_addresses(Settings(), paths) == [("127.0.0.1", 7783)]
    assert http_addresses(parse("[listen]\nhttp = ''"), paths) == []
    assert http_addresses(parse("[listen]\nhttp = ['127.0.0.1:1', '[::1]:2']"), paths) == [("127.0.0.1", 1), ("::1", 2)]


def test_named_file_must_exist_and_the_default_may_not(tmp_path) -> None:
    nowhere = str(tmp_path / "portd.toml")
    paths = Paths("", "", (), "", nowhere, 0o600)
    assert load(None, paths) == Settings()
    with pytest.raises(ConfigError, match="there is no such file"):
        load(nowhere, paths)


def test_a_users_files_are_where_the_xdg_directories_say(monkeypatch, tmp_path) -> None:
    for name in ("RUNTIME_DIR", "STATE_HOME", "CONFIG_HOME"):
        monkeypatch.setenv(f"XDG_{name}", f"{tmp_path}/{name}")
    paths = user_paths()
    assert paths.socket == f"{tmp_path}/RUNTIME_DIR/portd/portd.sock"
    assert paths.store == f"{tmp_path}/STATE_HOME/portd/portd.db"
    assert paths.config == f"{tmp_path}/CONFIG_HOME/portd/portd.toml"
    assert paths.http == ()
