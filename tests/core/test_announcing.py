"""What may be announced: the rules of RFC 6335 and RFC 6763."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portd.core import announcing
from portd.core.errors import AnnounceUnreachable, InvalidRequest
from portd.core.model import Announcement, HttpCheck, TcpCheck
from portd.core.requests import AnnounceRequest

FACTS: dict[str, Any] = {
    "service": "orders",
    "instance": "orders-1",
    "endpoint": "main",
    "protocol": "tcp",
    "address": "0.0.0.0",
    "check": None,
}


def test_an_http_check_makes_the_default_type_http() -> None:
    assert announcing.default_type("orders", "tcp", HttpCheck()) == "_http._tcp"


@pytest.mark.parametrize(
    ("protocol", "type_"), [("tcp", "_orders._tcp"), ("udp", "_orders._udp"), ("both", "_orders._tcp")]
)
def test_without_an_http_check_the_default_type_is_the_service(protocol: Any, type_: str) -> None:
    assert announcing.default_type("orders", protocol, TcpCheck()) == type_


@pytest.mark.parametrize("service", ["a-very-long-service", "4711", "a--b"])
def test_a_service_name_invalid_by_rfc_6335_needs_a_type(service: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        announcing.default_type(service, "tcp", None)
    assert refused.value.pointer == "/announce/type"


@pytest.mark.parametrize(
    ("given_type", "kept"),
    [
        ("_http._tcp", "_http._tcp"),
        ("_HTTP._TCP.local.", "_http._tcp"),
        ("_sleep-proxy._udp", "_sleep-proxy._udp"),
        ("_printer._sub._http._tcp", "_printer._sub._http._tcp"),
        ("_x4711._tcp", "_x4711._tcp"),
    ],
)
def test_a_type_has_one_canonical_form(given_type: str, kept: str) -> None:
    assert announcing.check_type(given_type) == kept


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "http",
        "http._tcp",
        "_http",
        "_http._sctp",
        "_a-very-long-servicename._tcp",
        "_-x._tcp",
        "_x-._tcp",
        "_a--b._tcp",
        "_123._tcp",
        "_._tcp",
        "_http._tcp.example",
        "_a.b._http._tcp",
        "__x._tcp",
        "_http._tcp\n",
    ],
)
def test_an_invalid_type_is_rejected(wrong: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        announcing.check_type(wrong)
    assert refused.value.pointer == "/announce/type"


def test_a_subtype_is_parsed_apart_from_its_base() -> None:
    assert announcing.parse_type("_printer._sub._http._tcp") == ("_http._tcp", "_printer")
    assert announcing.parse_type("_http._tcp") == ("_http._tcp", None)


def test_name_is_kept_in_nfc_with_its_dots_and_blanks() -> None:
    assert announcing.check_name("Dr. Cafe\u0301 №1") == "Dr. Caf\u00e9 №1"
    assert announcing.check_name("ü" * 31 + "x") == "ü" * 31 + "x"


@pytest.mark.parametrize("wrong", ["", "ü" * 32, "a\x00b", "a\nb", "a\x7f", "a\x85", "\ud800"])
def test_an_invalid_name_is_rejected(wrong: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        announcing.check_name(wrong)
    assert refused.value.pointer == "/announce/name"


@given(st.text(max_size=80))
def test_every_name_that_passes_is_one_label_in_nfc(text: str) -> None:
    try:
        name = announcing.check_name(text)
    except InvalidRequest:
        return
    assert 0 < len(name.encode()) <= 63
    assert unicodedata.is_normalized("NFC", name)


def test_txt_begins_with_service_and_instance() -> None:
    pairs = announcing.check_txt({"path": "/"}, service="orders", instance="orders-1")
    assert list(pairs.items()) == [("service", "orders"), ("instance", "orders-1"), ("path", "/")]


def test_txt_as_read_is_accepted_again() -> None:
    pairs = announcing.check_txt({"a": "b"}, service="orders", instance="orders-1")
    assert announcing.check_txt(pairs, service="orders", instance="orders-1") == pairs


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        ({"": "x"}, "/announce/txt/"),
        ({"a=b": "x"}, "/announce/txt/a=b"),
        ({"ü": "x"}, "/announce/txt/ü"),
        ({"a/b": "x" * 255}, "/announce/txt/a~1b"),
        ({"Path": "1", "path": "2"}, "/announce/txt/path"),
        ({"service": "else"}, "/announce/txt/service"),
        ({str(i): "x" * 250 for i in range(6)}, "/announce/txt"),
    ],
)
def test_an_invalid_txt_is_rejected(wrong: dict[str, str], pointer: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        announcing.check_txt(wrong, service="orders", instance="orders-1")
    assert refused.value.pointer == pointer


@pytest.mark.parametrize(
    ("address", "yes"),
    [
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.1.5", True),
        ("fe80::1", True),
        ("127.0.0.1", False),
        ("127.77.0.9", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("own", False),
    ],
)
def test_loopback_is_not_reachable(address: str, yes: bool) -> None:
    assert announcing.reachable(address) is yes


def test_a_loopback_lease_cannot_be_announced() -> None:
    with pytest.raises(AnnounceUnreachable):
        announcing.resolve(True, **(FACTS | {"address": "127.0.0.1"}))


def test_announce_true_names_the_service_after_its_instance() -> None:
    announcement = announcing.resolve(True, **FACTS)
    assert announcement == Announcement(
        type="_orders._tcp", name="orders-1", txt={"service": "orders", "instance": "orders-1"}
    )
    other = announcing.resolve(True, **(FACTS | {"endpoint": "metrics"}))
    assert other is not None
    assert other.name == "orders-1 metrics"


def test_the_requested_fields_are_announced() -> None:
    asked = AnnounceRequest(type="_http._tcp", name="Orders", txt={"path": "/"})
    announcement = announcing.resolve(asked, **FACTS)
    assert announcement is not None
    assert (announcement.type, announcement.name, announcement.txt["path"]) == ("_http._tcp", "Orders", "/")
    assert announcing.resolve(None, **FACTS) is None
    assert announcing.resolve(False, **FACTS) is None


@pytest.mark.parametrize(
    "type_",
    [
        "_http._tcp",
        "_HTTP._TCP.local.",
        "_amzn_alexa._tcp",
        "_a-very-long-service-name._udp",
        "_printer._sub._http._tcp",
    ],
)
def test_types_that_real_lans_have_can_be_browsed_for(type_: str) -> None:
    assert announcing.check_lan_type(type_) == type_.lower().removesuffix(".local.")


@pytest.mark.parametrize(
    "wrong", ["", "http", "_http", "_http._sctp", "_http._tcp.example", "_a._b._c._tcp", "\ud800._x._tcp"]
)
def test_an_invalid_type_can_not_be_browsed_for(wrong: str) -> None:
    with pytest.raises(InvalidRequest):
        announcing.check_lan_type(wrong)
