"""The server on real sockets: both protocols, both loops, slow, silent and rude clients; dig as a foreign process's
view."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import suppress

import dns.exception
import dns.message
import dns.query
import dns.rcode
import pytest
import uvloop

from portd.adapters.dns import tcp
from portd.adapters.dns.message import Responder
from portd.adapters.dns.server import DnsServer
from portd.adapters.dns.zone import Zone
from portd.core.model import Event
from tests.adapters.dns.bed import CHECK, DEADLINE_S, Station, ask_for, lease


def texts(message):
    return sorted(record.to_text() for rrset in message.answer for record in rrset)


@pytest.fixture
def station():
    with Station() as running:
        yield running


# --- both protocols ---


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_it_answers_over_udp_and_tcp_under_one_port_number(loop, host):
    with Station((host, 0), loop=loop) as station:
        station.apply(lease(address="10.1.2.3"))
        assert texts(station.udp("orders", "A")) == texts(station.tcp("orders", "A")) == ["10.1.2.3"]


def test_the_very_next_query_after_an_event_sees_it(station):
    for _ in range(50):
        station.apply(lease(check=CHECK, health="passing"))
        assert station.udp("orders", "A").answer
        station.apply(lease(check=CHECK, health="critical"))
        assert not station.udp("orders", "A").answer
    station.apply(lease(state="ended"))
    assert station.udp("orders", "A").rcode() == dns.rcode.NXDOMAIN


def test_a_cut_answer_leads_to_tcp_and_the_whole(station):
    station.apply(*(lease(number=number) for number in range(1, 200)))
    answer, over_tcp = dns.query.udp_with_fallback(
        ask_for("_orders._tcp", "SRV"), station.host, DEADLINE_S, station.port
    )
    assert over_tcp
    assert len(texts(answer)) == 199


@pytest.mark.parametrize(("listen", "asked"), [("0.0.0.0", "127.0.0.2"), ("::", "127.0.0.2"), ("::", "::1")])
def test_on_all_addresses_it_answers_from_one_that_was_asked(listen, asked):
    with Station((listen, 0)) as station:
        station.apply(lease(address="10.1.2.3"))
        with socket.socket(socket.AF_INET6 if ":" in asked else socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(DEADLINE_S)
            client.connect((asked, station.port))  # the kernel drops what comes from any other address
            client.send(ask_for("orders", "A").to_wire())
            assert texts(dns.message.from_wire(client.recv(4096))) == ["10.1.2.3"]


CALLERS = """
import sys
from tests.adapters.dns.bed import Station, lease
listen, *callers = sys.argv[1:]
with Station((listen, 0)) as station:
    station.apply(
        lease("wild", 1, address="0.0.0.0"),
        lease("dual", 2, address="::"),
        lease("local", 3, address="127.0.0.1"),
        lease("fixed", 4, address="192.0.2.8"),
        lease("wide", 5, address="127.0.0.1", listening=("0.0.0.0",)),
    )
    for asked in callers:
        for over in (station.udp, station.tcp):
            found = []
            station.host = asked
            for service in ("wild", "dual", "local", "fixed", "wide"):
                answer = over(service, "A")
                found.append(answer.answer[0][0].to_text() if answer.answer else "-")
                ports = over(f"_{service}._tcp", "SRV")
                assert bool(ports.answer) == bool(answer.answer)
            print(asked, *found)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can add an address")
@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "192.0.2.7"])
def test_callers_get_address_of_interface_that_they_asked_on(listen):
    setup = 'ip link set lo up && ip addr add 192.0.2.7/24 dev lo && ip addr add 192.0.2.8/24 dev lo && exec "$@"'
    callers = ["192.0.2.7"] if listen == "192.0.2.7" else ["127.0.0.1", "192.0.2.7"]
    command = ["unshare", "-n", "sh", "-c", setup, "sh", sys.executable, "-c", CALLERS, listen, *callers]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    expected = {
        "127.0.0.1": ["127.0.0.1", "127.0.0.1", "127.0.0.1", "192.0.2.8", "127.0.0.1"],
        "192.0.2.7": ["192.0.2.7", "192.0.2.7", "-", "192.0.2.8", "192.0.2.7"],
    }
    assert run.stdout.splitlines() == [" ".join([asked, *expected[asked]]) for asked in callers for _ in range(2)]


