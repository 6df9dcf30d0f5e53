"""What bytes mean: answers in every legal form, however they are cut, and everything that is none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portd_client import documents
from portd_client.errors import DaemonUnavailable, LeaseLost, PortTaken, Problem, ProtocolError, Retryable
from portd_client.protocol import EventReader, Request, ResponseReader, query, result

PLAIN = b'HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n{"port": 8080}'
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n"
    b'8\r\n{"port":\r\n6;note=x\r\n 8080}\r\n0\r\n\r\n'
)
TO_THE_END = b'HTTP/1.0 200 OK\r\ncontent-type:application/json\r\n\r\n{"port": 8080}'
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"


def answer(data: bytes, cuts: list[int]) -> tuple[int, object]:
    """Read an answer that arrives in pieces, and then the connection's end where it is needed."""
    reader, body, last = ResponseReader(), b"", 0
    for cut in [*sorted({cut % len(data) for cut in cuts} - {0}), len(data)]:
        reader.feed(data[last:cut])
        body += reader.take()
        last = cut
    if not reader.is_complete:
        reader.feed(b"")
        body += reader.take()
    assert reader.is_complete
    return reader.status, result(reader.status, reader.headers.get("content-type", ""), body)


@given(st.sampled_from([PLAIN, CHUNKED, TO_THE_END, INTERIM]), st.lists(st.integers(0, 400), max_size=20))
def test_an_answer_reads_the_same_however_it_is_cut(data: bytes, cuts: list[int]) -> None:
    status, document = answer(data, cuts)
    assert status in {200, 201}
    assert document == {"port": 8080}


def test_an_answer_without_content_is_none() -> None:
    assert answer(EMPTY, [5]) == (204, None)


@pytest.mark.parametrize("data", [PLAIN[:-1], CHUNKED[:-7], PLAIN[:20]])
def test_an_answer_that_ends_too_early_is_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="closed"):
        answer(data, [])


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"x" * 70_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_answer_is_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        answer(data, [])


def test_html_error_page_becomes_a_problem_with_unknown_code() -> None:
    with pytest.raises(Problem) as caught:
        result(502, "text/html", b"<html>Bad Gateway</html>")
    assert (caught.value.status, caught.value.code) == (502, "unknown")


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("port_taken", 409, PortTaken),
        ("lease_ended", 410, LeaseLost),
        ("not_found", 404, LeaseLost),
        ("busy", 503, Retryable),
        ("store_unavailable", 503, Retryable),
        ("invalid_request", 400, Problem),
        ("a_code_of_tomorrow", 418, Problem),
    ],
)
def test_a_refusal_keeps_its_code_and_pointer(code: str, status: int, kind: type[Problem]) -> None:
    body = documents.encode({"code": code, "detail": "no", "pointer": "/port", "status": status})
    with pytest.raises(kind) as caught:
        result(status, "application/problem+json", body)
    assert (caught.value.code, caught.value.status, caught.value.pointer) == (code, status, "/port")


def test_broken_json_is_an_error_of_the_protocol() -> None:
    with pytest.raises(ProtocolError):
        result(200, "application/json", b'{"port": ')


def test_a_request_shows_the_leases_token_before_the_clients() -> None:
    head = Request("POST", "/v1/leases/x/renew", {"seconds": 5}, "the-lease").render("localhost", "the-client")
    assert b"Authorization: Bearer the-lease\r\n" in head
    assert head.endswith(b'\r\n\r\n{"seconds":5}')
    assert b"Content-Length: 13\r\n" in head


def test_a_token_cannot_smuggle_a_header() -> None:
    with pytest.raises(ValueError, match="line break"):
        Request("GET", "/v1/status").render("localhost", "token\r\nX-Evil: 1")


def test_a_query_is_encoded_as_the_api_reads_it() -> None:
    assert (
        query("/v1/leases", {"service": None, "tag": ["a b", "c&d"], "passing": True, "after": 3})
        == "/v1/leases?tag=a%20b&tag=c%26d&passing=true&after=3"
    )


@settings(max_examples=50)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**53), 2**53)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_documents_survive_the_way_there_and_back(value: object) -> None:
    assert documents.decode(documents.encode(value)) == value


@pytest.mark.parametrize("data", [b"", b"{", b"[1] 2", b"NaN", b"'x'", b"\xff"])
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each has a text of its own
        documents.decode(data)


@given(st.lists(st.integers(0, 200), max_size=10))
def test_events_read_the_same_however_they_are_cut(cuts: list[int]) -> None:
    data = (
        b': alive\n\nid: 7\nevent: granted\ndata: {"a":\ndata: 1}\n\n'
        b': following\n\nid: 8\r\nevent: ended\r\ndata:{"b":2}\r\n\r\ndata: cut off'
    )
    reader, events, last = EventReader(), [], 0
    for cut in [*sorted({cut % len(data) for cut in cuts}), len(data)]:
        events += reader.feed(data[last:cut])
        last = cut
    assert [(event.revision, event.name, event.data) for event in events] == [
        (7, "granted", {"a": 1}),
        (8, "ended", {"b": 2}),
    ]


@pytest.mark.parametrize("data", [b"id: x\ndata: {}\n\n", b"id: 1\ndata: {\n\n"])
def test_event_that_cannot_be_decoded_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        EventReader().feed(data)


def test_unavailable_says_what_was_tried_and_how_to_start_one() -> None:
    error = DaemonUnavailable([("unix:///run/portd/portd.sock", "no such file or directory")])
    assert "unix:///run/portd/portd.sock (no such file or directory)" in str(error)
    assert "portd serve" in str(error)