def test_restored_leases_are_answered_and_serial_never_decreases():
    server = DnsServer([("127.0.0.1", 0)])
    server.restore([lease(revision=7), lease(number=2, revision=9)], revision=12)
    answer = dns.message.from_wire(server._responder.respond(ask_for("", "SOA").to_wire(), tcp.LIMITS))
    assert answer.answer[0][0].serial == 12


def test_a_taken_port_is_named_and_nothing_stays_open():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = DnsServer([("127.0.0.1", 0), ("127.0.0.1", port)])
        with pytest.raises(OSError, match=f"127.0.0.1 port {port}.*in use.*listen"):
            asyncio.run(server.start())
        assert str(port) in server.condition()["problem"]
        assert server.addresses == []


def test_its_condition_says_where_it_listens_and_what_it_knows(station):
    station.apply(lease(), lease("billing"))
    found = station.server.condition()
    assert found["listen"] == [f"127.0.0.1:{station.port}"]
    assert (found["services"], found["problem"]) == (2, None)


# --- failing well ---


def test_failing_query_gets_servfail_and_is_logged_once(caplog):
    def broken(qtype, rcode):
        if qtype == "TXT":
            raise RuntimeError("made to fail")

    with Station(on_query=broken) as station, caplog.at_level(logging.ERROR):
        station.apply(lease(tags=("blue",)))
        for _ in range(20):
            assert station.udp("orders", "TXT").rcode() == dns.rcode.SERVFAIL
        assert station.udp("orders", "A").answer
        assert station.server.condition()["failed_queries"] == 20
    assert len(caplog.records) == 1


def test_event_that_cannot_be_shown_does_not_stop_the_next(caplog):
    with Station() as station, caplog.at_level(logging.ERROR):
        station.apply(lease(address="nowhere"))
        assert station.udp("orders", "A").rcode() == dns.rcode.NXDOMAIN
        assert "orders-1" in caplog.records[0].getMessage()
        station.apply(lease(address="10.1.2.3"))
        assert texts(station.udp("orders", "A")) == ["10.1.2.3"]


def test_a_flood_of_garbage_leaves_it_answering(station):
    station.apply(lease(address="10.1.2.3"))
    chance = random.Random(4)
    query = ask_for("orders", "A", use_edns=0).to_wire()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for _ in range(3000):
            garbage = bytearray(query)
            for _ in range(chance.randint(1, 8)):
                garbage[chance.randrange(len(garbage))] = chance.randrange(256)
            client.sendto(garbage[: chance.randint(0, len(garbage))], (station.host, station.port))
            client.sendto(chance.randbytes(chance.randint(0, 1400)), (station.host, station.port))
    for attempt in range(20):  # the flood may have filled the buffer that this query needs room in
        try:
            answer = dns.query.udp(ask_for("orders", "A"), station.host, 1.0, station.port)
        except dns.exception.Timeout:
            assert attempt < 19
        else:
            break
    assert texts(answer) == ["10.1.2.3"]
    assert station.server.condition()["failed_queries"] == 0


# --- TCP ---


def framed(*queries):
    return b"".join(len(wire).to_bytes(2) + wire for wire in (query.to_wire() for query in queries))


def read_message(client):
    size = int.from_bytes(exactly(client, 2))
    return dns.message.from_wire(exactly(client, size))


def exactly(client, size):
    data = b""
    while len(data) < size:
        more = client.recv(size - len(data))
        assert more, "the connection ended early"
        data += more
    return data


def connect(station):
    return socket.create_connection((station.host, station.port), timeout=DEADLINE_S)


def test_queries_in_one_go_are_answered_in_order(station):
    station.apply(*(lease(number=number) for number in range(1, 101)))
    queries = [ask_for(f"orders-{number}.orders", "A") for number in range(1, 101)]
    with connect(station) as client:
        client.sendall(framed(*queries))
        client.shutdown(socket.SHUT_WR)
        for query in queries:
            assert query.is_response(read_message(client))
        client.settimeout(tcp.IDLE_S / 2)
        assert client.recv(1) == b"", "all is answered and the client has ended: so does the server"


def test_a_query_may_come_in_single_bytes(station):
    station.apply(lease(address="10.1.2.3"))
    with connect(station) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in framed(ask_for("orders", "A")):
            client.sendall(bytes([byte]))
        assert texts(read_message(client)) == ["10.1.2.3"]


@pytest.mark.parametrize(
    "rude", [b"\xff\xff" + b"x" * 9, b"\0\0", b"\0\x05hello", b"GET / HTTP/1.1\r\n\r\n", b"\0\x0c\0\0\x80" + bytes(9)]
)
def test_who_does_not_speak_dns_is_cut_off(station, rude):
    with connect(station) as client:
        client.sendall(rude)
        client.settimeout(DEADLINE_S)
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_slow_reader_fills_no_memory_and_gets_every_answer(loop):
    count = 400
    with Station(loop=loop) as station:
        station.apply(*(lease(number=number) for number in range(1, 601)))
        (listener,) = station.server._tcp
        query = ask_for("_orders._tcp", "SRV")
        with connect(station) as client, connect(station) as other:
            client.sendall(framed(*[query] * count))  # 25 MB of answers
            for _ in range(20):  # others get their turn meanwhile
                other.sendall(framed(ask_for("orders-1.orders", "A")))
                read_message(other)
            waiting = max(each._transport.get_write_buffer_size() for each in list(listener._connections))
            assert waiting <= tcp.WAITING_BYTES + 65537
            for _ in range(count):
                size = int.from_bytes(exactly(client, 2))
                assert exactly(client, size)[:2] == query.to_wire()[:2]


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_client_that_never_reads_is_stopped_by_kernel_buffers(loop):
    limit = 48 << 20  # several times what the kernel keeps for both ends (tcp_rmem, tcp_wmem: 6 and 4 MiB)
    with Station(loop=loop) as station:
        station.apply(*(lease(number=number) for number in range(1, 601)))
        chunk = framed(ask_for("_orders._tcp", "SRV")) * 20000
        sent = 0
        with connect(station) as client:
            client.settimeout(0.5)
            with suppress(TimeoutError):
                while sent < limit:
                    sent += client.send(chunk)
        assert sent < limit


def test_one_connection_too_many_ends_the_longest_idle_one(monkeypatch):
    monkeypatch.setattr(tcp, "CONNECTIONS", 4)
    with Station() as station:
        station.apply(lease(address="10.1.2.3"))
        clients = [connect(station) for _ in range(4)]
        try:
            for client in [*clients[1:], clients[0]]:  # the second has asked longest ago
                client.sendall(framed(ask_for("orders", "A")))
                read_message(client)
            clients.append(connect(station))
            with pytest.raises((ConnectionResetError, AssertionError)):
                read_message(clients[1])
            for client in [clients[0], *clients[2:]]:
                client.sendall(framed(ask_for("orders", "A")))
                assert texts(read_message(client)) == ["10.1.2.3"]
        finally:
            for client in clients:
                client.close()


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_idle_connection_is_closed_trickle_does_not_keep_it(new_loop):
    async def run():
        bound = socket.create_server(("127.0.0.1", 0))
        bound.setblocking(False)
        zone = Zone("portd.internal.", 0, ("127.0.0.1",))
        listener = tcp.TcpListener(bound, Responder(zone).respond, idle_s=0.2)
        await listener.start()
        reader, writer = await asyncio.open_connection(*bound.getsockname())
        try:
            async with asyncio.timeout(DEADLINE_S):
                query = framed(ask_for("", "SOA"))
                writer.write(query)
                await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
                for byte in query:
                    if reader.at_eof() or not len(listener):
                        break
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.05)
                with suppress(ConnectionResetError):
                    assert await reader.read() == b"", "the trickle became a query that was answered"
                assert len(listener) == 0
        finally:
            writer.close()
            await listener.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


def test_it_may_be_closed_twice_and_started_again():
    async def run():
        server = DnsServer([("127.0.0.1", 0)])
        await server.close()
        for _ in range(2):
            await server.start()
            ((host, port),) = server.addresses
            reader, writer = await asyncio.open_connection(host, port)
            server.apply(Event(1, "granted", 0.0, lease()))
            writer.write(framed(ask_for("orders", "A")))
            assert await asyncio.wait_for(reader.readexactly(2), DEADLINE_S)
            await server.close()
            await server.close()
            writer.close()
            with socket.create_server((host, port)):
                pass

    asyncio.run(run())


# --- a foreign process's view ---


@pytest.mark.skipif(shutil.which("dig") is None, reason="dig (bind9-dnsutils) is not installed")
class TestDig:
    """dig(1) sends EDNS with a cookie and warns of whatever it does not like."""

    def dig(self, station, *arguments):
        run = subprocess.run(
            ["dig", f"@{station.host}", "-p", str(station.port), "+norecurse", *arguments],
            text=True,
            capture_output=True,
            timeout=30,
            check=True,
        )
        assert "WARN" not in run.stdout + run.stderr
        assert ";; Got bad packet" not in run.stdout
        return run.stdout

    @pytest.mark.parametrize("way", ["+notcp", "+tcp", "+noedns", "+bufsize=4096"])
    def test_sees_services_ports_instances_and_texts(self, station, way):
        station.apply(
            lease(address="127.77.0.9", tags=("blue",), metadata={"version": "1.4.2"}),
            lease(endpoint="metrics", port=9100, address="127.0.0.1"),
        )
        assert self.dig(station, way, "+short", "A", "orders.portd.internal") == "127.77.0.9\n"
        assert (
            self.dig(station, way, "+short", "SRV", "_orders._tcp.portd.internal")
            == "0 1 20001 orders-1.orders.portd.internal.\n"
        )
        assert (
            self.dig(station, way, "+short", "SRV", "_metrics._tcp.orders.portd.internal")
            == "0 1 9100 metrics.orders-1.orders.portd.internal.\n"
        )
        texts = self.dig(station, way, "+short", "TXT", "orders-1.orders.portd.internal").splitlines()
        assert sorted(texts) == ['"tag=blue"', '"version=1.4.2"']
        shown = self.dig(station, way, "SRV", "_orders._tcp.portd.internal")
        assert "orders-1.orders.portd.internal. 0 IN A 127.77.0.9" in " ".join(shown.split())

    def test_sees_codes_and_flags(self, station):
        station.apply(lease())
        for name, status, flags in (
            ("orders.portd.internal", "NOERROR", "qr aa"),
            ("nobody.portd.internal", "NXDOMAIN", "qr aa"),
            ("example.com", "REFUSED", "qr"),
        ):
            shown = self.dig(station, name)
            assert f"status: {status}," in shown
            assert f"flags: {flags};" in shown
        assert "RFC8482" in self.dig(station, "+notcp", "ANY", "orders.portd.internal")
        assert "BADVERS" in self.dig(station, "+edns=1", "+noednsnegotiation", "orders.portd.internal")

    def test_asks_again_over_tcp_when_the_answer_was_cut(self, station):
        station.apply(*(lease(number=number) for number in range(1, 101)))
        shown = self.dig(station, "+noedns", "SRV", "_orders._tcp.portd.internal")
        assert "retrying in TCP mode" in shown
        assert "ANSWER: 100," in shown


def test_queries_wait_in_passed_sockets_while_nobody_serves():
    tcp_socket = socket.create_server(("127.0.0.1", 0))
    udp_socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    address = tcp_socket.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client, udp_socket, tcp_socket:
        udp_socket.bind(address)
        client.settimeout(DEADLINE_S)
        client.connect(address)
        client.send(ask_for("orders", "A").to_wire())  # nobody serves yet
        with socket.create_connection(address, timeout=DEADLINE_S) as connection:
            connection.sendall(framed(ask_for("orders", "A")))
            with Station(address, passed=[tcp_socket, udp_socket]) as station:
                station.apply(lease(address="127.77.0.9"))
                client.send(ask_for("orders", "A").to_wire())
                answers = {tuple(texts(dns.message.from_wire(client.recv(4096)))) for _ in range(2)}
                assert ("127.77.0.9",) in answers
                assert read_message(connection).rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)
